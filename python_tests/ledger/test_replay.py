"""Replaying receipts: a gap in the numbers stands only where an event names it, and every request must be there."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from s3t_ext.ledger import Ledger, LedgerError, receipts
from s3t_ext.ledger.anchor import Anchor
from s3t_ext.ledger.database import Database
from s3t_ext.ledger.replay import Copy, alone, last_epoch, read_anchor, settle

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill


def make(applied):
    return receipts.build(applied, [])


@pytest.fixture
def lost(path, tmp_path):
    """An old ledger, the receipts of three requests since, and where the newest one ended."""
    with fill(path) as ledger:
        ledger.delete("known", SUBJECTS[5:], make)
    old = tmp_path / "old.db"
    shutil.copy(path, old)
    with Ledger.open(path) as ledger:
        made = [ledger.delete(f"r{i}", [SUBJECTS[i]], make) for i in range(2)]
        ledger.mark_erased([4])
        made.append(ledger.delete("r2", [UNKNOWN], make))
    end = Anchor(path.with_name("anchor")).read()
    assert (end.count, end.requests) == (7, 4)
    shutil.copy(old, path)
    return path, made, end


def replayed(path, made, ends, epoch, folder):
    with closing(Copy(path, folder)) as copy:
        copy.replay(reversed(made), ends, epoch)
        end = copy.end
        copy.install(path)
    settle(path, path.with_name("outer"), end)
    return end


def test_numbers_jump_over_what_was_lost(lost, tmp_path):
    path, made, end = lost
    with closing(Copy(path, tmp_path / "copy")) as copy:
        assert not copy.holds(end)
        assert (copy.end.count, set(copy.requests)) == (3, {"known"})
    new = replayed(path, made, [end], 0, tmp_path / "again")
    assert (new.count, new.requests, new.origin) == (8, 4, end.origin)
    with Ledger.open(path, path.with_name("outer")) as ledger:
        assert [(row.seq, row.request_id, row.state) for row in ledger.requests()] == [
            (3, "known", "applied"), (4, "r0", "applied"), (5, "r1", "applied"), (6, "r2", "applied")
        ]  # fmt: skip
        assert [ledger.receipt(f"r{i}") for i in range(3)] == made
        assert ledger.dirty() == {CELLS[0], CELLS[1]}
        assert ledger.fence.read() == ledger.seq == 8
        ledger.mark_erased([3, 4])
        assert ledger.delete("next", [UNKNOWN], make)["ledger"]["seq"] == 10
    assert Anchor(path.with_name("outer")).read().count == 10
    for anchor in ("anchor", "outer"):
        Anchor(path.with_name(anchor)).path.unlink()
        Anchor(path.with_name(anchor)).move(end)
    with Ledger.open(path, path.with_name("outer")) as ledger:
        assert ledger.seq == 10, "an anchor at the end that was lost and made up for is no reason to refuse"


def test_the_epoch_is_passed_too(lost, tmp_path):
    path, made, end = lost
    assert replayed(path, made, [end], 90, tmp_path / "copy").count == 91


def test_the_numbers_of_receipts_are_passed_without_an_anchor(lost, tmp_path):
    """Else a request that comes later takes the number of one that was replayed, and is taken for it."""
    path, made, _ = lost
    with closing(Copy(path, tmp_path / "copy")) as copy:
        copy.replay(made, [], 0)
        assert copy.end.count == made[-1]["ledger"]["seq"] + 1 == 8


def test_an_incomplete_replay_is_no_ledger(lost, tmp_path):
    path, made, end = lost
    with closing(Copy(path, tmp_path / "copy")) as copy:
        with pytest.raises(LedgerError, match=r"event 8, 'restored', .* of 4 requests there were, 3 are there"):
            copy.replay(made[1:], [end], 0)
        with pytest.raises(LedgerError, match="of 4 requests there were"):
            Database(copy.path, copy._database.anchors)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("UPDATE events SET seq = 9 WHERE seq = 8", "it was written as event 8 after event 6"),
        ("UPDATE events SET seq = 7 WHERE seq = 8", "it was written as event 8 after event 6"),
        ("UPDATE events SET seq = 7 WHERE seq = 6", "event 6 is missing"),
        ("DELETE FROM events WHERE seq = 6", "event 8 does not match the hash chain"),
        ("DELETE FROM events WHERE seq = 8", "it ends at event 6, .* says 8"),
        ("UPDATE events SET body = CAST(replace(body, '\"count\":7', '\"count\":6') AS BLOB) WHERE seq = 8", "chain"),
    ],
)
def test_a_gap_stands_only_where_it_is_named(lost, tmp_path, change, wanted):
    path, made, end = lost
    replayed(path, made, [end], 0, tmp_path / "copy")
    with closing(sqlite3.connect(path)) as db:
        db.execute(change)
        db.commit()
    with pytest.raises(LedgerError, match=wanted):
        Ledger.open(path, path.with_name("outer"))


def test_a_copy_has_what_is_in_the_log_only(ledger, path, tmp_path):
    ledger.delete("a", SUBJECTS[:1], make)
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0
    with closing(Copy(path, tmp_path / "copy")) as copy:
        assert set(copy.requests) == {"a"}
    (tmp_path / "cut").write_bytes((tmp_path / "copy" / "ledger.sqlite").read_bytes()[:9000])
    with pytest.raises(LedgerError):
        Copy(tmp_path / "cut", tmp_path / "another")


def test_alone(path, tmp_path):
    with alone(tmp_path / "nosuch") as locked:
        assert locked is None
    with fill(path) as ledger:
        ledger.delete("a", SUBJECTS[:1], make)
        with pytest.raises(LedgerError, match="is in use by a service or another process"), alone(path):
            pass
    with alone(path) as locked:
        with closing(Copy(path, tmp_path / "copy", locked)) as copy:
            assert set(copy.requests) == {"a"}
            copy.install(path, locked)
        look = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('SELECT * FROM events')"
        looked = subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True)
        assert "database is locked" in looked.stderr, "a file that this process closes takes its locks along"
    assert not path.with_name(f"{path.name}-wal").exists()
    with Ledger.open(path) as ledger:
        assert ledger.seq == 3
    path.write_bytes(b"damaged" * 999)
    with alone(path) as locked:
        assert locked is None


def test_no_anchor_is_moved_back(ledger, path):
    outer, end = path.with_name("outer"), ledger._database._state.end()
    ledger.close()
    for moved in (outer, path.with_name("anchor")):
        Anchor(moved).move(replace(end, count=end.count + 1))
        with pytest.raises(LedgerError, match="says 3, the ledger ends at 2: repeat the restore"):
            settle(path, outer, end)
        assert Anchor(moved).read().count == 3
        moved.unlink()


def test_what_receipts_make_up_for(lost, tmp_path):
    """Of the events 4 to 7 the third says what is erased: the receipts count as what lies between, no more."""
    path, made, end = lost
    with closing(Copy(path, tmp_path / "copy")) as copy:
        assert [copy.missing(end, made[:n]) for n in range(4)] == [3, 2, 1, 0]
        assert copy.missing(end, [*made[1:], made[1]]) == 1
        assert copy.missing(end, [*made[1:], {"ledger": {"seq": 3}}]) == 1, "one is of an event before that"
        assert copy.missing(replace(end, count=6), made) == 1, "one is of an event after the end"
        chain = replace(end, count=5, requests=3, head=bytes.fromhex(receipts.head_after(made[1])))
        assert copy.missing(chain, made) == 0
        for other in (end.head, copy.end.head, bytes.fromhex(receipts.head_after(made[0]))):
            with pytest.raises(LedgerError, match="entries 4 to 5 are not all of the ledger that the anchor tells of"):
                copy.missing(replace(chain, head=other), made)


def test_what_is_damaged_beside_a_ledger_is_made_anew(ledger, path):
    outer, end = path.with_name("outer"), ledger._database._state.end()
    ledger.close()
    for content in (b"", b"damaged", bytes(7) + b"\xff"):
        for name in ("epoch", "anchor", "outer"):
            path.with_name(name).write_bytes(content)
        assert last_epoch(path) is read_anchor(outer) is None
        settle(path, outer, end)
        with Ledger.open(path, outer) as again:
            assert again.fence.read() == again.seq == 2
