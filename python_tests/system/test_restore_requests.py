"""No request is lost by a restore, neither one that came before it nor one that comes while it works."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from histories import History

import s3t_ext
from s3t_ext.ledger import LedgerError, canonical_json
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system import restore as restore_module
from s3t_ext.system import unlearn
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.restore import restore
from s3t_ext.system.status import status


def test_incomplete_receipts_are_refused_and_change_nothing(history) -> None:
    made = history.backup()
    monday = history.snapshot("monday")
    for person in history.people[:3]:
        history.delete(person)
    (history.written / "r1.json").unlink()
    history.lose()
    says = r"1 acknowledged requests are missing: .* of the backup, ends at entry 3 with 0 of them; give the receipts"
    with pytest.raises(StoreError, match=says):
        restore(made, history.world.path, receipts=[history.written])
    assert not history.world.path.exists()
    history.put_back(monday)
    old = contents(history.world.path)
    with pytest.raises(StoreError, match=r"1 acknowledged requests are missing: .* of the store, ends"):
        restore(made, history.world.path, receipts=[history.written])
    assert contents(history.world.path) == old
    with pytest.raises(LedgerError, match="s3t restore"):
        status(history.world.path)
    (history.written / "r1.json").write_bytes(canonical_json(history.receipts[1]))
    restore(made, history.world.path, receipts=[history.written])
    history.world.settle()


def contents(folder: Path) -> dict[str, bytes]:
    left_out = ("lock", "ledger.sqlite-shm", "ledger.sqlite-wal")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out
    }


def test_a_request_waits_for_a_restore_and_is_kept(history, monkeypatch) -> None:
    """One comes while the ledger is read, one while it is settled: neither is acknowledged, and then lost."""
    made = history.backup()
    history.delete(history.people[0])
    history.lose()
    outside(history.world.path, "anchor").unlink()
    restore(made, history.world.path, without_anchor=True)
    history.world.seq = 0
    waiting = []

    def come(real, request):
        def during(*args):
            people = (history.people[len(waiting) + 1],)
            history.world.begun[request] = people
            asked = threading.Thread(target=unlearn.delete, args=(history.world.path, people, request))
            asked.start()
            waiting.append(asked)
            asked.join(0.5)
            return real(*args)

        return during

    for name in ("unknown_receipts", "settle"):
        monkeypatch.setattr(restore_module, name, come(getattr(restore_module, name), name))
    restore(made, history.world.path, receipts=[history.written], without_anchor=True)
    for asked in waiting:
        asked.join()
    for request, people in history.world.begun.items():
        history.world.acknowledge(request, unlearn.receipt(history.world.path, request))
        assert s3t_ext.delete(history.world.path, people, request)
    history.world.settle(already=True)


def test_what_is_requested_meanwhile_is_erased(history, monkeypatch) -> None:
    made = history.backup()
    real = restore_module.erase

    def late(folder) -> dict:
        lost = real(folder)
        history.world.begun["late"] = people = (history.people[0],)
        unlearn.delete(history.world.path, people, "late")
        assert folder.ledger.unerased()
        return lost

    monkeypatch.setattr(restore_module, "erase", late)
    restore(made, history.world.path)
    history.world.settle(already=True)


def test_a_backup_older_than_all_requests_takes_a_word_too(history) -> None:
    """The store and its anchor are lost: the backup knows of no request, and nobody knows whether there was one."""
    made = history.backup()
    history.delete(history.people[0])
    history.lose()
    outside(history.world.path, "anchor").unlink()
    with pytest.raises(StoreError, match=r"is missing, .* if it is lost, --without-anchor"):
        restore(made, history.world.path)
    assert not history.world.path.exists()
    give_up(history)
    restore(made, history.world.path, without_anchor=True)
    history.world.settle()


@pytest.mark.parametrize("erase", [True, False])
def test_receipts_from_before_a_loss_that_was_accepted_do_not_count(history, erase) -> None:
    """By the operator's word three requests are given up; their receipts stand in for none that came later."""
    made = history.backup()
    for person in history.people[:3]:
        history.delete(person, erase=erase)
    given_up = [history.written / f"r{n}.json" for n in range(3)]
    history.lose()
    outside(history.world.path, "anchor").unlink()
    restore(made, history.world.path, without_anchor=True)
    give_up(history)
    history.delete(history.people[5], erase=False)
    history.lose()
    with pytest.raises((LedgerError, StoreError), match=r"1 acknowledged requests are missing|one that was given up"):
        restore(made, history.world.path, receipts=given_up[:1] if not erase else given_up[1:])
    assert not history.world.path.exists()
    history.world.begun |= {f"r{n}": (history.people[n],) for n in range(3)}
    assert restore(made, history.world.path, receipts=[history.written])["replayed"] == 4
    history.world.settle()
    assert history.world.seq > max(receipt["ledger"]["seq"] for receipt in history.receipts)


def test_without_the_outer_anchor_it_takes_a_word(history) -> None:
    history.delete(history.people[0])
    made = history.backup()
    history.delete(history.people[1])
    history.lose()
    anchor = outside(history.world.path, "anchor")
    for spoil, says in ((anchor.unlink, "is missing, which knows"), (lambda: anchor.write_bytes(b""), "is damaged")):
        spoil()
        with pytest.raises(StoreError, match=f"{says}.* --without-anchor"):
            restore(made, history.world.path)
    restore(made, history.world.path, receipts=[history.written], without_anchor=True)
    history.world.settle()


def test_without_anchor_and_some_receipts_a_slice_is_dirty_all_the_same(history) -> None:
    """The second receipt names no slice: the first, which is lost, had made it dirty."""
    made = history.backup()
    cell = history.world.cells[history.people[0]]
    two = [person for person in history.people if history.world.cells[person] == cell][:2]
    for person in two:
        history.delete(person)
    assert history.receipts[1]["ledger"]["dirty"] == []
    history.lose()
    outside(history.world.path, "anchor").unlink()
    restore(made, history.world.path, receipts=[history.written / "r1.json"], without_anchor=True)
    with StoreFolder(history.world.path) as folder:
        assert folder.ledger.dirty() == {cell}


def give_up(history: History) -> None:
    """Note that the operator lets go of all requests so far."""
    history.world.begun.clear()
    history.world.acknowledged.clear()
    history.world.seq = 0
