"""The ledger's rules: what is dirty, who is found, which receipt is given."""

import sqlite3

import pytest

from s3t_ext.ledger import Holding, Ledger, LedgerError

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill


def note(applied):
    return {"seq": applied.seq, "request": applied.request_id}


def test_a_new_ledger(path):
    with Ledger.create(path, {"plan": [1]}) as ledger:
        assert (ledger.meta, ledger.ingested, ledger.slices(), ledger.seq) == ({"plan": [1]}, False, {}, 1)
        assert ledger.find(UNKNOWN) == []
        assert ledger.fence.read() == 1
        ledger.delete("early", [UNKNOWN], note)
        assert ledger.deleted() == {UNKNOWN}
        with pytest.raises(ValueError, match=f"subject {UNKNOWN} was deleted"):
            ledger.ingest({(0, 0): "0" * 64}, [Holding(UNKNOWN, 0, 0)])
        assert not ledger.ingested


def test_holdings_are_found(ledger):
    assert ledger.find(SUBJECTS[1]) == [Holding(SUBJECTS[1], 0, 1)]
    assert ledger.find(SUBJECTS[0]) == [Holding(SUBJECTS[0], 0, 0), Holding(SUBJECTS[0], None, None, "public")]
    assert ledger.find(UNKNOWN) == []
    with pytest.raises(ValueError, match="has been ingested"):
        ledger.ingest({}, [])


def test_a_deletion_makes_its_slices_dirty(ledger):
    seen = []
    before = ledger.slices()
    ledger.delete("r1", [SUBJECTS[1], UNKNOWN], lambda applied: seen.append(applied) or note(applied))
    assert ledger.dirty() == {(0, 1)}
    assert ledger.slices() == {**before, (0, 1): None}
    assert ledger.deleted() == {SUBJECTS[1], UNKNOWN}
    (applied,) = seen
    assert (applied.seq, applied.request_id, applied.subjects) == (3, "r1", (SUBJECTS[1], UNKNOWN))
    assert applied.holdings == {SUBJECTS[1]: (Holding(SUBJECTS[1], 0, 1),), UNKNOWN: ()}
    assert (applied.newly_dirty, applied.dirty, applied.already) == ({(0, 1)}, {(0, 1)}, frozenset())
    assert (applied.before, applied.after) == (before, ledger.slices())


def test_a_held_subject_dirties_its_slice_once(ledger):
    seen = []
    for request, subject in (("a", SUBJECTS[1]), ("b", SUBJECTS[5]), ("c", SUBJECTS[1]), ("d", "e" * 64)):
        ledger.delete(request, [subject], lambda applied: seen.append(applied) or note(applied))
    assert [applied.newly_dirty for applied in seen] == [{(0, 1)}, set(), set(), set()]
    assert [bool(applied.already) for applied in seen] == [False, False, True, False]
    assert ledger.dirty() == {(0, 1)}


def test_the_state_depends_on_the_set_of_requests(tmp_path):
    states = set()
    for number, order in enumerate([(0, 1, 4), (4, 0, 1), (1, 4, 0)]):
        (tmp_path / str(number)).mkdir()
        with fill(tmp_path / str(number) / "ledger.db") as ledger:
            for subject in order:
                ledger.delete(f"r{subject}", [SUBJECTS[subject]], note)
            states.add((ledger.dirty(), ledger.deleted(), tuple(sorted(ledger.slices().items(), key=str))))
    assert len(states) == 1


def test_the_same_request_gives_the_same_receipt(ledger, path):
    first = ledger.delete("r1", SUBJECTS[:2], note)
    assert ledger.delete("r1", [SUBJECTS[1], SUBJECTS[0], SUBJECTS[1]], None) == first
    assert ledger.receipt("r1") == first == {"seq": 3, "request": "r1"}
    assert ledger.delete("r2", SUBJECTS[:2], note) == {"seq": 4, "request": "r2"}
    with pytest.raises(ValueError, match="'r1' was used for other subjects"):
        ledger.delete("r1", SUBJECTS[:1], note)
    ledger.close()
    with Ledger.open(path) as again:
        assert again.delete("r1", SUBJECTS[:2], None) == first
        assert again.seq == 4
        assert again.receipt("nosuch") is None


def test_a_failed_receipt_deletes_nothing(ledger):
    with pytest.raises(KeyError):
        ledger.delete("r1", [SUBJECTS[0]], lambda _: {}["missing"])
    with pytest.raises(ValueError, match="plain, finite JSON"):
        ledger.delete("r1", [SUBJECTS[0]], lambda _: {"depth": float("nan")})
    with pytest.raises(OSError, match="elsewhere"):
        ledger.delete("r1", [SUBJECTS[0]], lambda _: (_ for _ in ()).throw(OSError("elsewhere")))
    assert (ledger.dirty(), ledger.deleted(), ledger.requests(), ledger.seq) == (set(), set(), [], 2)
    assert ledger.delete("r1", [SUBJECTS[0]], note) == {"seq": 3, "request": "r1"}


def test_states_go_forward(ledger):
    for name in "abc":
        ledger.delete(name, [SUBJECTS[0]], note)
    assert [(row.seq, row.request_id, row.state) for row in ledger.unerased()] == [
        (3, "a", "applied"), (4, "b", "applied"), (5, "c", "applied")
    ]  # fmt: skip
    ledger.mark_erased([4, 3])
    ledger.mark_erased([3])
    assert [row.state for row in ledger.requests()] == ["erased", "erased", "applied"]
    assert [row.seq for row in ledger.unerased()] == [5]
    assert ledger.seq == 6
    assert ledger.delete("a", [SUBJECTS[0]], note) == {"seq": 3, "request": "a"}
    assert ledger.requests()[0].state == "erased"
    with pytest.raises(ValueError, match=r"no request has the event \[2\]"):
        ledger.mark_erased([2, 5])


def test_two_instances_agree(ledger, path):
    with Ledger.open(path) as other:
        ledger.delete("a", [SUBJECTS[0]], note)
        assert other.dirty() == {(0, 0)}
        assert other.fence.read() == other.seq == 3
        assert other.delete("a", [SUBJECTS[0]], None) == ledger.receipt("a")
        other.delete("b", [SUBJECTS[1]], note)
        assert ledger.dirty() == {(0, 0), (0, 1)}


def test_the_epoch_rises_after_the_commit_and_before_the_answer(ledger, path, monkeypatch):
    seen = []

    def raise_to(epoch):
        with sqlite3.connect(path) as other:
            seen.append((epoch, other.execute("SELECT max(seq) FROM events").fetchone()[0]))
        raise OSError(5, "no epoch")

    monkeypatch.setattr(ledger.fence, "raise_to", raise_to)
    with pytest.raises(LedgerError, match="no epoch"):
        ledger.delete("a", [SUBJECTS[0]], note)
    assert seen == [(3, 3)]
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="nothing more is acknowledged; mend its cause and open the ledger again"):
        ledger.delete("a", [SUBJECTS[0]], note)
    with Ledger.open(path) as again:
        assert again.fence.read() == 3
        assert again.delete("a", [SUBJECTS[0]], None) == {"seq": 3, "request": "a"}


def test_durability_settings(ledger):
    pragmas = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "busy_timeout")
    values = [ledger._database.rows(f"PRAGMA {name}")[0][0] for name in pragmas]
    assert values == ["wal", 2, 1, 1, 30_000]


@pytest.mark.parametrize(
    ("request_id", "subjects", "wanted"),
    [("", SUBJECTS, "request_id"), ("r", [], "subjects: wanted at least one"), ("r", ["ann"], "64 hex digits")],
)
def test_malformed_requests_are_refused(ledger, request_id, subjects, wanted):
    with pytest.raises(ValueError, match=wanted):
        ledger.delete(request_id, subjects, note)


def test_malformed_holdings_are_refused(path):
    with Ledger.create(path, {}) as ledger:
        for holding in (
            Holding(SUBJECTS[0], 9, 9),
            Holding(SUBJECTS[0], None, None),
            Holding(SUBJECTS[0], 0, 0, "public"),
            Holding(SUBJECTS[0], None, None, ""),
            Holding("ann", 0, 0),
        ):
            with pytest.raises(ValueError, match=r"holdings|subject"):
                ledger.ingest(dict.fromkeys(CELLS, "0" * 64), [holding])
        assert not ledger.ingested
