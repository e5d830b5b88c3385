"""The anchor: a ledger that lost its tail or got another one is refused, one whose writer was killed goes on.

The counts are printed (`pytest -rP`). S3T_LONG=1 visits every byte.
"""

import errno
import json
import os
import random
import shutil
import sqlite3

import pytest

from s3t_ext.ledger import Holding, Ledger, LedgerError
from s3t_ext.ledger.anchor import Anchor
from s3t_ext.store.files import sweep, write_checked

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill

LONG = bool(os.environ.get("S3T_LONG"))
RESTORE = "nothing is served: bring back the newest state by `s3t restore`"


def note(applied):
    return {"seq": applied.seq}


def answers(path):
    """Return all that a ledger answers."""
    with Ledger.open(path) as ledger:
        requests = ledger.requests()
        found = [ledger.find(subject) for subject in (*SUBJECTS, UNKNOWN)]
        held = ledger.generations, ledger.deleted(), [ledger.gone(shard) for shard in range(ledger.shards)]
        return ledger.slices(), requests, found, [ledger.receipt(row.request_id) for row in requests], held


@pytest.fixture
def closed(path):
    """A ledger at rest with two requests, whose epoch file says nothing: the anchor alone must see what is done."""
    with fill(path) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
        ledger.delete("b", SUBJECTS[5:], note)
    silence(path)
    return path


def silence(path):
    path.with_name("epoch").write_bytes(bytes(8))


def anchored(path):
    return Anchor(path.with_name("anchor")).read()


def test_it_names_the_last_event(ledger, path):
    for number in range(3):
        ledger.delete(f"r{number}", [UNKNOWN], note)
        rows = ledger._database.rows("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")
        assert [(anchored(path).count, anchored(path).head)] == rows
    origin = ledger._database.rows("SELECT hash FROM events WHERE seq = 1")[0][0].hex()
    assert json.loads(path.with_name("anchor").read_bytes())["body"] == {
        "count": 5, "head": rows[0][1].hex(), "requests": 3, "origin": origin
    }  # fmt: skip


def test_it_is_durable_before_the_answer(ledger, path, monkeypatch):
    made = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _real=real, _name=name: (made.append(_name), _real(*args))[1])
    move = ledger._database.anchors.move

    def moving(end):
        with sqlite3.connect(path) as other:
            made.append((end.count, other.execute("SELECT max(seq) FROM events").fetchone()[0], ledger.fence.read()))
        move(end)

    monkeypatch.setattr(ledger._database.anchors, "move", moving)
    ledger.delete("a", SUBJECTS[:1], note)
    assert made == [(3, 3, 3), "write", "fsync", "replace", "fsync"]
    made.clear()
    ledger.delete("a", SUBJECTS[:1], None)
    assert made == [], "this writer has not failed"
    with Ledger.open(path) as other:
        other.delete("a", SUBJECTS[:1], None)
    assert made == ["fsync"], "the first writer may have failed at the folder"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_anchor_stops_acknowledgements(ledger, path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(LedgerError, match=r"cannot write .*anchor: Input/output error; check the disk and repeat"):
        ledger.delete("a", SUBJECTS[:1], note)
    monkeypatch.undo()
    for again in (lambda: ledger.delete("a", SUBJECTS[:1], note), lambda: ledger.receipt("a")):
        with pytest.raises(LedgerError, match="nothing more is acknowledged; mend its cause and open the ledger again"):
            again()
    assert ledger.dirty() == {CELLS[0]}, "in the log, in effect, not acknowledged"
    assert anchored(path).count == 2
    with Ledger.open(path) as reopened:
        assert anchored(path).count == 3
        assert reopened.delete("a", SUBJECTS[:1], None) == {"seq": 3}


def test_a_lost_or_replaced_tail_is_refused(closed):
    names = (closed.name, "anchor", "epoch")
    rival = closed.parent / "rival" / closed.name
    shutil.copytree(closed.parent, rival.parent)
    with Ledger.open(closed) as ledger:
        ledger.delete("c", SUBJECTS[1:2], note)
        ledger.delete("d", SUBJECTS[2:3], note)
    for number, wanted in enumerate(
        [
            "it ends at event 4, .*anchor says 6",
            "it ends at event 5, .*anchor says 6",
            "event 6 is not the one in .*anchor",
            "event 6 is not the one in .*anchor",
        ]
    ):
        shutil.copy(rival, closed)
        silence(closed)
        with pytest.raises(LedgerError, match=f"{wanted}; {RESTORE}"):
            Ledger.open(closed)
        with Ledger.open(rival) as ledger:
            ledger.delete(f"other-{number}", [UNKNOWN], note)
    for name in names:
        shutil.copy(rival.with_name(name), closed.with_name(name))
    assert answers(closed) == answers(rival), "all three from one place"


def test_a_tail_that_is_lost_below_an_open_ledger_is_seen(ledger, path):
    with Ledger.open(path) as other:
        other.delete("a", SUBJECTS[:1], note)
        with sqlite3.connect(path) as rival:
            rival.execute("DELETE FROM receipts")
            rival.execute("DELETE FROM events WHERE seq = 3")
        with pytest.raises(LedgerError, match=r"it ends at event 2, .*anchor says 3"):
            ledger.dirty()
    path.with_name("anchor").unlink()
    with pytest.raises(LedgerError, match="anchor is missing"), Ledger.open(path):
        pass


def test_a_ledger_ahead_is_brought_forward_once(closed):
    old, before = closed.with_name("anchor").read_bytes(), anchored(closed)
    with Ledger.open(closed) as ledger:
        ledger.delete("c", SUBJECTS[1:2], note)
    whole = answers(closed)
    closed.with_name("anchor").write_bytes(old)
    with Ledger.open(closed) as ledger, Ledger.open(closed) as other:
        assert anchored(closed).count == ledger.seq == other.seq == 5
        ledger._database.anchors.inner.move(before)
        assert ledger.dirty() == other.dirty(), "a reader between commit and anchor of a rival"
        assert other.receipt("c") == {"seq": 5}
        assert anchored(closed).count == 5, "a receipt is anchored before it leaves"
    assert answers(closed) == whole


def test_the_slower_of_two_writers_does_not_move_it_back(ledger, path, monkeypatch):
    """The rival's whole deletion falls between this one's commit and anchor."""
    publish = ledger._database._publish

    def late():
        with Ledger.open(path) as other:
            other.delete("fast", SUBJECTS[1:2], note)
        publish()

    monkeypatch.setattr(ledger._database, "_publish", late)
    assert ledger.delete("slow", SUBJECTS[:1], note) == {"seq": 3}
    assert anchored(path).count == ledger.fence.read() == 4


def test_the_stores_sweep_passes_it_by(ledger, path, monkeypatch):
    """Another process erases, under the store's lock, while this one is between write and rename."""
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (sweep(path.parent), replace(*names)))
    ledger.delete("a", SUBJECTS[:1], note)
    assert anchored(path).count == 3
    path.with_name("anchor.new").write_bytes(b"what a killed writer left" * 99)
    ledger.delete("b", SUBJECTS[:1], note)
    assert anchored(path).count == 4


def test_a_file_that_is_no_anchor(closed):
    for content in (b"", b"[]", b"\0" * 200):
        closed.with_name("anchor").write_bytes(content)
        with pytest.raises(LedgerError, match=f"anchor is damaged.*; {RESTORE}"):
            Ledger.open(closed)
    for body in ([], {}, {"count": "x", "head": "00"}, {"count": 4, "head": 7}):
        write_checked(closed.with_name("anchor"), body)
        with pytest.raises(LedgerError, match=f"is no anchor; {RESTORE}"):
            Ledger.open(closed)


# Every byte


def hurt(path, victim, cuts, flips):
    """Truncate a file at each place and flip each bit, one at a time: refused, or without any effect."""
    whole, seen = answers(path), {"cut": 0, "cut refused": 0, "flip": 0, "flip refused": 0}
    held = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    data = held[victim]
    cases = [("cut", data[:size]) for size in cuts(len(data))]
    for index, bit in flips(len(data)):
        cases.append(("flip", data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]))
    for kind, content in cases:
        for entry in path.parent.iterdir():
            if entry not in held:
                entry.unlink()
        for entry, old in held.items():
            entry.write_bytes(content if entry == victim else old)
        seen[kind] += 1
        try:
            assert answers(path) == whole, (kind, len(content))
        except LedgerError:
            seen[f"{kind} refused"] += 1
    print(f"{victim.name}, {len(data)} bytes: {seen}")
    return seen


def test_an_anchor_hurt_at_any_byte_is_refused(closed):
    bits = 8 if LONG else 1
    seen = hurt(
        closed,
        closed.with_name("anchor"),
        range,
        lambda size: [(index, (index + bit) % 8) for index in range(size) for bit in range(bits)],
    )
    assert seen["cut refused"] == seen["cut"] > 100
    assert seen["flip refused"] == seen["flip"] == bits * seen["cut"]


def test_a_ledger_hurt_at_any_byte_is_refused_or_unchanged(closed):
    step, chance = 1 if LONG else 64, random.Random(3)
    seen = hurt(
        closed,
        closed,
        lambda size: range(0, size, step),
        lambda size: [(i + chance.randrange(step), chance.randrange(8)) for i in range(0, size - step + 1, step)],
    )
    assert seen["cut refused"] == seen["cut"] > 200
    assert seen["flip refused"] > 20


def test_a_healed_and_grown_ledger_hurt_at_any_byte_is_refused_or_unchanged(path):
    with fill(path) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
        ledger.mark_erased([3])
        ledger.heal({CELLS[0]: "f" * 64})
        ledger.trained(["n" * 64])
        ledger.grow({(2, 0): "a" * 64, (2, 1): "b" * 64}, [Holding(SUBJECTS[0], 2, 1)], SUBJECTS[:1])
        ledger.delete("b", SUBJECTS[:1], note)
    silence(path)
    step, chance = 1 if LONG else 64, random.Random(5)
    seen = hurt(
        path,
        path,
        lambda size: range(0, size, step),
        lambda size: [(i + chance.randrange(step), chance.randrange(8)) for i in range(0, size - step + 1, step)],
    )
    assert seen["cut refused"] == seen["cut"] > 200
    assert seen["flip refused"] > 20


def test_a_write_ahead_log_hurt_anywhere_hides_no_deletion(closed, tmp_path):
    step, chance = 1 if LONG else 128, random.Random(4)
    with Ledger.open(closed) as ledger:
        ledger.delete("c", SUBJECTS[1:2], note)
        ledger.delete("d", SUBJECTS[2:3], note)
        killed = tmp_path / "killed" / closed.name
        killed.parent.mkdir()
        for name in (closed.name, f"{closed.name}-wal", "anchor"):
            shutil.copy(closed.with_name(name), killed.with_name(name))
    silence(killed)
    whole = {entry.name: entry.read_bytes() for entry in killed.parent.iterdir()}
    answers(killed)
    for name, data in whole.items():
        killed.with_name(name).write_bytes(data)
    seen = hurt_log(killed, whole, step, chance)
    assert seen["refused"] > 200


def hurt_log(path, whole, step, chance):
    name, seen = f"{path.name}-wal", {"refused": 0, "unchanged": 0}
    log = whole[name]
    for index in range(0, len(log) - step + 1, step):
        at, bit = index + chance.randrange(step), chance.randrange(8)
        for content in (log[:at], log[:at] + bytes([log[at] ^ 1 << bit]) + log[at + 1 :]):
            path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
            for file, data in whole.items():
                path.with_name(file).write_bytes(content if file == name else data)
            try:
                with Ledger.open(path) as ledger:
                    assert ledger.dirty() == {CELLS[0], *CELLS[1:3]}, at
                    assert len(ledger.requests()) == 4, at
                seen["unchanged"] += 1
            except LedgerError:
                seen["refused"] += 1
    print(f"{name}, {len(log)} bytes: {seen}")
    return seen
