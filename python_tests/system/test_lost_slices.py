"""One slice whose records cannot be read: all others are erased, healed and backed up, and nothing is claimed of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import losing
import pytest
import tiny as t
from losing import QUICK, certified, states

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.store.files import StoreError
from s3t_ext.store.records import Lost
from s3t_ext.system.backup import backup
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.restore import restore
from s3t_ext.system.unlearn import erase_pending


@pytest.fixture
def store(quick, tmp_path) -> Path:
    return losing.copy(quick, tmp_path)


def test_all_other_slices_are_erased_healed_and_backed_up(mlp, lost, gone, tmp_path, capsys, monkeypatch) -> None:
    assert states(lost) == {"r-lost": "applied", "r-other": "erased"}
    assert main(["erase", str(lost)]) == 1
    assert "pending, until what is lost is back, or given up: r-lost" in capsys.readouterr().out
    assert main(["heal", str(lost), "--dry-run"]) == 1
    foretold = capsys.readouterr().out
    assert main(["heal", str(lost)]) == 1
    out = capsys.readouterr()
    assert out.out.count("slice 0-0 is lost") == foretold.count("slice 0-0 is lost") == 1
    assert "warning" not in out.err, "said once"
    status = s3t_ext.status(lost)
    assert (status["dirty"], status["depths"]) == ([[0, 0]], [2, 3])
    assert status["healing"]["nodes"] == 0, "nothing that healing could do is left"
    assert "`s3t erase STORE --lost 0-0`" in status["lost_slices"]["0-0"]
    assert main(["status", str(lost)]) == 1
    table = t.without(mlp.table, set(gone.values()))
    fresh = t.weights(mlp.fit(tmp_path / "fresh", table, **QUICK))
    assert t.weights(lost) == {node: digest for node, digest in fresh.items() if node[0] == 1 or 0 not in node[1]}
    assert main(["backup", str(lost), str(tmp_path / "copy")]) == 1
    assert not (tmp_path / "copy" / "records" / "0-0.sealed").exists()
    report = certified(mlp, lost, monkeypatch)
    assert (report["certified"], report["mismatched"]) == (["r-other"], 0)
    assert report["uncertified"] == {"r-lost": "not erased: slice 0-0, which is lost"}
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    assert main(["heal", str(lost)]) == 0
    assert (t.weights(lost), states(lost)["r-lost"]) == (fresh, "erased")


def test_a_lost_slice_of_which_nobody_asked_is_found_by_healing(mlp, store, tmp_path, gone) -> None:
    s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 1][0], gone["r-other"]])
    before = set(t.weights(store))
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    report = heal(store, progress=False)
    assert (report["healed"], list(report["lost_slices"])) == ([[0, 1], [1, 1]], ["0-0"])
    fresh = t.without(mlp.table, {t.people_by_cell(mlp)[0, 1][0], gone["r-other"]})
    expected = t.weights(mlp.fit(tmp_path / "fresh", fresh, **QUICK))
    others = {node for node in expected if node[0] == 1 or 0 not in node[1]}
    assert t.weights(store) == {node: digest for node, digest in expected.items() if node in others | before}
    assert report["nodes"] == len(others - before)


def test_a_backup_without_the_slice_restores_all_else(mlp, lost, tmp_path) -> None:
    assert list(backup(lost, tmp_path / "copy")["lost_slices"]) == ["0-0"]
    shutil.rmtree(lost / "nodes")
    (lost / "records" / "1-0.sealed").unlink()
    report = restore(tmp_path / "copy", lost)
    assert (report["records"], list(report["lost_slices"])) == (1, ["0-0"])
    assert states(lost) == {"r-lost": "applied", "r-other": "erased"}
    assert s3t_ext.status(lost)["depths"] == [2, 2]


def test_a_damaged_slice_of_which_nobody_asked_goes_into_no_backup(store, tmp_path, monkeypatch) -> None:
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    assert list(backup(store, tmp_path / "copy")["lost_slices"]) == ["0-0"]
    monkeypatch.setattr("s3t_ext.system.backup.losses", lambda folder, look: {})  # as backups of before were made
    backup(store, tmp_path / "old copy")
    for name in ("copy", "old copy"):
        (store / "records" / "1-0.sealed").unlink()
        report = restore(tmp_path / name, store)
        assert (report["records"], list(report["lost_slices"])) == (1, ["0-0"])


@pytest.mark.filterwarnings("ignore:acknowledged, but not erased yet")
def test_nothing_counts_as_lost_while_the_store_key_is_missing(lost, tmp_path) -> None:
    (tmp_path / "store.key").rename(tmp_path / "aside")
    assert s3t_ext.status(lost)["lost_slices"] == {}
    for act in (heal, lambda store, **_: backup(store, tmp_path / "copy")):
        with pytest.raises(StoreError, match=r"the store key \w+\.\.\. is missing"):
            act(lost, progress=False)
    (tmp_path / "aside").rename(tmp_path / "store.key")
    with StoreFolder(lost) as folder:
        (lost / "store.json").rename(tmp_path / "aside")
        with pytest.raises(StoreError) as caught:
            folder.records.get(0, 0)
    assert not isinstance(caught.value, Lost)


def test_a_waiting_request_does_not_erase_what_was_healed_to_the_same_bits(mlp, tmp_path, gone) -> None:
    """Whose only record in a slice went before with its owner: the slice is healed to the digest that it had."""
    row = next(i for i, names in enumerate(mlp.table.subjects) if names == (gone["r-other"],))
    subjects = [(*names, "guest") if i == row else names for i, names in enumerate(mlp.table.subjects)]
    shared = replace(mlp, table=Table(subjects, mlp.table.inputs, mlp.table.labels))
    store = shared.fit(tmp_path / "store", **QUICK)
    s3t_ext.delete(store, [gone["r-other"]])
    heal(store, progress=False)
    before = t.weights(store)
    (store / "records" / "0-0.sealed").unlink()
    with pytest.warns(UserWarning, match="not erased yet"):
        dead = s3t_ext.delete(store, [gone["r-lost"], "guest"], "both")["shards"]
    heal(store, progress=False)
    with StoreFolder(store) as folder:
        live = set(folder.trained(folder.ledger.slices()).values())
        assert live & {name for shard in dead for name in shard["dead"]}, "the ids are back"
        assert erase_pending(folder)
        assert set(folder.trained(folder.ledger.slices()).values()) == live
        assert residue(folder) == {}
    assert t.weights(store) == {node: digest for node, digest in before.items() if node[0] == 1 or 0 not in node[1]}
