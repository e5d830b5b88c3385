"""Which nodes answer and which are held: pure functions, against brute force over small plans."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import build
from s3t_ext.system.serving.paths import by_shard, maximal, rooms, to_hold, weighted

PLANS = [build("subsets", 3), build("rotation", 3, 3), build("rotation", 4, 4), build("sisa", 3), build("subsets", 4)]


def live(tree, dirty: set[tuple[int, int]], shards: int = 2) -> set:
    return {(s, p) for s in range(shards) for p in tree.nodes if not any((s, k) in dirty for k in p)}


def best(nodes, shards: int = 2) -> list:
    paths = [sorted((p for s, p in nodes if s == shard), key=lambda p: (-len(p), p)) for shard in range(shards)]
    return [(shard, found[0]) for shard, found in enumerate(paths) if found]


def test_maximal_paths_are_those_that_nothing_continues() -> None:
    nodes = {(0, (0,)), (0, (0, 1)), (0, (2,)), (1, (1, 0)), (1, (2,)), (1, (2, 0)), (1, (2, 0, 1))}
    assert maximal(nodes) == [(0, (0, 1)), (0, (2,)), (1, (2, 0, 1))], "(1, (1, 0)) lacks its parent"


def test_shards_weigh_by_depth_and_their_paths_share_it() -> None:
    served = weighted([(0, (0, 1)), (0, (2,)), (3, (2, 0, 1))])
    assert [p.weight for p in served] == pytest.approx([2 / 5 * 2 / 3, 2 / 5 * 1 / 3, 3 / 5])
    assert by_shard(served, 4) == (2, 0, 0, 3)
    assert [p.weight for p in weighted([(0, (0, 1)), (1, (2,))])] == [2 / 3, 1 / 3], "one path a shard: exactly D / sum"
    assert weighted([]) == ()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_memory_holds_what_answers_then_what_is_likeliest_next(data) -> None:
    tree = data.draw(st.sampled_from(PLANS))
    cells = list(itertools.product(range(2), range(tree.slices)))
    nodes = live(tree, data.draw(st.sets(st.sampled_from(cells), max_size=4)))
    stack, prior = data.draw(st.booleans()), data.draw(st.sampled_from([None, range(tree.slices)]))
    room = data.draw(st.lists(st.integers(0, 9), min_size=1 if stack else tree.slices, max_size=tree.slices))
    room = [sum(room)] if stack else (room + [0] * tree.slices)[: tree.slices]
    answering = best(nodes)
    chosen = to_hold(nodes, answering, room, prior)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= nodes
    for n, (shard, path) in enumerate(chosen):
        assert len(path) == 1 or (shard, path[:-1]) in chosen[:n], "each after its ancestors"
    columns = [sum(min(len(p), len(room)) == c + 1 for _, p in chosen) for c in range(len(room))]
    assert all(used <= there for used, there in zip(columns, room, strict=True))
    needed = {(s, p[:d]) for s, p in answering for d in range(1, len(p) + 1)}
    if len(chosen) < len(nodes):
        for d in range(1, 1 + max((len(p) for _, p in nodes), default=0)):
            column = columns[min(d, len(room)) - 1]
            left = [n for n in nodes - set(chosen) if len(n[1]) == d and (d == 1 or (n[0], n[1][:-1]) in chosen)]
            assert not left or column == room[min(d, len(room)) - 1], "nothing is left out while there is room"
    if set(chosen) >= needed:
        rest = [n for n in chosen if n not in needed]
        after = [set(best(live(tree, {(s, k)}) & nodes)) for s, k in cells]
        likely = {(s, p[:d]) for each in after for s, p in each for d in range(1, len(p) + 1)} - needed
        if room == [len(nodes)] or min(room) >= len(nodes):
            assert set(rest[: len(likely)]) == likely


def test_the_likeliest_deletion_comes_first() -> None:
    tree = build("subsets", 3)
    nodes = live(tree, set(), shards=1)
    for prior, gone in (((0.8, 0.1, 0.1), 0), ((0.1, 0.8, 0.1), 1), ((0.1, 0.1, 0.8), 2)):
        chosen = to_hold(nodes, best(nodes, 1), [5], prior)
        ready = max(len(path) for _, path in chosen if gone not in path)
        assert ready == 2, "after the likeliest deletion the ideal path is in memory"


def test_memory_is_shared_out_and_too_little_is_refused() -> None:
    assert rooms(None, [10, 10], [6, 4], [3, 3]) == [6, 4]
    assert rooms(60, [10, 10], [6, 4], [3, 3]) == [3, 3]
    assert rooms(85, [10, 10], [6, 4], [3, 3]) == [4, 4]
    assert rooms(10**6, [10, 10], [6, 4], [3, 3]) == [6, 4]
    assert rooms(100, [30, 1], [9, 9], [1, 1]) == [3, 9]
    with pytest.raises(ValueError, match=r"memory: expected at least 60 bytes, for the paths that answer .*, got 59"):
        rooms(59, [10, 10], [6, 4], [3, 3])
