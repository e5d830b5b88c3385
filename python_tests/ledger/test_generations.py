"""Healing and growth in the books: what may follow what, who is where afterwards, and that all of it is replayed."""

import json

import pytest

from s3t_ext.ledger import Holding, Ledger, LedgerError, log
from s3t_ext.ledger.database import now
from s3t_ext.ledger.generation import listed as log_slices

from .conftest import CELLS, SUBJECTS, UNKNOWN, fill

NEW = {(2, 0): "a" * 64, (2, 1): "b" * 64}


def note(applied):
    return {"seq": applied.seq}


def gone(ledger, subjects, request="a"):
    """Delete and erase."""
    ledger.delete(request, subjects, note)
    ledger.mark_erased([row.seq for row in ledger.unerased()])


def told(ledger):
    """List all that an instance knows: what a reopened one must know too."""
    shards = range(ledger.shards)
    found = ledger.slices(), ledger.dirty(), ledger.deleted(), ledger.generations, [ledger.gone(s) for s in shards]
    return *found, ledger.seq, ledger.fence.read(), [ledger.hit([name]) for name in SUBJECTS], ledger.given_up()


@pytest.fixture
def replayed(path):
    """Give a ledger that is compared with one opened anew at the end."""
    with fill(path) as ledger:
        yield ledger
        known = told(ledger)
    with Ledger.open(path) as again:
        assert told(again) == known


def test_a_healed_slice_is_clean_and_another(replayed):
    gone(replayed, SUBJECTS[:1])
    assert replayed.slices()[0, 0] is None
    epoch = replayed.fence.read()
    assert replayed.heal({(0, 0): "f" * 64}) == frozenset(SUBJECTS[:1]), "who was dropped"
    assert (replayed.slices()[0, 0], replayed.dirty()) == ("f" * 64, frozenset())
    assert replayed.fence.read() > epoch, "the counter only grows"
    assert replayed.find(SUBJECTS[0]), "who was held is known for ever"
    assert replayed.gone(0) == frozenset(SUBJECTS[:1])


def test_nothing_is_healed_while_a_request_is_not_erased(replayed):
    gone(replayed, SUBJECTS[:1])
    replayed.delete("b", SUBJECTS[1:2], note)
    before = replayed.seq
    assert replayed.heal({(0, 0): "f" * 64}) is None
    assert (replayed.seq, replayed.dirty()) == (before, {(0, 0), (0, 1)})


def test_a_slice_is_healed_beside_requests_of_which_nothing_is_left_in_it(replayed):
    """They wait for another one; a request after them may have records in the digest."""
    waits = replayed.delete("a", [SUBJECTS[0], SUBJECTS[1]], note)["seq"]
    assert replayed.heal({(0, 0): "f" * 64}, [waits - 1]) is None
    later = replayed.delete("b", [SUBJECTS[2]], note)["seq"]
    assert replayed.heal({(0, 0): "f" * 64}, [waits]) is None
    assert replayed.healed() == 0
    assert replayed.heal({(0, 0): "f" * 64}, [waits, later]) == {SUBJECTS[0]}
    assert replayed.healed() == replayed.seq
    assert [row.state for row in replayed.requests()] == ["applied", "applied"]
    assert (0, 0) not in replayed.dirty()


def test_a_healing_beside_another_request_than_it_names_does_not_follow(path):
    with fill(path) as ledger:
        waits = ledger.delete("a", [SUBJECTS[0]], note)["seq"]
        body = {"slices": log_slices({(0, 0): "f" * 64}), "dropped": [], "pending": [waits + 1], "time": now()}
        with pytest.raises(LedgerError, match="a request is not erased yet"), ledger._database.transaction():
            ledger._database.append("healed", body)


def test_what_was_given_up_for_a_request_stays_with_it(replayed):
    seq = replayed.delete("a", [SUBJECTS[0], SUBJECTS[1]], note)["seq"]
    replayed.mark_erased([seq], {(0, 1): "missing"})
    replayed.certify([seq], {})
    (row,) = replayed.requests()
    assert (row.state, row.unseen) == ("certified", ((0, 1, "missing"),))
    replayed.heal({(0, 0): "f" * 64})
    assert replayed.requests()[0].unseen == row.unseen
    replayed.heal({(0, 1): "f" * 64})
    assert replayed.requests()[0].unseen == (), "it is back, and was looked into"


def test_a_slice_that_is_given_up_is_dirty_until_it_is_healed(replayed):
    """Subjects 0 and 4 share it, 1 and 5 the other one: who was erased before has nothing in it."""
    gone(replayed, SUBJECTS[:1])
    replayed.delete("b", SUBJECTS[1:2], note)
    epoch = replayed.fence.read()
    replayed.give_up({(0, 0): "missing", (0, 1): "damaged"}, ["node"])
    assert replayed.fence.read() > epoch, "services look"
    given = replayed.given_up()
    assert [(row.file, row.subjects, row.nodes) for row in given.values()] == [
        ("missing", 1, ("node",)), ("damaged", 2, ("node",)),
    ]  # fmt: skip
    assert replayed.dirty() == given.keys() == {(0, 0), (0, 1)}
    before = replayed.seq
    for cell in ((0, 0), (7, 0)):
        with pytest.raises(ValueError, match="wanted some that were not given up, got"):
            replayed.give_up({cell: "missing"}, [])
    assert replayed.seq == before
    seen = []
    replayed.delete("c", [SUBJECTS[4]], lambda applied: seen.append(applied) or note(applied))
    assert [place.cell for place in seen[0].already] == [], "a request counts after it too"
    replayed.mark_erased([row.seq for row in replayed.unerased()], {(0, 1): "damaged"})
    assert replayed.heal({(0, 0): "f" * 64}) == {SUBJECTS[0], SUBJECTS[4]}
    assert replayed.given_up().keys() == replayed.dirty() == {(0, 1)}
    replayed.give_up({(0, 0): "missing"}, [])
    assert replayed.dirty() == {(0, 0), (0, 1)}, "lost once more"


@pytest.mark.parametrize("cell", [(0, 1), (7, 0)])
def test_only_a_dirty_slice_is_healed(replayed, cell):
    gone(replayed, SUBJECTS[:1])
    before = replayed.seq
    with pytest.raises(ValueError, match="wanted dirty ones, got"):
        replayed.heal({(0, 0): "f" * 64, cell: "f" * 64})
    assert replayed.seq == before


def test_a_request_after_healing_hits_what_is_left(replayed):
    """Subjects 0 and 4 share a slice: one was dropped by the healing, the other one is in it."""
    gone(replayed, SUBJECTS[:1])
    replayed.heal({(0, 0): "f" * 64})
    seen = []
    replayed.delete("again", [SUBJECTS[0]], lambda applied: seen.append(applied) or note(applied))
    assert not replayed.dirty()
    assert [place.part for place in seen[0].already] == ["private"]
    gone(replayed, [SUBJECTS[0], SUBJECTS[4]], "both")
    assert replayed.dirty() == {(0, 0)}
    assert replayed.heal({(0, 0): "e" * 64}) == {SUBJECTS[4]}, "the other one was not there any more"


def test_new_shards_are_a_generation_of_their_own(replayed):
    holdings = [Holding(SUBJECTS[1], 2, 0), Holding(UNKNOWN, 2, 1)]
    assert not replayed.grow(NEW, holdings)
    assert [(g.number, g.first, g.shards) for g in replayed.generations] == [(0, 0, 2), (1, 2, 1)]
    assert replayed.shards == 3
    assert replayed.slices().items() >= NEW.items()
    assert replayed.hit([SUBJECTS[1]]) == {(0, 1), (2, 0)}
    gone(replayed, [SUBJECTS[1]])
    assert replayed.dirty() == {(0, 1), (2, 0)}
    assert SUBJECTS[1] in replayed.gone(0) & replayed.gone(2)


@pytest.mark.parametrize("cells", [[(1, 0), (1, 1)], [(3, 0)], [(2, 0), (4, 0)], []])
def test_new_shards_follow_those_that_there_are(replayed, cells):
    with pytest.raises(ValueError, match="wanted new shards from 2 on"):
        replayed.grow(dict.fromkeys(cells, "a" * 64), [])
    assert replayed.shards == 2


def test_the_deleted_do_not_come_with_new_records(replayed):
    gone(replayed, SUBJECTS[:1])
    before = replayed.seq
    assert replayed.grow(NEW, [Holding(SUBJECTS[0], 2, 0), Holding(UNKNOWN, 2, 1)]) == {SUBJECTS[0]}
    assert replayed.seq == before, "nothing was entered"
    assert not replayed.grow(NEW, [Holding(UNKNOWN, 2, 1)])
    assert SUBJECTS[0] in replayed.gone(2)


def test_who_is_readmitted_is_in_the_new_shards_alone(replayed):
    gone(replayed, SUBJECTS[:1])
    assert not replayed.grow(NEW, [Holding(SUBJECTS[0], 2, 0)], SUBJECTS[:1])
    assert SUBJECTS[0] not in replayed.deleted()
    assert (SUBJECTS[0] in replayed.gone(0), SUBJECTS[0] in replayed.gone(2)) == (True, False)
    assert replayed.heal({(0, 0): "f" * 64}) == {SUBJECTS[0]}, "they left that slice for ever"
    gone(replayed, SUBJECTS[:1], "again")
    assert replayed.dirty() == {(2, 0)}
    assert SUBJECTS[0] in replayed.deleted()


def test_readmission_is_of_the_deleted_and_erased(replayed):
    with pytest.raises(ValueError, match="was not deleted"):
        replayed.grow(NEW, [], [SUBJECTS[0]])
    replayed.delete("a", SUBJECTS[:1], note)
    with pytest.raises(ValueError, match="has a request that is not erased yet"):
        replayed.grow(NEW, [], [SUBJECTS[0]])
    assert replayed.shards == 2


def test_growth_needs_a_first_generation(path):
    with Ledger.create(path, {}) as ledger, pytest.raises(ValueError, match="the first generation is missing"):
        ledger.grow({(0, 0): "a" * 64}, [])


def test_the_index_is_held_against_the_digest_of_the_last_growth(path):
    with fill(path) as ledger:
        ledger.grow(NEW, [Holding(UNKNOWN, 2, 1)])
        ledger._database._db.execute("DELETE FROM holdings WHERE shard = 2")
    with pytest.raises(LedgerError, match="the index of subjects does not match its digest"):
        Ledger.open(path)


def test_services_are_told_of_each_node_once(replayed):
    replayed.trained(["n1", "n2"])
    before = replayed.fence.read()
    replayed.trained(["n2"])
    assert replayed.fence.read() == before
    replayed.trained(["n3", "n2"])
    assert replayed.fence.read() == before + 1
    assert json.loads(replayed._database.rows("SELECT body FROM events WHERE seq = ?", (replayed.seq,))[0][0])[
        "nodes"
    ] == ["n3"]


EVENTS = {
    "healed, nothing dirty": ("healed", {"slices": [[0, 0, "f" * 64]]}),
    "a second first generation": ("ingested", {"slices": [[2, 0, "a" * 64]], "holdings_sha256": "0" * 64}),
    "growth of a shard that is there": (
        "grown", {"slices": [[1, 0, "a" * 64]], "readmitted": [], "holdings_sha256": "0" * 64},
    ),
    "nodes that are none": ("trained", {"nodes": [7]}),
    "no slice given up": ("given up", {"slices": [[7, 0, "missing", 0]], "nodes": [], "time": "now"}),
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_an_event_that_does_not_follow_is_not_replayed(ledger, event):
    kind, body = event
    with ledger._database.reading() as state, pytest.raises(log.ChainError, match="does not follow"):
        state.add(log.Event(state.seq + 1, kind, body, bytes(32)))


def test_a_healing_over_a_pending_request_is_not_replayed(ledger):
    gone(ledger, SUBJECTS[:1])
    ledger.delete("b", SUBJECTS[1:2], note)
    body = {"slices": [[0, 0, "f" * 64]], "dropped": []}
    with ledger._database.reading() as state, pytest.raises(log.ChainError, match="a request is not erased yet"):
        state.add(log.Event(state.seq + 1, "healed", body, bytes(32)))


def test_two_processes_agree(ledger, path, spawn):
    other = spawn(
        """
ledger = Ledger.open(sys.argv[1])
for line in sys.stdin:
    print(sorted(ledger.dirty()), ledger.shards, flush=True)
""",
        path,
    )

    def ask():
        other.stdin.write("\n")
        other.stdin.flush()
        return other.stdout.readline().strip()

    assert ask() == "[] 2"
    gone(ledger, SUBJECTS[:1])
    assert ask() == "[(0, 0)] 2"
    ledger.heal({(0, 0): "f" * 64})
    ledger.grow(NEW, [])
    assert ask() == "[] 3"
    assert set(CELLS) <= ledger.slices().keys()


def test_nodes_trained_again_after_healing_are_told_of_again(replayed):
    replayed.trained(["node"])
    gone(replayed, SUBJECTS[:1])
    replayed.heal({(0, 0): "f" * 64})
    epoch = replayed.fence.read()
    replayed.trained(["node"])
    assert replayed.fence.read() > epoch
