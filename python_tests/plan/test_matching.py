"""Sequences by matching: the published example, matchings against enumeration, and branching beyond L sequences."""

import itertools
import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import bms, rotation
from s3t_ext.plan.matching import SCORES


@st.composite
def priors(draw, most=6):
    weights = draw(st.lists(st.integers(0, 20), min_size=1, max_size=most).filter(any))
    return tuple(w / sum(weights) for w in weights)


def gain(prior, path, horizon):
    """Give the probability that no request of `horizon` hits the path."""
    return max(0.0, 1 - math.fsum(prior[index] for index in path)) ** horizon


def score(prior, path, horizon, kind):
    return math.fsum((i if kind == "printed" else 1) * gain(prior, path[:i], horizon) for i in range(1, len(path) + 1))


@pytest.mark.parametrize("kind", SCORES)
def test_published_example(kind):
    tree = bms(4, 4, prior=(0.4, 0.3, 0.2, 0.1), score=kind, horizon=100)
    assert tree.sequences == ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))


@settings(deadline=None, max_examples=60)
@given(priors(), st.integers(1, 12))
def test_every_position_is_a_best_matching(prior, horizon):
    slices = len(prior)
    sequences = sorted(bms(slices, slices, prior=prior, horizon=horizon).sequences)
    for depth in range(1, slices):
        gains = [[gain(prior, (*path[:depth], s), horizon) for s in range(slices)] for path in sequences]
        assert sorted(path[depth] for path in sequences) == list(range(slices))
        largest = max(gains[h][s] for h in range(slices) for s in range(slices) if s not in sequences[h][:depth])

        def total(order, depth=depth, gains=gains, largest=largest or 1):
            steps = [(s - path[depth - 1]) % slices for s, path in zip(order, sequences)]
            ties = math.fsum(1 / step for step in steps)
            return math.fsum(gains[head][s] for head, s in enumerate(order)) / largest + 1e-9 * ties

        best = max(
            total(order)
            for order in itertools.permutations(range(slices))
            if all(s not in path[:depth] for s, path in zip(order, sequences))
        )
        assert total([path[depth] for path in sequences]) >= best - 1e-12


@settings(deadline=None, max_examples=60)
@given(priors(), st.sampled_from(SCORES), st.integers(1, 12), st.data())
def test_the_best_sequences_are_kept(prior, kind, horizon, data):
    slices = len(prior)
    budget = data.draw(st.integers(1, slices))
    everything = bms(slices, slices, prior=prior, score=kind, horizon=horizon).sequences
    kept = bms(slices, budget, prior=prior, score=kind, horizon=horizon).sequences
    assert len(kept) == budget
    assert set(kept) <= set(everything)
    scores = sorted((score(prior, path, horizon, kind) for path in everything), reverse=True)
    mine = sorted((score(prior, path, horizon, kind) for path in kept), reverse=True)
    assert mine == pytest.approx(scores[:budget], rel=1e-9, abs=1e-11 * scores[0])


def test_the_scores_differ_in_what_they_keep():
    """012 and 120 keep 9 + 8 and 13 + 5 fourteenths: as printed 9 + 2 * 8 and 13 + 2 * 5."""
    prior = (5 / 14, 1 / 14, 8 / 14)
    assert bms(3, 1, prior=prior, horizon=1).sequences == ((1, 2, 0),)
    assert bms(3, 1, prior=prior, horizon=1, score="printed").sequences == ((0, 1, 2),)


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5, 7, 33])
def test_without_a_prior_it_is_rotation(slices):
    every = math.factorial(slices)
    for budget in {1, 2, 3, slices // 2, slices, slices + 1, 2 * slices, 5 * slices, every, every - 1}:
        if 1 <= budget <= min(every, 200):
            assert bms(slices, budget) == rotation(slices, budget)


@settings(deadline=None, max_examples=60)
@given(priors(5), st.data())
def test_sequences_branch_as_early_as_they_can(prior, data):
    slices = len(prior)
    budget = data.draw(st.integers(1, math.factorial(slices)))
    tree = bms(slices, budget, prior=prior)
    assert len(tree.sequences) == budget
    through = Counter(path[:depth] for path in tree.sequences for depth in range(slices + 1))
    for path in ((), *tree.nodes):
        children = [through[(*path, s)] for s in range(slices) if s not in path]
        assert max(children, default=0) - min(children, default=0) <= 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"score": "best"}, "score: wanted one of surviving, printed, got 'best'"),
        ({"horizon": 0}, "horizon: wanted an integer of at least 1, got 0"),
        ({"horizon": 1.5}, "horizon: wanted an integer of at least 1, got 1.5"),
        ({"prior": (0.5, 0.5)}, "prior: wanted 4 probabilities"),
    ],
)
def test_bad_arguments_are_refused(arguments, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        bms(4, 4, **arguments)
