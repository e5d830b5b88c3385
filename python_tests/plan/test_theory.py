"""The closed forms against enumeration, simulation and the published figures."""

import itertools
import math
import re

import numpy as np
import pytest

from s3t_ext.plan import StageTree, build, last_death, rotation, sisa
from s3t_ext.plan.theory import death, survival


def test_cost_figures_of_the_paper_setting():
    assert [(tree.stages, tree.slice_passes) for tree in (build("subsets", 4), build("rotation", 4))] == [
        (15, 32),
        (16, 40),
    ]
    ratio = {n: build("subsets", n).slice_passes / build("rotation", n).slice_passes for n in (5, 6, 8)}
    assert ratio == pytest.approx({5: 1.07, 6: 1.5, 8: 3.6}, abs=0.05)


def deaths(streams, tree, shards):
    """Step through streams of (shard, slice); return the requests until the 1st, 2nd, ... shard is dead, (runs, m)."""
    times = np.zeros((len(streams), shards))
    for run, stream in enumerate(streams):
        left, order = [set(tree.heads) for _ in range(shards)], []
        for now, (shard, index) in enumerate(stream, 1):
            if left[shard]:
                left[shard].discard(index)
                order += [] if left[shard] else [now]
            if len(order) == shards:
                break
        times[run] = order
    return times


def endless(generator, shards, prior):
    while True:
        yield int(generator.integers(shards)), int(generator.choice(len(prior), p=prior))


def drawn_once(generator, shards, slices, subjects):
    everybody = [(shard, index) for shard in range(shards) for index in range(slices)] * subjects
    return [everybody[i] for i in generator.permutation(len(everybody))]


def agree(times, exact):
    """Compare means within 4 standard errors, and deviations within 4 of theirs (normal, times 2 for the tails)."""
    for simulated, (mean, sd) in zip(times.T, exact):
        assert abs(simulated.mean() - mean) <= 4 * sd / np.sqrt(len(simulated))
        assert abs(simulated.std(ddof=1) - sd) <= 8 * sd / np.sqrt(2 * len(simulated))


@pytest.mark.parametrize(
    ("shards", "slices", "budget", "prior"),
    [
        (5, 4, 4, [0.25] * 4),
        (5, 4, 1, [0.25] * 4),
        (3, 5, 2, [0.2] * 5),
        (1, 3, 3, [1 / 3] * 3),
        (3, 3, 3, [0.6, 0.3, 0.1]),
        (2, 3, 1, [0.1, 0.2, 0.7]),
    ],
)
def test_deaths_against_simulation(shards, slices, budget, prior):
    tree = rotation(slices, budget)
    generator = np.random.default_rng(7)
    times = deaths([endless(generator, shards, prior) for _ in range(800)], tree, shards)
    agree(times, [death(tree, shards, j, prior=prior) for j in range(1, shards + 1)])


@pytest.mark.parametrize(
    ("shards", "slices", "budget", "subjects"), [(3, 4, 4, 1), (3, 4, 2, 3), (2, 3, 3, 10), (1, 1, 1, 4)]
)
def test_deaths_of_finite_slices_against_simulation(shards, slices, budget, subjects):
    tree = rotation(slices, budget)
    generator = np.random.default_rng(8)
    times = deaths([drawn_once(generator, shards, slices, subjects) for _ in range(1500)], tree, shards)
    agree(times, [death(tree, shards, j, subjects=subjects) for j in range(1, shards + 1)])


def test_finite_slices_by_hand():
    assert death(sisa(1), 1, subjects=7) == pytest.approx((1, 0), abs=1e-4)  # the first request kills
    assert death(sisa(1), 2, 2, subjects=1) == pytest.approx((2, 0), abs=1e-4)
    assert death(sisa(2), 1, subjects=1) == pytest.approx((1.5, 0.5))  # the head is asked for first or second
    assert death(sisa(1), 2, 2, subjects=2) == pytest.approx((2 + 1 / 3, math.sqrt(2 / 9)))  # AB.. 2/3, AAB. 1/3
    assert death(rotation(4, 4), 5, subjects=10**6).mean == pytest.approx(death(rotation(4, 4), 5).mean, rel=1e-4)
    assert death(rotation(4, 4), 5, 5, subjects=10).mean < death(rotation(4, 4), 5, 5).mean


def test_death_figures_of_the_paper_setting():
    assert death(sisa(4), 5).mean == pytest.approx(4.0, abs=1e-12)
    assert death(rotation(4, 4), 5).mean == pytest.approx(19.3, abs=0.05)
    assert last_death(5, 4, 1) == pytest.approx(20 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5))


def test_the_first_death_of_sisa_is_geometric():
    assert death(sisa(4), 5) == pytest.approx((4, math.sqrt(1 - 1 / 4) * 4))
    assert death(sisa(2), 1, prior=[0.1, 0.9]) == pytest.approx((10, math.sqrt(0.9) * 10))


@pytest.mark.parametrize(("shards", "slices"), [(1, 1), (5, 4), (64, 16), (20000, 16)])
def test_death_of_all_shards_is_the_last_death(shards, slices):
    tree = rotation(slices, slices)
    mean, sd = death(tree, shards, shards)
    assert mean == pytest.approx(last_death(shards, slices, slices), rel=1e-10)
    n = shards * slices  # coupons: the i-th new slice has chance i / n
    assert sd**2 == pytest.approx(sum((1 - i / n) / (i / n) ** 2 for i in range(1, n + 1)), rel=1e-6, abs=1e-6)


def test_what_is_never_hit_never_dies():
    assert death(rotation(3, 2), 4, prior=[0, 0.5, 0.5]) == (math.inf, math.inf)
    assert death(StageTree.from_sequences(3, [(1, 0)]), 4, prior=[0, 0.5, 0.5]).mean == pytest.approx(2)
    assert survival(rotation(3, 2), 3, [0, 0.5, 0.5]) == [1.0] * 4


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_survival_is_the_share_of_all_hits(budget, prior):
    tree = rotation(3, budget)
    curve = survival(tree, 6, prior)
    for hits, share in enumerate(curve):
        alive = 0.0
        for string in itertools.product(range(3), repeat=hits):
            alive += bool(tree.live(string)) * math.prod((prior or [1 / 3] * 3)[index] for index in string)
        assert share == pytest.approx(alive, abs=1e-13)


def test_survival_of_many_slices():
    curve = survival(rotation(24, 24), 600)
    assert curve[:24] == pytest.approx([1.0] * 24, abs=1e-11)
    assert sum(curve) == pytest.approx(last_death(1, 24, 24), rel=1e-9)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(curve))


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda: last_death(5, 4, 5), "heads"),
        (lambda: death(rotation(4, 4), 5, 6), "j: wanted 1..5, got 6"),
        (lambda: death(rotation(4, 4), 5, 0), "j: wanted 1..5, got 0"),
        (lambda: death(rotation(4, 4), 0), "shards: wanted an integer of at least 1, got 0"),
        (lambda: death(rotation(4, 4), 5, subjects=0), "subjects: wanted an integer of at least 1, or none, got 0"),
        (lambda: death(rotation(4, 4), 5, subjects=2, prior=[0.25] * 4), "subjects: finite slices"),
        (lambda: death(rotation(4, 4), 5, prior=[1.0]), "prior: wanted 4 probabilities"),
        (lambda: survival(rotation(4, 4), -1), "hits: wanted an integer of at least 0, got -1"),
        (lambda: survival(rotation(4, 4), 3, [0.5] * 4), "prior: wanted probabilities that sum to 1"),
    ],
)
def test_bad_arguments_are_refused(call, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        call()
