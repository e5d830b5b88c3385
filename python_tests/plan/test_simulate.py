"""The simulator against a reference that goes step by step, against the exact theory, and against hand cases."""

import functools
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import STRATEGIES, StageTree, build, death, expected_depth, last_death
from s3t_ext.plan.simulate import NEVER, simulate
from s3t_ext.plan.streams import Bursts, Finite, Independent, Replay, chunks


def reference(tree, shards, requests, j, floor, depth_after):
    """Go through one stream request by request, serve the best live node of each shard, and note what happens when."""
    dirty = [set() for _ in range(shards)]
    depth = [tree.depth] * shards
    seen = {}
    after = {0: sum(depth) / shards}
    for number, request in enumerate(requests, 1):
        shard, slice_ = divmod(int(request), tree.slices)
        dirty[shard].add(slice_)
        depth[shard] = len(tree.best_live(dirty[shard]))
        for name, dead in (("first", 1), (str(j), j), ("last", shards)):
            if depth.count(0) >= dead:
                seen.setdefault(name, number)
        if sum(depth) / shards < floor:
            seen.setdefault("floor", number)
        after[number] = sum(depth) / shards
    stops = {name: seen.get(name, NEVER) for name in ("first", str(j), "last", "floor")}
    return stops, {r: after.get(r, math.nan) for r in depth_after}


build_once = functools.cache(build)  # some strategies search


def trees():
    """Draw trees of every strategy with a default, and custom ones with short and missing sequences."""
    listed = st.builds(build_once, st.sampled_from(sorted(STRATEGIES)), st.integers(1, 5))

    def custom(slices):
        path = st.permutations(range(slices)).flatmap(lambda p: st.integers(1, slices).map(lambda n: p[:n]))
        return st.lists(path, min_size=1, max_size=4).map(lambda paths: StageTree.from_sequences(slices, paths))

    return listed | st.integers(1, 5).flatmap(custom)


@st.composite
def streams_of(draw, shards, slices):
    prior = draw(
        st.none() | st.permutations([0.0] * (slices // 3) + [1 / (slices - slices // 3)] * (slices - slices // 3))
    )
    requests = st.lists(st.tuples(st.integers(0, shards - 1), st.integers(0, slices - 1)), min_size=1, max_size=40)
    return draw(
        st.just(Independent(prior))
        | st.builds(Bursts, st.integers(1, 9), st.just(prior))
        | st.builds(Replay, requests)
        | st.builds(Finite, st.integers(1, 4))
    )


@settings(deadline=None, max_examples=150)
@given(st.data(), trees(), st.integers(1, 3), st.integers(0, 99))
def test_every_number_is_that_of_the_reference(data, tree, shards, seed):
    stream = data.draw(streams_of(shards, tree.slices))
    j = data.draw(st.integers(1, shards))
    floor = data.draw(st.integers(1, 4 * tree.depth)) / 4
    depth_after = data.draw(st.lists(st.integers(0, 30), max_size=3, unique=True))
    limit = data.draw(st.integers(1, 200))
    found = simulate(
        tree, shards, repeats=4, seed=seed, stream=stream, j=j, floor=floor, depth_after=depth_after, limit=limit
    )
    ((_, _, blocks),) = chunks(stream, shards, tree.slices, 4, seed)
    read, columns = [], 0
    for block in blocks:
        read.append(block)
        columns += block.shape[1]
        if columns >= limit:
            break
    for row, requests in enumerate(np.concatenate(read, axis=1)[:, :limit]):
        stops, depths = reference(tree, shards, requests, j, floor, depth_after)
        assert {name: int(times[row]) for name, times in found.stops.items()} == stops
        for after, depth in depths.items():
            np.testing.assert_equal(found.depths[after][row], depth)  # NaN where the stream is over


@pytest.mark.parametrize(("slices", "budget"), [(s, b) for s in (4, 6) for b in range(1, s + 1)])
def test_deaths_are_those_of_the_theory(slices, budget):
    tree = build("rotation", slices, budget)
    found = simulate(tree, 5, repeats=20_000, j=3)
    last = last_death(5, slices, budget)
    for name, exact in (("first", death(tree, 5).mean), ("3", death(tree, 5, 3).mean), ("last", last)):
        seen = found.summary()[name]
        assert seen["reached"] == 20_000
        assert abs(seen["mean"] - exact) <= 4 * seen["se"]
        assert 0 < seen["se"] < exact / 100
    assert found.stops["last"].std() == pytest.approx(death(tree, 5, 5).sd, rel=0.03)


@pytest.mark.parametrize(
    ("stream", "law"),
    [
        (Independent((0.55, 0.3, 0.15)), {"prior": (0.55, 0.3, 0.15)}),
        (Finite(1), {"subjects": 1}),
        (Finite(4), {"subjects": 4}),
    ],
)
def test_priors_and_finite_slices_are_those_of_the_theory(stream, law):
    tree = build("rotation", 3)
    found = simulate(tree, 2, repeats=20_000, stream=stream, depth_after=(1, 3, 6)).summary()
    for name, j in (("first", 1), ("last", 2)):
        assert abs(found[name]["mean"] - death(tree, 2, j, **law).mean) <= 4 * found[name]["se"]
    for after, seen in found["depth"].items():
        exact = expected_depth(tree, int(after), shards=2, **law).mean
        assert abs(seen["mean"] - exact) <= 4 * seen["se"] + 1e-12


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_depths_are_those_of_the_theory(strategy):
    tree = build(strategy, 5)
    found = simulate(tree, 1, repeats=20_000, depth_after=range(1, 9)).summary()["depth"]
    for hits in range(1, 9):
        seen = found[str(hits)]
        assert abs(seen["mean"] - expected_depth(tree, hits).mean) <= 4 * seen["se"] + 1e-12


def test_finite_subjects_by_hand():
    # The first of the n subjects of one slice, among N in all, leaves as number (N + 1) / (n + 1) on average.
    found = simulate(build("sisa", 2), 1, repeats=20_000, stream=Finite(2)).summary()["last"]
    assert abs(found["mean"] - 5 / 3) <= 4 * found["se"]
    # Both slices of one subject each: the shard is dead with the second request, whatever the order.
    assert simulate(build("rotation", 2), 1, repeats=9, stream=Finite(1)).stops["last"].tolist() == [2] * 9


def test_bursts_take_all_shards_at_once():
    tree = build("rotation", 4)
    one, burst = (simulate(tree, 5, repeats=4000, stream=Bursts(size)).summary() for size in (1, 50))
    alone = simulate(tree, 5, repeats=4000).summary()
    for name in ("first", "last"):
        assert abs(one[name]["mean"] - alone[name]["mean"]) <= 4 * math.hypot(one[name]["se"], alone[name]["se"])
    # A burst of 50 hits all 5 shards but for 5 * 0.8^50 < 1e-4; after the 4th new tier little is left.
    assert burst["last"]["mean"] - burst["first"]["mean"] < 20 < alone["last"]["mean"] - alone["first"]["mean"]


def test_a_history_that_ends_is_reported_not_averaged():
    tree, history = build("rotation", 2), [(0, 0), (1, 0), (0, 1), (0, 1)]
    found = simulate(tree, 2, repeats=3, stream=Replay(history), floor=0.5, depth_after=(2, 4, 5)).summary((0.5,))
    missing = {"mean": None, "se": None, "quantiles": {"0.5": None}, "reached": 0}
    assert found["first"] == {"mean": 3.0, "se": 0.0, "quantiles": {"0.5": 3}, "reached": 3}
    assert found["last"] == found["floor"] == found["depth"]["5"] == missing
    assert (found["depth"]["2"]["mean"], found["depth"]["4"]["mean"]) == (1.0, 0.5)


def test_where_some_are_not_reached_only_quantiles_below_them_are_known():
    found = simulate(build("sisa", 2), 1, repeats=1000, limit=2)
    reached = int((found.stops["last"] != NEVER).sum())
    assert 700 < reached < 800  # 1 - 2^-2
    last = found.summary((0.25, 0.7, 0.8))["last"]
    assert last == {"mean": None, "se": None, "quantiles": {"0.25": 1, "0.7": 2, "0.8": None}, "reached": reached}


def test_a_shard_whose_head_is_never_hit_lives_on_but_falls_below_the_floor():
    stream = Independent((0, 0.5, 0.5))
    found = simulate(build("sisa", 3), 1, repeats=4000, stream=stream, floor=1.5).summary()
    assert found["last"]["reached"] == 0
    assert found["floor"]["reached"] == 4000
    assert abs(found["floor"]["mean"] - 2) <= 4 * found["floor"]["se"]  # the first hit on slice 1


def test_plans_of_one_seed_meet_the_same_requests():
    plans = [build("sisa", 6), build("rotation", 6, 3), build("rotation", 6)]
    stops = [simulate(plan, 5, repeats=500, seed=3).stops for plan in plans]
    for name in ("first", "last"):
        assert (stops[0][name] <= stops[1][name]).all()  # 0, then 0 2 4, then all six are heads
        assert (stops[1][name] <= stops[2][name]).all()
    again = simulate(plans[2], 5, repeats=500, seed=3, floor=2.5, depth_after=(400,)).stops
    assert all((again[name] == stops[2][name]).all() for name in ("first", "last"))
    other = simulate(plans[2], 5, repeats=500, seed=4).stops
    assert (other["last"] != stops[2]["last"]).any()


@pytest.mark.parametrize("shards", [10, 49])  # 49 * (1 / 49) < 1
def test_a_floor_is_a_mean_as_floats_round_it(shards):
    # One slice a shard, hit one after another: k of m live is a mean of k / m, and the next hit falls below it.
    history = Replay([(shard, 0) for shard in range(shards)])
    for live in range(1, shards + 1):
        found = simulate(build("sisa", 1), shards, repeats=1, stream=history, floor=live / shards)
        assert found.stops["floor"].tolist() == [shards + 1 - live]


def test_what_can_never_be_hit_is_not_waited_for():
    read = []

    class Counted(Independent):
        def blocks(self, *arguments):
            for block in super().blocks(*arguments):
                read.append(block.shape[1])
                yield block

    found = simulate(build("rotation", 3, 2), 2, repeats=5, stream=Counted((0, 0.5, 0.5))).summary()
    assert found["first"]["reached"] == 0
    assert sum(read) < 100  # the default limit is 6000


def test_without_a_limit_a_stream_is_read_as_far_as_it_is_needed():
    tree = build("sisa", 2)
    late = Replay([(0, 1)] * 2500 + [(0, 0)])
    assert simulate(tree, 1, repeats=1, stream=late).stops["last"].tolist() == [2501]
    rare = Independent((1e-9, 1 - 1e-9))
    found = simulate(tree, 1, repeats=2, stream=rare, depth_after=(2500,))
    assert (found.stops["last"].tolist(), found.depths[2500].tolist()) == ([NEVER] * 2, [1, 1])
    assert (
        simulate(tree, 1, repeats=1, stream=rare, depth_after=(2500,), limit=2499).summary()["depth"]["2500"]["reached"]
        == 0
    )


def test_a_single_repetition_has_no_error():
    assert simulate(build("sisa", 2), 2, repeats=1).summary()["first"]["se"] is None


def test_the_paper_setting_is_simulated_in_a_blink():
    tree = build("rotation", 6, 6)
    start = time.process_time()
    simulate(tree, 5, repeats=20_000)
    assert time.process_time() - start < 2  # 0.05 s on one core


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"shards": 0}, "shards: wanted an integer of at least 1, got 0"),
        ({"repeats": 0}, "repeats: wanted an integer of at least 1, got 0"),
        ({"seed": -1}, "seed: wanted an integer of at least 0, got -1"),
        ({"j": 6}, "j: wanted 1..5, got 6"),
        ({"floor": 0}, "floor: wanted above 0 and at most the tree's depth, 4, got 0"),
        ({"floor": 4.5}, "floor: wanted above 0 and at most the tree's depth, 4, got 4.5"),
        ({"depth_after": (2, -1)}, "depth_after: wanted an integer of at least 0, got -1"),
        ({"limit": 0}, "limit: wanted an integer of at least 1, got 0"),
        ({"stream": Replay([(5, 0)])}, "requests: wanted shards in 0..4"),
        ({"stream": Independent((1.0,))}, "prior: wanted 4 probabilities"),
    ],
)
def test_bad_arguments_are_refused(arguments, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        simulate(build("rotation", 4), **{"shards": 5, **arguments})


def test_importing_it_loads_no_numpy(tmp_path):
    code = "import sys, s3t_ext.plan.simulate, s3t_ext.plan.healing; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"
