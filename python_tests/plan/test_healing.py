"""Healing against a reference in exact fractions, against the simulator without training, and against hand cases."""

import functools
import itertools
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import STRATEGIES, StageTree, build
from s3t_ext.plan.healing import healing_order, simulate_healing
from s3t_ext.plan.simulate import simulate
from s3t_ext.plan.streams import Bursts, Independent, Replay, chunks


def next_node(tree, live):
    """Choose the most valuable missing node of the whole system, or None."""
    depth = [max(map(len, nodes), default=0) for nodes in live]
    hurt = [shard for shard, nodes in enumerate(live) if len(nodes) < tree.stages]
    if not hurt:
        return None
    shard = min(hurt, key=lambda shard: (depth[shard], shard))
    missing = [path for path in tree.nodes if path not in live[shard]]
    if depth[shard] == tree.depth:
        return shard, missing[0]
    ways = []
    for goal in missing:
        if len(goal) == depth[shard] + 1:
            way = [goal[:n] for n in range(1, len(goal) + 1) if goal[:n] not in live[shard]]
            ways.append((sum(map(len, way)), goal, way[0]))
    return shard, min(ways)[2]


def reference(tree, shards, rate, requests, burn_in):
    """Let time pass from event to event, in fractions; return mean depth, availability and share of live shards."""
    live = [set(tree.nodes) for _ in range(shards)]
    job, work, area = None, Fraction(0), [Fraction(0)] * 3
    for number, request in enumerate(requests):
        hit, slice_ = divmod(int(request), tree.slices)
        live[hit] = {path for path in live[hit] if slice_ not in path}
        if job and job[0] == hit and slice_ in job[1]:
            job = None
        left = Fraction(1)
        while left:
            if job is None and rate and (job := next_node(tree, live)):
                work = Fraction(len(job[1]))
            step = min(left, work / rate) if job else left
            depth = [max(map(len, nodes), default=0) for nodes in live]
            if number >= burn_in:
                alive = sum(d > 0 for d in depth)
                now = (Fraction(sum(depth), shards), alive == shards, Fraction(alive, shards))
                area = [total + state * step for total, state in zip(area, now)]
            left -= step
            if job and (work := work - step * rate) == 0:
                live[job[0]].add(job[1])
                job = None
    return [float(total / (len(requests) - burn_in)) for total in area]


build_once = functools.cache(build)  # some strategies search


def trees():
    """Draw trees of every strategy with a default, and custom ones with short and missing sequences."""
    listed = st.builds(build_once, st.sampled_from(sorted(STRATEGIES)), st.integers(1, 4))

    def custom(slices):
        path = st.permutations(range(slices)).flatmap(lambda p: st.integers(1, slices).map(lambda n: p[:n]))
        return st.lists(path, min_size=1, max_size=4).map(lambda paths: StageTree.from_sequences(slices, paths))

    return listed | st.integers(1, 4).flatmap(custom)


RATES = st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1, 3), Fraction(1), Fraction(5, 2), Fraction(12)])


@settings(deadline=None, max_examples=150)
@given(trees(), st.integers(1, 3), RATES, st.integers(0, 5), st.sampled_from([1, 4]), st.integers(0, 99))
def test_every_number_is_that_of_the_reference(tree, shards, rate, burn_in, size, seed):
    stream = Bursts(size)
    found = simulate_healing(
        tree, shards, float(rate), burn_in=burn_in, requests=25, repeats=4, seed=seed, stream=stream
    )
    ((_, _, blocks),) = chunks(stream, shards, tree.slices, 4, seed)
    read = []
    while sum(block.shape[1] for block in read) < burn_in + 25:
        read.append(next(blocks))
    for row, requests in enumerate(np.concatenate(read, axis=1)[:, : burn_in + 25]):
        wanted = reference(tree, shards, rate, requests, burn_in)
        assert [found.depth[row], found.available[row], found.live[row]] == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_without_training_it_is_the_simulator(strategy):
    tree, counted = build(strategy, 4), range(4, 12)
    stream = Independent((0.4, 0.3, 0.2, 0.1))
    found = simulate_healing(tree, 3, 0, burn_in=3, requests=8, repeats=500, seed=9, stream=stream)
    plain = simulate(tree, 3, repeats=500, seed=9, stream=stream, depth_after=counted)
    assert found.depth == pytest.approx(np.mean([plain.depths[after] for after in counted], axis=0), rel=1e-12)
    dead = np.array([plain.stops["first"] <= after for after in counted])
    assert found.available == pytest.approx(1 - dead.mean(axis=0), rel=1e-12)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_training_without_end_gives_full_depth(strategy):
    tree = build(strategy, 4)
    found = simulate_healing(tree, 3, 1e9, repeats=20).summary()
    assert found["depth"]["mean"] == pytest.approx(tree.depth, abs=1e-6)
    assert found["available"]["mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("slices", "history", "rate", "depth", "available"),
    [
        (1, [(0, 0)] * 4, 0.5, 0, 0),  # every hit finds the job half done, and it is lost
        (1, [(0, 0)] * 4, 1, 0, 0),  # it is done as the next hit arrives
        (1, [(0, 0)] * 4, 2, 0.5, 0.5),
        (2, [(0, 1)] * 4, 4, 1.5, 1),  # depth 2 costs two passes, half of the time
        (2, [(0, 0)] * 4, 4, 1, 0.75),  # a quarter at depth 0, two at 1, one at 2
    ],
)
def test_one_shard_by_hand(slices, history, rate, depth, available):
    found = simulate_healing(build("sisa", slices), 1, rate, burn_in=0, requests=4, repeats=2, stream=Replay(history))
    assert found.depth.tolist() == [depth] * 2
    assert found.available.tolist() == found.live.tolist() == [available] * 2


def test_the_shallowest_shard_goes_first_and_a_job_runs_to_its_end():
    # Shard 1 loses its second stage, then shard 0 its only head. Rate 1: the job of shard 1, two passes, runs on until
    # request 3 arrives; then shard 0 has its head back after one unit, and its second stage after two more.
    history = Replay([(1, 1), (0, 0), (1, 1), (1, 1), (1, 1)])
    tree = build("sisa", 2)
    depths = [2 + 1, 0 + 1, 0 + 1, 1 + 1, 1 + 1]  # right after each request; the job of shard 1 ends as it is hit anew
    for requests in range(1, 6):
        found = simulate_healing(tree, 2, 1, burn_in=requests - 1, requests=1, repeats=1, stream=history)
        assert found.depth.tolist() == [depths[requests - 1] / 2]


def test_more_training_never_hurts_on_the_same_requests():
    rates = (0, 0.2, 1, 3, 10, 1000)
    depths = [simulate_healing(build("rotation", 4), 4, rate, repeats=100).summary()["depth"]["mean"] for rate in rates]
    assert all(less < more for less, more in itertools.pairwise(depths))


def test_bad_arguments_are_refused():
    tree = build("rotation", 4)
    for arguments, wanted in (
        ({"rate": -1}, "rate: wanted 0 or 1e-6..1e+09 slice-passes a request, got -1"),
        ({"rate": 1e-7}, "rate: wanted 0 or 1e-6"),
        ({"rate": float("inf")}, "rate: wanted 0 or 1e-6"),
        ({"shards": 0}, "shards: wanted an integer of at least 1"),
        ({"repeats": 0}, "repeats: wanted an integer of at least 1"),
        ({"burn_in": -1}, "burn_in: wanted an integer of at least 0, got -1"),
        ({"requests": 0}, "requests: wanted an integer of at least 1, got 0"),
        ({"stream": Replay([(0, 0)] * 499)}, "stream: wanted at least 500 requests, burn-in included, it has 499"),
        ({"stream": Independent((1.0,))}, "prior: wanted 4 probabilities"),
    ):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            simulate_healing(tree, **{"shards": 5, "rate": 1, **arguments})


def expected_depth_of(tree, trained):
    """Mean over r = 0..2L of the expected depth of what is trained, by enumeration of all hits in exact fractions."""
    slices, total = tree.slices, Fraction(0)
    for hits in range(2 * slices + 1):
        chances = {frozenset(): Fraction(1)}
        for _ in range(hits):
            after = {}
            for dirty, chance in chances.items():
                for k in range(slices):
                    key = dirty | {k}
                    after[key] = after.get(key, 0) + chance / slices
            chances = after
        for dirty, chance in chances.items():
            usable = [p for p in trained if dirty.isdisjoint(p) and all(p[:d] in trained for d in range(1, len(p)))]
            total += chance * max(map(len, usable), default=0)
    return total / (2 * slices + 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_next_chain_gains_most_expected_depth_per_slice_pass(seed):
    chance = random.Random(seed)
    tree = build(chance.choice(["subsets", "rotation"]), 3)
    have = {path for path in tree.nodes if chance.random() < 0.5}
    order = [path for _, path in healing_order(tree, [have])]
    assert sorted(order) == sorted(set(tree.nodes) - have)
    for path in order:
        assert len(path) == 1 or path[:-1] in have | set(order[: order.index(path)]), "parents first"
    while order:
        now = expected_depth_of(tree, have)
        rates = {}
        for end in tree.nodes:
            chain = [end[:d] for d in range(1, len(end) + 1) if end[:d] not in have]
            if chain:
                gain = expected_depth_of(tree, have | set(chain)) - now
                rates[end] = gain / sum(map(len, chain)), chain
        best = max(rate for rate, _ in rates.values())
        chains = [chain for rate, chain in rates.values() if rate == best]
        took = next(chain for chain in chains if order[: len(chain)] == chain)
        have |= set(took)
        order = order[len(took) :]


def test_shards_are_healed_by_what_each_gains():
    """A dead shard comes first; what is whole is not named; of equal shards the lowest comes first."""
    tree = build("subsets", 3)
    order = healing_order(tree, [set(tree.nodes), set(), {(0,)}, set()])
    assert [shard for shard, _ in order[:2]] == [1, 3]
    assert order[0][1] == order[1][1] == (0,)
    assert {shard for shard, _ in order} == {1, 2, 3}
    assert [path for shard, path in order if shard == 1] == [path for shard, path in order if shard == 3]
    assert healing_order(tree, [set(tree.nodes)]) == []


def test_a_large_plan_is_healed_by_depth_alone():
    tree = build("rotation", 16)
    order = healing_order(tree, [set(), set()])
    assert len(order) == len(set(order)) == 2 * len(tree.nodes)
    assert sorted(order[:32]) == [(s, tuple(range(d))) for s in (0, 1) for d in range(1, 17)], "each to its full depth"
    assert [len(path) for _, path in order[32:]] == sorted(len(path) for _, path in order[32:])
