"""The anchor outside the store's folder: an older copy of the folder is refused, whatever is in it."""

import shutil
import sqlite3

import pytest

from s3t_ext.ledger import Holding, Ledger, LedgerError
from s3t_ext.ledger.anchor import Anchor

from .conftest import CELLS, SUBJECTS, UNKNOWN


def note(applied):
    return {"seq": applied.seq}


@pytest.fixture
def folder(tmp_path):
    """A ledger in a folder of its own, with an outer anchor beside it."""
    (tmp_path / "store").mkdir()
    with make(tmp_path / "store") as ledger:
        ledger.ingest(dict.fromkeys(CELLS, "0" * 64), [Holding(SUBJECTS[i], *CELLS[i % 4]) for i in range(6)])
    return tmp_path / "store"


def make(folder, create=Ledger.create, **more):
    return create(folder / "ledger.db", {}, outer=folder.with_name("store.anchor"))


def start(folder):
    return Ledger.open(folder / "ledger.db", folder.with_name("store.anchor"))


def outer(folder):
    return Anchor(folder.with_name("store.anchor")).read()


def test_it_moves_with_the_log_from_the_first_event_on(folder):
    with start(folder) as ledger:
        assert (outer(folder).count, outer(folder).requests) == (2, 0)
        ledger.export("copy", "backup", [], [])
        assert (outer(folder).count, outer(folder).requests) == (3, 0)
        ledger.delete("a", SUBJECTS[:1], note)
        assert (outer(folder).count, outer(folder).requests) == (4, 1)
        ledger.mark_erased([4])
        assert outer(folder) == Anchor(folder / "anchor").read()
        assert (outer(folder).count, outer(folder).requests) == (5, 1)


def test_without_it_nothing_opens_not_even_before_the_first_request(folder):
    folder.with_name("store.anchor").unlink()
    with pytest.raises(LedgerError, match=r"store.anchor is missing"):
        start(folder)


def test_no_ledger_is_made_at_the_anchor_of_another(folder, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(LedgerError, match=r"store.anchor is the anchor of another ledger"):
        Ledger.create(tmp_path / "new" / "ledger.db", {}, outer=folder.with_name("store.anchor"))
    assert outer(folder).count == 2
    start(folder).close()


def test_an_older_copy_of_the_folder_is_refused(folder, tmp_path):
    copies = [tmp_path / "at first", tmp_path / "later"]
    shutil.copytree(folder, copies[0])
    with start(folder) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
    shutil.copytree(folder, copies[1])
    with start(folder) as ledger:
        ledger.delete("b", SUBJECTS[1:2], note)
    for copy, end in zip(copies, (2, 3)):
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        with pytest.raises(LedgerError, match=rf"it ends at event {end}, .*store.anchor says 4; .* `s3t restore`"):
            start(folder)


def test_an_older_copy_below_an_open_ledger_is_refused(folder, tmp_path):
    """Every advance looks, and a copy made at rest brings the inner anchor and the epoch along."""
    old = Anchor(folder / "anchor").read()
    with start(folder) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
        ledger._database.anchors.outer.move(type(old)(9, old.head, 4, old.origin))
        with pytest.raises(LedgerError, match=r"it ends at event 3, .*store.anchor says 9"):
            ledger.dirty()
        with pytest.raises(LedgerError, match="nothing more is acknowledged"):
            ledger.delete("b", SUBJECTS[:1], note)


def test_another_history_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fork" / "store")
    shutil.copy(folder.with_name("store.anchor"), tmp_path / "fork" / "store.anchor")
    fork = tmp_path / "fork" / "store"
    for place in (folder, fork):
        with start(place) as ledger:
            ledger.delete(f"by {place}", SUBJECTS[:1], note)
    shutil.rmtree(folder)
    shutil.copytree(fork, folder)
    with pytest.raises(LedgerError, match=r"event 3 is not the one in .*store.anchor"):
        start(folder)


def test_the_anchor_of_another_ledger_is_refused(folder, tmp_path):
    other = tmp_path / "other" / "store"
    other.mkdir(parents=True)
    with make(other) as ledger:
        ledger.delete("a", [UNKNOWN], note)
    shutil.copy(other.with_name("store.anchor"), folder.with_name("store.anchor"))
    with pytest.raises(LedgerError, match=r"store.anchor is the anchor of another ledger"):
        start(folder)


def test_a_missing_one_is_refused_once_there_were_requests(folder):
    with start(folder) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
        folder.with_name("store.anchor").unlink()
        wanted = r"store.anchor is missing, .*put it there \(a store is moved together with it\)"
        with pytest.raises(LedgerError, match=wanted):
            ledger.dirty()
    with pytest.raises(LedgerError, match=wanted):
        start(folder)


@pytest.mark.parametrize("victim", ["outer", "inner"])
def test_a_writer_that_ends_between_commit_and_anchors_locks_nobody_out(folder, monkeypatch, victim):
    def fail(_):
        raise LedgerError("killed")

    for name, subject in (("a", SUBJECTS[0]), ("b", SUBJECTS[1])):
        with start(folder) as ledger:
            monkeypatch.setattr(getattr(ledger._database.anchors, victim), "move", fail)
            with pytest.raises(LedgerError, match="killed"):
                ledger.delete(name, [subject], note)
        with start(folder) as ledger:
            assert (outer(folder).count, outer(folder).requests) == (ledger.seq, len(ledger.requests()))
            assert ledger.receipt(name) is not None


def test_the_outer_one_is_durable_first_and_before_the_answer(folder, monkeypatch):
    made = []
    real = Anchor.move

    def move(anchor, end):
        with sqlite3.connect(folder / "ledger.db") as db:
            made.append((anchor.path.name, end.count, db.execute("SELECT max(seq) FROM events").fetchone()[0]))
        real(anchor, end)

    monkeypatch.setattr(Anchor, "move", move)
    with start(folder) as ledger:
        ledger.delete("a", SUBJECTS[:1], note)
        assert made == [("store.anchor", 3, 3), ("anchor", 3, 3)]
    made.clear()
    with start(folder) as ledger:
        ledger.receipt("a")
        assert made == [("store.anchor", 3, 3), ("anchor", 3, 3)], "a receipt that is shown again is anchored as well"


def test_one_that_cannot_be_written_stops_acknowledgements(folder, monkeypatch):
    with start(folder) as ledger:
        folder.with_name("store.anchor.new").mkdir()
        with pytest.raises(LedgerError, match=r"cannot write .*store.anchor"):
            ledger.delete("a", SUBJECTS[:1], note)
        folder.with_name("store.anchor.new").rmdir()
        with pytest.raises(LedgerError, match="open the ledger again"):
            ledger.delete("a", SUBJECTS[:1], note)
    with start(folder) as ledger:
        assert ledger.delete("a", SUBJECTS[:1], None) == {"seq": 3}
