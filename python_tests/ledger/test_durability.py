"""The ledger under kills, flips, full disks and rivals: what was acknowledged is there, or the ledger says so."""

import random
import shutil
import signal
import sqlite3
import time

import pytest

from s3t_ext.ledger import Ledger, LedgerError

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill

DELETE_FOR_EVER = """
with Ledger.open(sys.argv[1]) as ledger:
    for number in itertools.count():
        name = f"{sys.argv[2]}-{number}"
        receipt = ledger.delete(name, [f"{number:064x}"], lambda applied: {"seq": applied.seq})
        print(name, receipt["seq"], flush=True)
"""
DELETE_SHARED = """
sys.stdin.readline()
with Ledger.open(sys.argv[1]) as ledger:
    for number in range(40):
        for name in (f"shared-{number}", f"{sys.argv[2]}-{number}"):
            receipt = ledger.delete(name, [f"{number:064x}"], lambda applied: {"by": sys.argv[2], "seq": applied.seq})
            print(name, receipt["by"], receipt["seq"])
"""


def note(applied):
    return {"seq": applied.seq}


def everything(path):
    """Return all that a ledger answers."""
    with Ledger.open(path) as ledger:
        return (
            ledger.meta,
            ledger.slices(),
            ledger.dirty(),
            ledger.deleted(),
            ledger.requests(),
            [ledger.find(subject) for subject in (*SUBJECTS, UNKNOWN, "e" * 64)],
            [ledger.receipt(row.request_id) for row in ledger.requests()],
        )


def test_a_checkpoint_that_fails_takes_no_patience_away(ledger):
    """Another process at work makes it fail; the next write waits for that one again."""
    database = ledger._database
    whole, refused = database._db, []

    class Busy:
        def execute(self, query, *values):
            if "wal_checkpoint" in query:
                refused.append(query)
                raise sqlite3.OperationalError("database table is locked")
            return whole.execute(query, *values)

    database._db = Busy()
    with pytest.raises(LedgerError, match="locked"):
        database.checkpoint()
    database._db = whole
    assert refused
    assert whole.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


@pytest.fixture
def closed(path):
    """A ledger file at rest, with three requests, one of them erased."""
    with fill(path) as ledger:
        for name, subjects in (("a", SUBJECTS[:1]), ("b", SUBJECTS[4:]), ("c", [UNKNOWN])):
            ledger.delete(name, subjects, note)
        ledger.mark_erased([3])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["anchor", "epoch", "ledger.db"]
    return path


def test_kill_9_loses_nothing_acknowledged(path, spawn):
    fill(path).close()
    chance = random.Random(5)
    acknowledged = {}
    for run in range(20):
        child = spawn(DELETE_FOR_EVER, path, run)
        lines = [child.stdout.readline() for _ in range(chance.randrange(1, 8))]
        time.sleep(chance.uniform(0, 0.005))
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines(keepends=True)
        acknowledged |= {name: int(seq) for name, seq in (line.split() for line in lines if line.endswith("\n"))}
        with Ledger.open(path) as ledger:
            stored = {row.request_id: row.seq for row in ledger.requests()}
            assert acknowledged.items() <= stored.items()
            assert ledger.fence.read() == ledger.seq
            assert all(ledger.receipt(name) == {"seq": seq} for name, seq in acknowledged.items())
    assert len(acknowledged) >= 20


def test_two_processes_write_one_chain(path, spawn):
    fill(path).close()
    children = {name: spawn(DELETE_SHARED, path, name) for name in "xy"}
    for child in children.values():
        child.stdin.write("go\n")
        child.stdin.flush()
    printed = {name: child.communicate(timeout=300)[0].splitlines() for name, child in children.items()}
    with Ledger.open(path) as ledger:
        assert len(ledger.requests()) == 120
        assert ledger.seq == ledger.fence.read() == 122
        for lines in printed.values():
            assert len(lines) == 80
            for name, by, seq in map(str.split, lines):
                assert ledger.receipt(name) == {"by": by, "seq": int(seq)}


def test_flipped_bytes_are_seen_or_change_nothing(closed):
    whole, data = everything(closed), closed.read_bytes()
    chance = random.Random(11)
    full = [index for index, byte in enumerate(data) if byte]
    seen = 0
    for index in [*range(100), *chance.sample(full, 600), *chance.sample(range(len(data)), 100)]:
        with open(closed, "r+b") as file:
            file.seek(index)
            file.write(bytes([data[index] ^ 1 << chance.randrange(8)]))
        try:
            assert everything(closed) == whole, index
        except LedgerError:
            seen += 1
        closed.write_bytes(data)
    assert seen > 500
    assert everything(closed) == whole


def test_flipped_bytes_of_the_write_ahead_log_hide_no_deletion(ledger, path, tmp_path):
    ledger.delete("a", SUBJECTS[:1], note)
    killed = tmp_path / "killed" / path.name
    killed.parent.mkdir()
    names = [path.name, f"{path.name}-wal", "epoch", "anchor"]
    for name in names[:2]:
        ledger.delete(name, [UNKNOWN], note)
    held = {name: path.with_name(name).read_bytes() for name in names}
    size = len(held[names[1]])
    for index in [0, 8, 16, 24, *random.Random(2).sample(range(size), 60)]:
        for name, data in held.items():
            killed.with_name(name).write_bytes(data)
        with open(killed.with_name(names[1]), "r+b") as file:
            file.seek(index)
            file.write(bytes([held[names[1]][index] ^ 16]))
        try:
            with Ledger.open(killed) as copy:
                assert copy.deleted() == ledger.deleted()
        except LedgerError:
            pass
        killed.with_name(f"{path.name}-shm").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("DELETE FROM events WHERE seq = 4", "event 4 is missing"),
        (
            "UPDATE events SET body = (SELECT body FROM events WHERE seq = 5) WHERE seq = 4",
            "event 4 does not match the hash chain",
        ),
        ("DELETE FROM events WHERE seq = 6", "it ends at event 5, .*anchor says 6"),
        ("DELETE FROM holdings WHERE shard = 0", "the index of subjects does not match its digest"),
        ("DELETE FROM receipts", "the receipt of request 'a' does not match its event"),
        ("UPDATE receipts SET body = CAST('{}' AS BLOB)", "the receipt of request 'a' does not match"),
        ("CREATE TABLE more (x)", "is not a ledger, or is damaged"),
        ("PRAGMA user_version = 9", "has format 9, this version of s3t_ext reads format 2"),
    ],
)
def test_changed_rows_are_named(closed, change, wanted):
    db = sqlite3.connect(closed)
    db.execute(change)
    db.commit()
    db.close()
    with pytest.raises(LedgerError, match=wanted):
        everything(closed)


def test_a_log_that_changes_below_an_open_ledger_is_seen(ledger, path):
    ledger.delete("a", SUBJECTS[:1], note)
    with sqlite3.connect(path) as rival:
        rival.execute("UPDATE events SET hash = zeroblob(32) WHERE seq = 3")
    with pytest.raises(LedgerError, match="event 3 changed while the ledger was open; nothing is served: bring"):
        ledger.dirty()
    with pytest.raises(LedgerError, match="nothing more is acknowledged"):
        ledger.delete("b", SUBJECTS[:1], note)


def test_events_of_a_newer_version_are_refused(ledger, path):
    ledger._database.append("nosuch", {})
    with pytest.raises(LedgerError, match="event 3 is of the unknown kind 'nosuch', perhaps of a newer version"):
        ledger.dirty()
    with pytest.raises(LedgerError, match="unknown kind 'nosuch'"):
        Ledger.open(path)


def test_an_old_copy_is_not_taken_for_the_ledger(closed):
    old = closed.with_name("old.db")
    shutil.copy(closed, old)
    with Ledger.open(closed) as ledger:
        ledger.delete("d", SUBJECTS[2:3], note)
    shutil.copy(old, closed)
    with pytest.raises(LedgerError, match=r"it ends at event 6, .*anchor says 7; nothing is served: bring"):
        Ledger.open(closed)


def test_a_full_disk_acknowledges_nothing(ledger, path):
    ledger.delete("first", SUBJECTS[:1], note)
    pages = ledger._database.rows("PRAGMA page_count")[0][0]
    ledger._database.rows(f"PRAGMA max_page_count = {pages}")
    acknowledged = ["first"]

    def fill_up():
        for number in range(200):
            ledger.delete(f"r{number}", [UNKNOWN], lambda _: {"long": "x" * 500})
            acknowledged.append(f"r{number}")

    with pytest.raises(LedgerError, match=r"cannot write .*ledger\.db: database or disk is full; free some space"):
        fill_up()
    with pytest.raises(LedgerError, match="open the ledger again"):
        ledger.delete("later", [UNKNOWN], note)
    assert [row.request_id for row in ledger.requests()] == acknowledged
    ledger.close()
    with Ledger.open(path) as again:
        assert [row.request_id for row in again.requests()] == acknowledged
        assert again.dirty() == {CELLS[0]}
        again.delete("later", [UNKNOWN], note)


def test_a_read_only_database_acknowledges_nothing(ledger):
    ledger._database.rows("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="readonly database; make the folder writable"):
        ledger.delete("a", SUBJECTS[:1], note)
    assert (ledger.dirty(), ledger.requests()) == (set(), [])


def test_a_busy_ledger_can_be_tried_again(ledger, path):
    ledger._database.rows("PRAGMA busy_timeout = 20")
    rival = sqlite3.connect(path, isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="database is locked; another process is writing; wait for it or stop it"):
        ledger.delete("a", SUBJECTS[:1], note)
    rival.close()
    assert ledger.delete("a", SUBJECTS[:1], note) == {"seq": 3}


def test_files_that_are_no_ledger(tmp_path, path):
    with pytest.raises(LedgerError, match=r"cannot open .*epoch: No such file"):
        Ledger.open(path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(LedgerError, match=r"cannot create .*: Not a directory; check the path"):
        Ledger.create(tmp_path / "file" / "ledger.db", {})
    Ledger.create(path, {}).close()
    with pytest.raises(LedgerError, match=r"ledger\.db exists; open it"):
        Ledger.create(path, {})
    path.write_text("not a database, but long enough to have a header of its own" * 9)
    with pytest.raises(LedgerError, match="file is not a database; check the path, or restore"):
        Ledger.open(path)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="is not a ledger, or is damaged"):
        Ledger.open(path)


def test_a_failed_creation_leaves_nothing(tmp_path, path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3t_ext.store.files.sync_folder", fail)
    with pytest.raises(LedgerError, match="No space left on device; free some space and repeat"):
        Ledger.create(path, {})
    assert list(tmp_path.iterdir()) == []
