"""The strategies: their sequences, and the depth that they promise."""

import itertools
import math
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import (
    BUDGETED,
    PRICED,
    STRATEGIES,
    WEIGHED,
    bms,
    build,
    conditional,
    random,
    rotation,
    sisa,
    subsets,
)

PERMUTED = [(slices, budget) for slices in range(1, 6) for budget in range(1, math.factorial(slices) + 1)]


def dirty_sets(slices):
    return [set(dirty) for size in range(slices + 1) for dirty in itertools.combinations(range(slices), size)]


def test_sisa_is_one_sequence():
    assert sisa(4).sequences == ((0, 1, 2, 3),)


@pytest.mark.parametrize(("slices", "budget"), PERMUTED)
def test_rotation_gives_whole_distinct_sequences_and_favours_no_head(slices, budget):
    sequences = rotation(slices, budget).sequences
    assert len(sequences) == budget
    assert all(sorted(sequence) == list(range(slices)) for sequence in sequences)
    heads = Counter(sequence[0] for sequence in sequences)
    assert len(heads) == min(budget, slices)
    assert max(heads.values()) - min(heads.values()) <= 1


def test_rotation_offsets():
    assert [sequence[0] for sequence in rotation(8, 4).sequences] == [0, 2, 4, 6]
    assert [sequence[0] for sequence in rotation(5, 3).sequences] == [0, 1, 3]
    assert rotation(3, 3).sequences == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert set(rotation(4, 8).sequences) - set(rotation(4, 4).sequences) == {
        (0, 2, 3, 1), (1, 3, 0, 2), (2, 0, 1, 3), (3, 1, 2, 0)
    }  # fmt: skip


def test_rotation_with_all_slices_heads_is_a_latin_square():
    for position in zip(*rotation(5, 5).sequences):
        assert sorted(position) == list(range(5))


@pytest.mark.parametrize("slices", range(1, 9))
def test_subsets_keep_every_clean_slice(slices):
    tree = subsets(slices)
    for dirty in dirty_sets(slices):
        assert set(tree.best_live(dirty)) == set(range(slices)) - dirty


@pytest.mark.parametrize("slices", range(1, 11))
def test_subsets_cost_and_fewest_sequences(slices):
    tree = subsets(slices)
    assert tree.stages == 2**slices - 1
    assert tree.slice_passes == slices * 2 ** (slices - 1)
    assert len(tree.sequences) == math.comb(slices, slices // 2)
    assert tuple(range(slices)) in tree.sequences


def test_all_permutations_keep_what_subsets_keep():
    tree = rotation(4, 24)
    assert all(len(tree.best_live(dirty)) == 4 - len(dirty) for dirty in dirty_sets(4))


def inclusion(law, count):
    """Give the probability that each outcome is among the first `count` drawn without replacement."""
    found = dict.fromkeys(law, 0.0)
    for drawn in itertools.permutations(law, count):
        probability, rest = 1.0, 1.0
        for outcome in drawn:
            probability *= law[outcome] / rest
            rest -= law[outcome]
        for outcome in drawn:
            found[outcome] += probability
    return found


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
@pytest.mark.parametrize("prior", [None, (0.6, 0.3, 0.1)])
def test_draws_follow_their_law(prior, budget):
    law = {}
    weights = [1 / p for p in prior or (1, 1, 1)]
    for a, b, c in itertools.permutations(range(3)):
        law[a, b, c] = weights[a] / sum(weights) * weights[b] / (weights[b] + weights[c])
    runs = 2000
    draw = partial(conditional, prior=prior) if prior else random
    counts = Counter(path for seed in range(runs) for path in draw(3, budget, seed=seed).sequences)
    for path, probability in inclusion(law, budget).items():
        error = math.sqrt(probability * (1 - probability) / runs)
        assert abs(counts[path] / runs - probability) <= 4 * error, path


def test_conditional_puts_slices_without_deletions_first():
    prior = (0.5, 0, 0.5, 0)
    safe = {(1, 3, 0, 2), (1, 3, 2, 0), (3, 1, 0, 2), (3, 1, 2, 0)}
    for seed in range(20):
        assert set(conditional(4, 3, prior=prior, seed=seed).sequences) < safe
        assert set(conditional(4, 4, prior=prior, seed=seed).sequences) == safe
        assert set(conditional(4, 7, prior=prior, seed=seed).sequences) > safe


def test_conditional_without_a_prior_is_random_and_seeds_differ():
    assert conditional(6, 10, seed=3) == random(6, 10, seed=3)
    assert len({random(6, 10, seed=seed) for seed in range(20)}) == 20


def test_draws_stay_the_same():
    """The first draws of two seeds, as NumPy 2 gives them; what a store was planned with must come again."""
    assert random(5, 2, seed=0).sequences == ((2, 1, 0, 4, 3), (3, 2, 4, 0, 1))
    drawn = conditional(5, 2, prior=(0.4, 0.3, 0.2, 0.1, 0), seed=1).sequences
    assert drawn == ((4, 2, 3, 1, 0), (4, 3, 2, 0, 1))


def test_build_by_name():
    assert set(STRATEGIES) == {"sisa", "rotation", "bms", "conditional", "random", "subsets", "greedy"}
    assert build("sisa", 3) == sisa(3)
    assert build("subsets", 3) == subsets(3)
    assert build("rotation", 3) == rotation(3, 3)
    assert build("rotation", 3, 5) == rotation(3, 5)
    assert build("random", 4, 5, seed=7) == random(4, 5, seed=7)
    prior = (0.4, 0.3, 0.2, 0.1)
    assert build("bms", 4, 5, prior=prior) == bms(4, 5, prior=prior)
    assert build("conditional", 4, 5, prior=prior, seed=7) == conditional(4, 5, prior=prior, seed=7)


@st.composite
def plans(draw):
    """Draw the arguments of `build`: any strategy that is listed, whatever it takes."""
    strategy = draw(st.sampled_from(sorted(STRATEGIES)))
    slices = draw(st.integers(1, 6))
    arguments = {"seed": draw(st.integers(0, 5))}
    if strategy in BUDGETED:
        arguments["budget"] = draw(st.integers(1, math.factorial(slices)))
    if strategy in WEIGHED:
        weights = draw(st.lists(st.sampled_from([0, 1e-12, 0.1, 1, 1, 3]), min_size=slices, max_size=slices))
        arguments["prior"] = [w / sum(weights) for w in weights] if any(weights) else None
    return strategy, slices, arguments


@settings(deadline=None, max_examples=120)
@given(plans(), st.data())
def test_every_strategy(plan, data):
    strategy, slices, arguments = plan
    tree = build(strategy, slices, **arguments)
    assert tree == build(strategy, slices, **arguments)
    assert set(tree.nodes) == {path[:depth] for path in tree.sequences for depth in range(1, len(path) + 1)}
    assert len(set(tree.sequences)) == len(tree.sequences)
    assert all(len(set(path)) == len(path) and set(path) <= set(range(slices)) for path in tree.sequences)
    if "budget" in arguments:
        assert len(tree.sequences) == arguments["budget"]
        assert all(len(path) == slices for path in tree.sequences)

    requests = data.draw(st.lists(st.integers(0, slices - 1), max_size=2 * slices))
    served = [tree.best_live(requests[:count]) for count in range(len(requests) + 1)]
    assert served[-1] == tree.best_live(data.draw(st.permutations(requests + requests)))
    assert served[-1] == tree.best_live(frozenset(requests))
    assert [len(path) for path in served] == sorted(map(len, served), reverse=True)
    assert all(set(path).isdisjoint(requests[:count]) for count, path in enumerate(served))
    live = set(tree.live(requests))
    assert live == {path for path in tree.nodes if set(path).isdisjoint(requests)}
    assert len(served[-1]) == max(map(len, live), default=0)


@pytest.mark.parametrize("strategy", ["rotation", "bms", "conditional", "random"])
@pytest.mark.parametrize("weighed", [False, True])
def test_large_plans_are_quick(strategy, weighed):
    prior = tuple((i + 1) / 2080 for i in range(64)) if weighed and strategy in WEIGHED else None
    build(strategy, 4, prior=prior and (0.25,) * 4)  # numpy and scipy are loaded
    start = time.process_time()
    tree = build(strategy, 64, 4096, prior=prior)
    seconds = time.process_time() - start
    assert len(tree.sequences) == 4096
    assert {len(path) for path in tree.sequences} == {64}
    assert seconds < 4  # at most 1 where this was written, by a busy core


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ("nosuch", 4),
            "strategy: wanted one of bms, conditional, greedy, random, rotation, sisa, subsets, got 'nosuch'",
        ),
        (("sisa", 0), "slices: wanted an integer of at least 1, got 0"),
        (("subsets", 2.0), "slices"),
        (("subsets", 17), "131071 stages for 17 slices"),
        (("subsets", 4, 6), "budget: subsets fixes its own sequences"),
        (("sisa", 4, 1), "budget: sisa fixes"),
        (("rotation", 4, 0), "budget: wanted 1..4! = 24 sequences, got 0"),
        (("rotation", 4, 25), "got 25"),
        (("rotation", 4, True), "got True"),
    ],
)
def test_bad_arguments_are_refused(arguments, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        build(*arguments)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_refuses_what_it_cannot_use(strategy):
    with pytest.raises(ValueError, match="slices: wanted an integer of at least 1, got 0"):
        build(strategy, 0)
    if strategy in BUDGETED | PRICED:
        with pytest.raises(ValueError, match="budget: wanted"):
            build(strategy, 3, 0)
    else:
        with pytest.raises(ValueError, match=f"budget: {strategy} fixes its own sequences, wanted none, got 2"):
            build(strategy, 3, 2)
    if strategy in WEIGHED:
        with pytest.raises(ValueError, match="prior: wanted 3 probabilities, one for each slice, got 2"):
            build(strategy, 3, prior=(0.5, 0.5))
    else:
        with pytest.raises(
            ValueError, match=f"prior: {strategy} reads none, wanted one of {', '.join(sorted(WEIGHED))}"
        ):
            build(strategy, 3, prior=(0.2, 0.3, 0.5))


@pytest.mark.parametrize("strategy", ["rotation", "bms", "conditional", "random"])
def test_no_more_sequences_than_permutations(strategy):
    assert len(build(strategy, 4, 24).sequences) == 24
    with pytest.raises(ValueError, match=re.escape("budget: wanted 1..4! = 24 sequences, got 25")):
        build(strategy, 4, 25)


@pytest.mark.parametrize("seed", [-1, None, 1.0, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed: wanted an integer of at least 0"):
        build("random", 3, seed=seed)


def test_import_loads_no_numerics():
    code = "import sys, s3t_ext.plan, s3t_ext.ledger; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n"
