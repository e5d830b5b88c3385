"""Restore: nobody who was deleted after a backup comes back with it, and no number falls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import plain
import pytest
from histories import History

import s3t_ext
from s3t_ext.ledger import LedgerError
from s3t_ext.ledger.anchor import Anchor
from s3t_ext.store import files
from s3t_ext.store.files import StoreError, outside
from s3t_ext.store.rotate import rotate
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.restore import restore


def test_receipts_make_up_for_a_lost_ledger(history) -> None:
    history.delete(history.people[0])
    made = history.backup()
    for person in history.people[1:4]:
        history.delete(person)
    before = Anchor(outside(history.world.path, "anchor")).read()
    history.lose()
    report = restore(made, history.world.path, receipts=[history.written])
    assert (report["replayed"], report["missing"], report["lost"]) == (3, 0, [before.count - 5, before.count])
    assert report["seq"] > before.count, "counters only grow"
    history.world.check()
    for request, people in history.world.begun.items():
        receipt = s3t_ext.delete(history.world.path, people, request)
        assert receipt == history.receipts[int(request[1:])], "the same id gives the same receipt"
    history.world.settle()
    history.delete(history.people[5])
    history.world.settle()
    second = history.backup("second")
    history.delete(history.people[6])
    history.lose()
    assert restore(second, history.world.path, receipts=[history.written])["replayed"] == 1
    history.world.settle()


def test_receipts_of_others_are_refused(history, tmp_path) -> None:
    made = history.backup()
    history.delete(history.people[0])
    file = history.written / "r0.json"
    history.lose()
    (tmp_path / "elsewhere").mkdir()
    other = History(plain.make(tmp_path / "other" / "store"), tmp_path / "elsewhere")
    other.delete(other.people[0])
    forged = {**history.receipts[0], "received": "2000-01-01T00:00:00.000+00:00"}
    for content, why in ((other.receipts[0], "another store"), (forged, "was changed"), ([], "one JSON object")):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=why):
            restore(made, history.world.path, receipts=[file])
    key = outside(history.world.path, "key")
    with pytest.raises(StoreError, match="the ledger of the backup is not an earlier state of the one in"):
        restore(made, other.world.path, backup_key=key)
    outside(other.world.path, "anchor").unlink()
    with pytest.raises(ValueError, match="expected the store of the backup, got another one"):
        restore(made, other.world.path, backup_key=key)


def test_a_newer_ledger_needs_no_receipts(history) -> None:
    made = history.backup()
    history.delete(history.people[0])
    middle = history.ledger("middle.sqlite")
    history.delete(history.people[1])
    newest = history.ledger("newest.sqlite")
    history.lose()
    with pytest.raises(StoreError, match="1 acknowledged requests are missing: the newest ledger, of --ledger"):
        restore(made, history.world.path, middle)
    assert restore(made, history.world.path, newest)["ledger"] == "of --ledger"
    history.world.settle()
    history.lose()
    assert restore(made, history.world.path, middle, [history.written / "r1.json"])["replayed"] == 1
    history.world.settle()


def test_only_what_is_missing_or_damaged_is_written(history) -> None:
    made = history.backup()
    history.delete(history.people[0])
    with StoreFolder(history.world.path) as folder:
        live = sorted(folder.trained(folder.ledger.slices()).values())
        before = folder.ledger.seq
    (history.world.path / "nodes" / f"{live[0]}.sealed").write_bytes(b"damaged")
    (history.world.path / "nodes" / f"{live[1]}.json").unlink()
    (history.world.path / "records" / "0-0.sealed").unlink()
    (history.world.path / "records" / "1-1.sealed").write_bytes(b"damaged")
    (history.world.path / "head.npy").unlink()
    for name in ("key", "epoch", "anchor"):
        (history.world.path / name).write_bytes(b"damaged")
    report = restore(made, history.world.path)
    assert (report["ledger"], report["nodes"], report["records"], report["seq"]) == ("of the store", 2, 2, before)
    history.world.settle()
    for names in (
        ["store.json"],
        ["store.json", "key", "signing-key"],
        ["signing-key", "public.json", "base/model.json"],
    ):
        for name in names:
            (history.world.path / name).write_bytes(b"damaged")
        restore(made, history.world.path)
        history.delete(history.people[len(history.receipts)])
        history.world.settle()


def test_a_dead_node_and_a_deleted_person_are_not_written_for_a_moment(history, monkeypatch) -> None:
    made = history.backup()
    people = [history.people[0], history.people[1]]
    for person in people:
        history.delete(person)
    history.lose()
    doomed, seen = history.world.dead({history.world.cells[person] for person in people}), []
    real = files.atomic_write

    def write(path, data, **more):
        path = Path(path)
        assert path.stem not in doomed
        real(path, data, **more)
        seen.append(path.name)
        if path.parent.name == "records":
            with StoreFolder(history.world.path) as folder:
                shard, _, slice_ = path.stem.partition("-")
                names = {name for record in folder.records.get(int(shard), int(slice_)).subjects for name in record}
            assert not names & set(people)

    for module in ("store.files", "store.sealed", "system.restore", "ledger.replay"):
        monkeypatch.setattr(f"s3t_ext.{module}.atomic_write", write)
    restore(made, history.world.path, receipts=[history.written])
    declared = [seen.index(Path(name).name) for name in StoreFolder(made).declared]
    assert seen.index("ledger.sqlite") == 0
    assert declared[0] == max(declared), "store.json makes a store of it"
    assert len(seen) > 20
    history.world.settle()


def test_what_an_older_copy_brings_back_goes_again(history) -> None:
    """The ledger is the newest; the nodes and records are of last week."""
    made, week = history.backup(), history.snapshot("last week")
    history.delete(history.people[0])
    newest = history.ledger("newest.sqlite")
    history.put_back(week)
    restore(made, history.world.path, newest)
    history.world.settle()


def test_a_store_in_use_is_refused(history) -> None:
    made = history.backup()
    with StoreFolder(history.world.path) as folder:
        folder.ledger.slices()
        with pytest.raises(LedgerError, match="is in use by a service or another process; stop it and repeat"):
            restore(made, history.world.path)
    with files.exclusive(history.world.path), pytest.raises(StoreError, match="is writing to"):
        restore(made, history.world.path)
    restore(made, history.world.path)


def test_files_of_others_among_the_nodes_stay(history) -> None:
    made = history.backup()
    history.delete(history.people[0])
    others = [history.world.path / "nodes" / name for name in ("README", ".DS_Store", "notes.json")]
    for file in others:
        file.write_text("of somebody")
    restore(made, history.world.path)
    for file in others:
        assert file.read_text() == "of somebody"
        file.unlink()
    history.world.settle()


def test_the_store_keys_are_asked_for_before_anything_is_written(history, tmp_path) -> None:
    made, store = history.backup(), history.world.path
    history.delete(history.people[0])
    key, old = outside(store, "key"), tmp_path / "old.key"
    shutil.copy(key, old)
    rotate(store)
    (store / "records" / "0-0.sealed").unlink()
    (store / "signing-key").unlink()
    with pytest.raises(StoreError, match=r"is opened by the store key .*: name the file of that one by --backup-key"):
        restore(made, store)
    assert restore(made, store, backup_key=old)["records"] == 1
    history.world.settle()
    history.delete(history.people[1])
    history.lose()
    with pytest.raises(StoreError, match=r"store needs the store key"):
        restore(made, store, backup_key=old)
    key.unlink()
    with pytest.raises(StoreError, match="the store key is missing: put your copy of it at"):
        restore(made, store)
    assert not store.exists()
    shutil.copy(old, key)
    restore(made, store, receipts=[history.written])
    history.world.settle()
