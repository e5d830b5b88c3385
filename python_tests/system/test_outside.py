"""The anchor outside a store: copies of the folder from an earlier day are refused by every way in."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta, timezone

import plain
import pytest

import s3t_ext
from s3t_ext.ledger import LedgerError, log
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system import unlearn


@pytest.fixture
def world(tmp_path):
    return plain.make(tmp_path / "store")


def test_an_older_copy_of_the_store_is_refused(world, tmp_path) -> None:
    people = sorted(world.cells)
    shutil.copytree(world.path, tmp_path / "monday")
    s3t_ext.delete(world.path, people[:1], "a")
    shutil.copytree(world.path, tmp_path / "tuesday")
    s3t_ext.delete(world.path, people[1:2], "b")
    for day in ("monday", "tuesday"):
        shutil.rmtree(world.path)
        shutil.copytree(tmp_path / day, world.path)
        for use in (
            lambda: unlearn.status(world.path),
            lambda: s3t_ext.delete(world.path, people[2:3], "c"),
            lambda: unlearn.receipt(world.path, "a"),
            lambda: s3t_ext.delete(world.path, people[2:3], dry_run=True),
        ):
            with pytest.raises(LedgerError, match=r"store\.anchor says .*; nothing is served: .* `s3t restore`"):
                use()
    with pytest.raises(LedgerError, match=r"tuesday\.anchor is missing"):
        unlearn.status(tmp_path / "tuesday")


def test_a_store_goes_to_a_new_place_with_its_anchor(world, tmp_path) -> None:
    s3t_ext.delete(world.path, sorted(world.cells)[:1], "a")
    (tmp_path / "new").mkdir()
    for path in (world.path, *tmp_path.glob("store.*")):
        path.rename(tmp_path / "new" / path.name)
    assert unlearn.status(tmp_path / "new" / "store")["requests"] == 1


def test_no_store_is_made_where_one_was_lost(world, tmp_path) -> None:
    s3t_ext.delete(world.path, sorted(world.cells)[:1], "a")
    shutil.rmtree(world.path)
    outside(world.path, "key").unlink(missing_ok=True)
    with pytest.raises(StoreError, match=r"store\.anchor is of a store that is not at .*: restore that one, or move"):
        plain.make(world.path)
    shutil.rmtree(tmp_path / "base")
    outside(world.path, "anchor").rename(tmp_path / "elsewhere")
    assert unlearn.status(plain.make(world.path).path)["requests"] == 0


def test_status_counts_states_and_names_what_is_overdue(world, monkeypatch) -> None:
    with unlearn.StoreFolder(world.path) as folder:
        unlearn.delete_from(folder, sorted(world.cells)[:1], "waits")
        receipt = unlearn.delete_from(folder, sorted(world.cells)[1:2], "waits too")
    assert datetime.fromisoformat(receipt["deadline"]) - datetime.fromisoformat(receipt["received"]) == timedelta(30)
    assert unlearn.status(world.path)["overdue"] == []

    class Later(datetime):
        @classmethod
        def now(cls, zone):
            return datetime(2200, 1, 1, tzinfo=zone)

    with monkeypatch.context() as clock:
        clock.setattr(log, "datetime", Later)
        report = unlearn.status(world.path)
        assert report["overdue"] == ["waits", "waits too"]
        assert report["states"] == {"received": 0, "applied": 2, "erased": 0, "certified": 0}
    s3t_ext.delete(world.path, ["nobody"], "third")
    report = unlearn.status(world.path)
    assert (report["overdue"], report["pending_erasure"]) == ([], 0)
    assert report["states"] == {"received": 0, "applied": 0, "erased": 3, "certified": 0}
    assert datetime.now(timezone.utc).year < 2200
