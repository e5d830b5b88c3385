"""The anchor outside a store: copies of the folder from an earlier day are refused by every way in."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone

import numpy as np
import plain
import pytest

import s3t_ext
from s3t_ext.ledger import LedgerError, request
from s3t_ext.store import rotate as rotation
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system import unlearn
from s3t_ext.system.config import Config
from s3t_ext.system.creation import creating
from s3t_ext.system.evidence import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.scratch import scratch_beside
from s3t_ext.system.status import status


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
            lambda: status(world.path),
            lambda: s3t_ext.delete(world.path, people[2:3], "c"),
            lambda: unlearn.receipt(world.path, "a"),
            lambda: s3t_ext.delete(world.path, people[2:3], dry_run=True),
        ):
            with pytest.raises(LedgerError, match=r"store\.anchor says .*; nothing is served: .* `s3t restore`"):
                use()
    with pytest.raises(LedgerError, match=r"tuesday\.anchor is missing"):
        status(tmp_path / "tuesday")


def test_a_store_goes_to_a_new_place_with_its_anchor(world, tmp_path) -> None:
    s3t_ext.delete(world.path, sorted(world.cells)[:1], "a")
    (tmp_path / "new").mkdir()
    for path in (world.path, *tmp_path.glob("store.*")):
        path.rename(tmp_path / "new" / path.name)
    assert status(tmp_path / "new" / "store")["requests"] == 1


def test_no_store_is_made_where_one_was_lost(world, tmp_path) -> None:
    s3t_ext.delete(world.path, sorted(world.cells)[:1], "a")
    shutil.rmtree(world.path)
    outside(world.path, "key").unlink(missing_ok=True)
    with pytest.raises(StoreError, match=r"store\.anchor is of a store that is not at .*: restore that one, or move"):
        plain.make(world.path)
    shutil.rmtree(tmp_path / "base")
    outside(world.path, "anchor").rename(tmp_path / "elsewhere")
    assert status(plain.make(world.path).path)["requests"] == 0


def made(path) -> None:
    """Make a store, as `fit` does before it trains."""
    base = path.parent / "base"
    base.mkdir(exist_ok=True)
    for name in ("model.json", "weights.safetensors"):
        (base / name).touch()
    with creating(
        path, plain.SCHEMA, Config(shards=1, slices=1), plain.KEY, base, "0" * 64, np.zeros((2, 2))
    ) as folder:
        folder.ledger.ingest({(0, 0): "0" * 64}, [])


def killed(path, fatal: int) -> bool:
    """Make a store in a process that dies in place of one of its calls; return whether it did."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(whole):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os._exit(9)
                return whole(*args, **kwargs)

            return call

        for name in ("write", "fsync", "link", "unlink", "replace", "rename", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        made(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def opens_alone(path) -> None:
    with StoreFolder(path) as folder:
        assert folder.key == plain.KEY
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "base",
        path.name,
        f"{path.name}.anchor",
        f"{path.name}.key",
    ]


def test_a_store_is_made_after_a_kill_at_any_call(ram) -> None:
    """And after a second one at any call of the sweep: no key stays that nothing tells from another store's."""
    kills = both = 0
    for fatal in itertools.count(1):
        path = ram / str(fatal) / "store"
        path.parent.mkdir()
        if not killed(path, fatal):
            break
        kills += 1
        if (path.parent / "store.key").exists() and not path.exists():
            both += 1
            shutil.rmtree(ram / "left", ignore_errors=True)
            shutil.copytree(path.parent, ram / "left")
        if not path.exists():
            made(path)
        opens_alone(path)
    assert kills > 40
    assert both >= 2
    for again in itertools.count(1):
        path = ram / "again" / str(again) / "store"
        shutil.copytree(ram / "left", path.parent)
        died = killed(path, again)
        if not path.exists():
            made(path)
        opens_alone(path)
        if not died:
            break
    print(f"{kills} kills of a store being made, {both} of them between key and store, {again - 1} of the next try")


def test_a_store_is_made_after_one_that_failed_last(tmp_path, monkeypatch) -> None:
    def fails(*_):
        raise OSError(errno.EIO, "no rename")

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(StoreError, match="no rename"):
        made(tmp_path / "store")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]
    made(tmp_path / "store")


def test_a_key_that_another_store_may_need_is_not_shared(tmp_path, monkeypatch) -> None:
    """Two stores of one name and one folder of keys: a rotation of one would destroy the other's only key."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("S3T_KEY_FOLDER", str(tmp_path / "keys"))
    made(tmp_path / "a" / "store")
    key = (tmp_path / "keys" / "store.key").read_text()
    # A backup of the first that was killed in the place of the second names the same key, and is swept.
    shutil.copytree(tmp_path / "a" / "store", left := tmp_path / "b" / ".store.x.part")
    (left / "epoch").unlink()
    with pytest.raises(
        StoreError, match=r"keys/store\.key is there without a store at .*b/store: move it away, it may"
    ):
        made(tmp_path / "b" / "store")
    assert (tmp_path / "keys" / "store.key").read_text() == key
    assert [entry.name for entry in (tmp_path / "b").iterdir()] == ["base"]
    monkeypatch.setenv("S3T_STORE_KEY", "ab" * 32)
    made(tmp_path / "b" / "store")
    monkeypatch.delenv("S3T_STORE_KEY")
    with StoreFolder(tmp_path / "a" / "store") as folder:
        assert folder.key == plain.KEY


def test_a_killed_check_of_a_store_on_read_only_ground_is_swept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    left = tmp_path / "temporary" / ".store.x.part"
    left.mkdir(parents=True)
    (left / "record").touch()
    with scratch_beside(tmp_path / "store"):
        assert not left.exists()


@pytest.mark.parametrize("job", ["rotate", "remove", "fail"])
def test_whoever_holds_the_lock_erases_what_came_in_meanwhile(world, monkeypatch, job) -> None:
    """Its sender found the lock taken, and may never ask again."""
    person = sorted(world.cells)[0]

    def meanwhile(*_):
        s3t_ext.delete(world.path, [person], "r1")
        assert status(world.path)["pending_erasure"] == 1
        if job == "fail":
            raise StoreError("the disk fails")
        return {}

    with StoreFolder(world.path) as folder:
        if job == "remove":
            monkeypatch.setattr(folder.nodes, "erase", meanwhile)
            residue.remove(folder, {"": ["nodes/" + "0" * 64]})
        else:
            monkeypatch.setattr(rotation, "_from_file", meanwhile)
            with pytest.raises(StoreError, match="the disk fails") if job == "fail" else nullcontext():
                unlearn.rotate(world.path)
    assert status(world.path)["pending_erasure"] == 0


def test_a_copy_from_before_the_first_request_is_refused_without_the_anchor(world, tmp_path) -> None:
    shutil.copytree(world.path, tmp_path / "monday")
    s3t_ext.delete(world.path, sorted(world.cells)[:1], "a")
    shutil.rmtree(world.path)
    outside(world.path, "anchor").unlink()
    shutil.copytree(tmp_path / "monday", world.path)
    with pytest.raises(LedgerError, match=r"store\.anchor is missing"):
        status(world.path)


@pytest.mark.parametrize("where", ["keys", "store", "store/keys"])
def test_a_folder_of_keys_that_is_relative_or_in_the_store_is_refused(world, monkeypatch, where) -> None:
    monkeypatch.setenv("S3T_KEY_FOLDER", where if where == "keys" else str(world.path.parent / where))
    with pytest.raises(StoreError, match="S3T_KEY_FOLDER: expected an absolute path outside"):
        s3t_ext.delete(world.path, ["x"])


def test_status_counts_states_and_names_what_is_overdue(world, monkeypatch) -> None:
    with unlearn.StoreFolder(world.path) as folder:
        unlearn.delete_from(folder, sorted(world.cells)[:1], "waits")
        receipt = unlearn.delete_from(folder, sorted(world.cells)[1:2], "waits too")
    assert datetime.fromisoformat(receipt["deadline"]) - datetime.fromisoformat(receipt["received"]) == timedelta(30)
    assert status(world.path)["overdue"] == []

    class Later(datetime):
        @classmethod
        def now(cls, zone):
            return datetime(2200, 1, 1, tzinfo=zone)

    with monkeypatch.context() as clock:
        clock.setattr(request, "datetime", Later)
        report = status(world.path)
        assert report["overdue"] == ["waits", "waits too"]
        assert report["states"] == {"received": 0, "applied": 2, "erased": 0, "certified": 0}
    s3t_ext.delete(world.path, ["nobody"], "third")
    report = status(world.path)
    assert (report["overdue"], report["pending_erasure"]) == ([], 0)
    assert report["states"] == {"received": 0, "applied": 0, "erased": 3, "certified": 0}
    assert datetime.now(timezone.utc).year < 2200
