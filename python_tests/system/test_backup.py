"""Backup: whole or not there, while requests go on; and it tells the ledger of itself."""

from __future__ import annotations

import shutil

import pytest

from s3t_ext.ledger import Ledger
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system import backup as backup_module
from s3t_ext.system.backup import backup
from s3t_ext.system.evidence import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.restore import restore
from s3t_ext.system.status import status


def test_a_backup_restores_a_lost_store(history) -> None:
    history.delete(history.people[0])
    made = history.backup()
    history.lose()
    report = restore(made, history.world.path)
    assert report["ledger"] == "of the backup"
    assert (report["nodes"], report["replayed"], report["missing"]) == (len(history.world.nodes) - history.dead(), 0, 0)
    history.world.settle()
    again = restore(made, history.world.path)
    assert (again["ledger"], again["nodes"], again["records"], again["seq"]) == ("of the store", 0, 0, report["seq"])


def test_what_is_not_in_a_backup(history) -> None:
    history.delete(history.people[0])
    made = history.backup()
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} - {"lock", "backup.json"}
    assert names == backup_module.check(made)["files"].keys()
    assert not names & {"anchor", "epoch"}
    for kind in ("key", "anchor"):
        secret = outside(history.world.path, kind).read_bytes()
        assert not [path for path in made.rglob("*") if path.is_file() and secret.strip() in path.read_bytes()]


def test_it_is_an_export_of_which_later_receipts_tell(history) -> None:
    first = history.delete(history.people[0])
    history.backup("monday")
    second, nobody = history.delete(history.people[1]), history.delete("nobody")
    assert first["exports"] == nobody["exports"] == []
    assert [(e["export"], e["kind"]) for e in second["exports"]] == [("monday", "backup")]
    with StoreFolder(history.world.path) as folder:
        (export,) = folder.ledger.exports()
        live = set(folder.trained(folder.ledger.slices()).values())
        assert live < set(export.nodes)
        assert export.cells == set(history.world.cells.values())


def test_what_is_pending_is_erased_before_it_is_copied(history) -> None:
    history.delete(history.people[0], erase=False)
    made = history.backup()
    assert status(history.world.path)["pending_erasure"] == 0
    assert history.people[0] not in names(made, history)
    assert len(list((made / "nodes").glob("*.sealed"))) == len(history.world.nodes) - history.dead()


def names(copy, history) -> set[str]:
    """Name everybody whose records are in a backup."""
    with StoreFolder(copy, StoreKey.find(history.world.path)) as source:
        held = [source.records.get(*cell).subjects for cell in set(history.world.cells.values())]
    return {name for subjects in held for record in subjects for name in record}


def test_what_an_old_copy_brought_back_is_not_copied(history, tmp_path) -> None:
    """No receipt would name the backup that holds it."""
    store = history.world.path
    shutil.copytree(store / "records", tmp_path / "old")
    history.delete(history.people[0])
    shutil.copytree(tmp_path / "old", store / "records", dirs_exist_ok=True)
    with pytest.raises(StoreError, match="holds files of deleted people again: run `s3t erase"):
        backup(store, tmp_path / "monday")
    assert not (tmp_path / "monday").exists()
    with StoreFolder(store) as folder:
        residue.remove(folder, residue.residue(folder))
    assert backup(store, tmp_path / "monday")["files"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_requests_go_on_while_it_copies(history, monkeypatch, moment) -> None:
    """One between choice and event is not in the copy, one during the copy names it; nobody waits."""
    target, name = (Ledger, "export") if moment == "before" else (backup_module, "_copy")
    real = getattr(target, name)
    made: list[dict] = []

    def during(*args):
        if not made:
            made.append({})
            made[0] = history.delete(history.people[0])
            assert status(history.world.path)["pending_erasure"] == 1, "the copy holds the writer's lock"
        return real(*args)

    monkeypatch.setattr(target, name, during)
    copy = history.backup()
    assert [export["export"] for export in made[0]["exports"]] == ([] if moment == "before" else ["backup"])
    assert status(history.world.path)["pending_erasure"] == 0, "it looks again after letting go"
    stems = {path.stem for path in (copy / "nodes").glob("*.sealed")}
    doomed = history.world.dead({history.world.cells[history.people[0]]})
    assert bool(stems & doomed) == (moment == "after")
    assert (history.people[0] in names(copy, history)) == (moment == "after")
    history.lose()
    restore(copy, history.world.path)
    history.world.settle()


def test_places_that_are_refused(history) -> None:
    made = history.backup()
    for place, says in ((made, "which exists"), (history.world.path / "inside", "outside the store")):
        with pytest.raises(ValueError, match=f"FOLDER: .*{says}"):
            backup(history.world.path, place)
    with pytest.raises(StoreError, match="cannot create"):
        backup(history.world.path, history.aside / "no" / "such")
    with pytest.raises(StoreError, match="holds no store"):
        backup(history.aside, history.world.path.with_name("new"))
    with pytest.raises(StoreError, match=r"no backup: it has no backup.json"):
        restore(history.world.path, history.aside / "new")
    (history.aside / "other").mkdir()
    (history.aside / "other" / "file").write_text("of somebody")
    with pytest.raises(ValueError, match="STORE: expected a store or a new folder"):
        restore(made, history.aside / "other")


def test_a_damaged_backup_changes_nothing(history) -> None:
    history.delete(history.people[0])
    made = history.backup()
    history.lose()
    for path in sorted(path for path in made.rglob("*") if path.is_file() and path.name != "lock"):
        whole = path.read_bytes()
        for content in (None, whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(StoreError, match=path.name):
                restore(made, history.world.path)
            assert not history.world.path.exists()
        path.write_bytes(whole)
    restore(made, history.world.path)


def test_what_cannot_be_made_durable_does_not_stay(history, monkeypatch) -> None:
    real = backup_module.sync_folder

    def failing(folder) -> None:
        if folder == history.aside:
            raise OSError(5, "Input/output error")
        real(folder)

    monkeypatch.setattr(backup_module, "sync_folder", failing)
    with pytest.raises(StoreError, match=r"cannot write .*backup: Input/output error"):
        history.backup()
    assert not list(history.aside.iterdir())
