"""States of a request, its deadline, exports, batches: what the ledger lets happen, and in which order."""

import itertools
import signal
import time
from datetime import datetime, timedelta, timezone

import pytest

from s3t_ext.ledger import Ledger, LedgerError, receipts

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill

STATES = ("received", "applied", "erased", "certified")
EVIDENCE = {"nodes": 3, "sample": "all"}


def note(applied):
    return {"seq": applied.seq}


def test_a_request_goes_its_way(ledger, path):
    ledger.delete("a", SUBJECTS[:1], note)
    assert states(ledger) == ["applied"], "received and applied in one transaction"
    ledger.mark_erased([3])
    ledger.certify([3], EVIDENCE)
    ledger.certify([3], {})
    assert states(ledger) == ["certified"]
    assert ledger.seq == 5, "a second time changes nothing"
    ledger.close()
    with Ledger.open(path) as again:
        assert again.requests()[0].evidence == EVIDENCE
        assert again.delete("a", SUBJECTS[:1], None) == {"seq": 3}


def states(ledger):
    return [request.state for request in ledger.requests()]


@pytest.mark.parametrize(("state", "to"), [("applied", "certified"), ("certified", "erased")])
def test_an_illegal_step_is_not_written(ledger, state, to):
    ledger.delete("a", SUBJECTS[:1], note)
    ledger.delete("b", SUBJECTS[1:2], note)
    if state == "certified":
        ledger.mark_erased([3])
        ledger.certify([3], EVIDENCE)
    before = ledger.seq, states(ledger)
    step = ledger.mark_erased if to == "erased" else lambda seqs: ledger.certify(seqs, EVIDENCE)
    only = STATES[STATES.index(to) - 1]
    with pytest.raises(ValueError, match=f"request 'a' is {state}: only one that is {only} becomes {to}"):
        step([3, 4])
    assert (ledger.seq, states(ledger)) == before
    with pytest.raises(ValueError, match=r"no request has the event \[2\]"):
        step([2])


def test_nothing_becomes_received_again(ledger):
    ledger.delete("a", SUBJECTS[:1], note)
    ledger.mark_erased([3])
    ledger.certify([3], EVIDENCE)
    for state in ("received", "nosuch"):
        with pytest.raises(ValueError, match=f"request 'a' is certified: none becomes {state}"):
            ledger.requests()[0].step(state)


@pytest.mark.parametrize("events", list(itertools.product(("deleted", "erased", "certified"), repeat=3)))
def test_an_illegal_log_is_not_read(ledger, path, events):
    """Whoever writes the chain anew by a program of their own."""
    body = {
        "request_id": "a",
        "subjects": [UNKNOWN],
        "dirty": [],
        "receipt_sha256": "",
        "received": "",
        "deadline": None,
    }
    reached = ""
    for event in events:
        more = {**body, "time": ""} if event == "deleted" else {"requests": [3], "evidence": {}, "time": ""}
        with ledger._database._write_lock():
            ledger._database.append(event, more)
        legal = {"": "deleted", "deleted": "erased", "erased": "certified"}.get(reached)
        if event != legal:
            for read in (ledger.requests, lambda: Ledger.open(path)):
                with pytest.raises(LedgerError, match=f"event .*, '{event}', does not follow from those before"):
                    read()
            return
        reached = event
    assert states(ledger) == ["certified"]


def test_a_request_is_overdue_until_it_is_erased(path):
    with Ledger.create(path, {"deadline_days": 30}) as ledger:
        ledger.ingest(dict.fromkeys(CELLS, "0" * 64), [])
        today = datetime.now(timezone.utc)
        for name, days in (("old", 31), ("young", 29)):
            received = (today - timedelta(days=days)).isoformat(timespec="milliseconds")
            made = ledger.delete(name, [UNKNOWN], lambda applied: receipts.build(applied, []), received)
            deadline = datetime.fromisoformat(made["deadline"])
            assert deadline - datetime.fromisoformat(received) == timedelta(days=30)
            assert (made["received"], deadline.utcoffset()) == (received, timedelta(0))
        assert [request.overdue() for request in ledger.requests()] == [True, False]
        ledger.mark_erased([3])
        assert [request.overdue() for request in ledger.requests()] == [False, False]


def test_a_receipt_lists_the_exports_with_a_slice_of_the_subject(ledger, path):
    ledger.export("one", "backup", ["b" * 64, "a" * 64], CELLS)
    ledger.export("two", "adapter", [], [CELLS[1], CELLS[2]])

    def exports(name, subject):
        made = ledger.delete(name, [subject], lambda applied: receipts.build(applied, []))
        return [(export["export"], export["kind"]) for export in made["exports"]]

    assert exports("a", SUBJECTS[1]) == [("one", "backup"), ("two", "adapter")]
    assert exports("b", SUBJECTS[0]) == [("one", "backup")]
    assert exports("c", UNKNOWN) == []
    ledger.export("three", "backup", [], [])
    assert exports("d", SUBJECTS[3]) == [("one", "backup")]
    with Ledger.open(path) as again:
        assert [export.export for export in again.exports()] == ["one", "two", "three"]
        assert again.exports()[0].nodes == ("a" * 64, "b" * 64)


KILLED = """
import os, signal
ledger = Ledger.open(sys.argv[1])
target, name = (ledger._database, sys.argv[2]) if sys.argv[2] != "acknowledge" else (ledger, "_stored")
real = getattr(target, name)
setattr(target, name, lambda *_: (sys.argv[3] == "after" and real(*_), os.kill(os.getpid(), signal.SIGKILL)))
ledger.delete("batch", sys.argv[4:], lambda applied: {"seq": applied.seq})
"""


@pytest.mark.parametrize(
    ("step", "when", "there"),
    [
        ("append", "before", False),
        ("append", "after", False),
        ("insert", "before", False),
        ("insert", "after", False),
        ("_publish", "before", True),
        ("_publish", "after", True),
    ],
)
def test_a_batch_that_is_killed_is_there_whole_or_not_at_all(path, spawn, step, when, there):
    fill(path).close()
    child = spawn(KILLED, path, step, when, *SUBJECTS[:3])
    assert child.wait(timeout=300) == -signal.SIGKILL
    with Ledger.open(path) as ledger:
        assert ledger.deleted() == (frozenset(SUBJECTS[:3]) if there else frozenset())
        assert ledger.dirty() == (frozenset(CELLS[:3]) if there else frozenset())
        assert (ledger.receipt("batch") is not None) == there
        assert ledger.delete("batch", SUBJECTS[:3], note) == {"seq": 3}


def test_the_log_is_empty_after_erasure_and_at_the_end(ledger, path):
    log = path.with_name(f"{path.name}-wal")
    ledger.delete("a", SUBJECTS[:1], note)
    assert log.stat().st_size > 0
    ledger.mark_erased([3])
    assert log.stat().st_size == 0
    with Ledger.open(path):
        ledger.delete("b", SUBJECTS[:1], note)
        ledger.close()
        assert log.stat().st_size == 0, "though another instance has it open"


def test_an_erasure_does_not_wait_for_readers(ledger, path, spawn):
    ledger.delete("a", SUBJECTS[:1], note)
    with Ledger.open(path) as other:
        other._database._db.execute("BEGIN")
        other.slices()
        ledger.delete("b", SUBJECTS[:1], note)
        start = time.perf_counter()
        ledger.mark_erased([3, 4])
        assert time.perf_counter() - start < 20, "the time to wait for a writer is 30 s"
        assert states(ledger) == ["erased", "erased"]
        assert ledger.delete("c", SUBJECTS[:1], note) == {"seq": 6}


def test_what_may_be_unsynced_is_in_the_file_before_it_is_anchored(closed_ahead, monkeypatch):
    """A log that was not synced is read from the system's cache, and acknowledged: it must be on the disk by then."""
    from s3t_ext.ledger.database import Database

    path, made = closed_ahead, []
    for name in ("checkpoint", "_publish"):
        real = getattr(Database, name)
        monkeypatch.setattr(
            Database, name, lambda self, *a, _r=real, _n=name, **k: (made.append(_n), _r(self, *a, **k))
        )
    with Ledger.open(path) as ledger:
        assert made == ["checkpoint", "_publish"]
        assert path.with_name(f"{path.name}-wal").stat().st_size == 0
        assert ledger.seq == 3


@pytest.fixture
def closed_ahead(path, spawn):
    """A ledger whose writer was killed between commit and anchor."""
    fill(path).close()
    assert spawn(KILLED, path, "_publish", "before", SUBJECTS[0]).wait(timeout=300) == -signal.SIGKILL
    return path
