"""Expected depth against enumeration of every string of requests, against draws, and the published figures."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import StageTree, build, expected_depth, ideal

TREES = {
    "sisa": build("sisa", 3),
    "rotation": build("rotation", 3),
    "subsets": build("subsets", 3),
    "short": StageTree.from_sequences(3, [(2,), (0, 1)]),
}
PRIORS = [None, (0.5, 0.3, 0.2), (0.9, 0.1, 0.0)]
STEP = (0, 0, 2.5, 4)


def enumerate_hits(tree, requests, shards=1, prior=None, utility=None):
    """Average F over all strings of requests, each a slice of this shard or None for another shard."""
    prior = prior or (1 / tree.slices,) * tree.slices
    choices = [*((index, p / shards) for index, p in enumerate(prior)), (None, 1 - 1 / shards)]
    total = []
    for string in itertools.product(choices, repeat=requests):
        depth = len(tree.best_live({index for index, _ in string if index is not None}))
        total.append(math.prod(p for _, p in string) * (utility[depth] if utility else depth))
    return math.fsum(total)


@pytest.mark.parametrize("utility", [None, STEP])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_it_is_the_mean_over_all_strings_of_requests(tree, shards, prior, utility):
    for requests in range(5):
        mean, se = expected_depth(tree, requests, shards=shards, prior=prior, utility=utility)
        assert mean == pytest.approx(enumerate_hits(tree, requests, shards, prior, utility), rel=1e-13)
        assert se == 0


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_finite_subjects_ask_once_each(tree, shards):
    urn = [index if shard == 0 else None for shard in range(shards) for index in range(3) for _ in range(2)]
    for requests in range(min(len(urn), 4) + 1):
        depths = [len(tree.best_live(set(drawn) - {None})) for drawn in itertools.permutations(urn, requests)]
        assert expected_depth(tree, requests, shards=shards, subjects=2).mean == pytest.approx(np.mean(depths))
        assert ideal(3, requests, shards=shards, subjects=2).mean == pytest.approx(
            np.mean([3 - len(set(drawn) - {None}) for drawn in itertools.permutations(urn, requests)])
        )


def test_figures_of_the_paper_setting():
    assert [expected_depth(build("subsets", 4), hits).mean for hits in (2, 3, 4)] == [2.25, 1.6875, 1.265625]
    assert [expected_depth(build("rotation", 4), hits).mean for hits in (2, 3, 4)] == [2.0, 1.5, 1.15625]


def test_many_subjects_are_as_good_as_independent_hits():
    tree = build("rotation", 6)
    near, far = (expected_depth(tree, 8, shards=5, subjects=n).mean for n in (1000, 10))
    limit = expected_depth(tree, 8, shards=5).mean
    assert near == pytest.approx(limit, rel=1e-4)
    assert abs(far - limit) > 1e-3
    assert expected_depth(tree, 145, shards=5, subjects=5).mean > 0  # the last five may share a slice
    assert expected_depth(tree, 146, shards=5, subjects=5).mean == 0


def test_many_requests_leave_nothing():
    assert expected_depth(build("subsets", 4), 5000).mean < 1e-300
    assert expected_depth(build("rotation", 12), 5000).mean < 1e-180
    assert expected_depth(build("rotation", 4), 5000, prior=(0.3, 0.3, 0.4, 0)).mean == 1


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_no_tree_exceeds_the_ideal_and_subsets_reach_it(data):
    slices = data.draw(st.integers(1, 6))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=slices, max_size=slices).filter(any))
    prior = data.draw(st.sampled_from([None, [weight / sum(weights) for weight in weights]]))
    utility = data.draw(st.none() | st.lists(st.floats(-9, 9), min_size=slices + 1, max_size=slices + 1).map(sorted))
    kinds = {"shards": data.draw(st.integers(1, 4)), "prior": prior, "utility": utility}
    requests = data.draw(st.integers(0, 20))
    bound = ideal(slices, requests, **kinds)
    assert expected_depth(build("subsets", slices), requests, **kinds).mean == pytest.approx(bound.mean, abs=1e-12)
    for strategy in ("sisa", "rotation"):
        assert expected_depth(build(strategy, slices), requests, **kinds).mean <= bound.mean + 1e-12


@pytest.mark.parametrize(
    "kinds", [{}, {"subjects": 3}, {"prior": (0.4, *(0.05,) * 12)}], ids=["uniform", "finite", "p"]
)
@pytest.mark.parametrize("shards", [1, 3])
def test_drawn_agrees_with_exact(shards, kinds):
    """Above 12 slices it is drawn; five sequences are few enough for inclusion and exclusion."""
    tree = build("rotation", 13, 5)
    for requests in (1, 4, 9):
        mean, se = expected_depth(tree, requests, shards=shards, **kinds)
        assert 0 < se < 0.05
        assert abs(mean - lattice(tree, requests, shards, **kinds)) <= 4 * se


def lattice(tree, requests, shards, prior=None, subjects=None):
    """Add P[S clean], signed by inclusion and exclusion, over the sets of sequences and how deep each is live."""
    total, slices = 0.0, tree.slices
    for depth in range(1, slices + 1):
        prefixes = {frozenset(path[:depth]) for path in tree.sequences}
        for count in range(1, len(prefixes) + 1):
            for chosen in itertools.combinations(prefixes, count):
                clean = frozenset().union(*chosen)
                if subjects is None:
                    hit = sum(prior[index] for index in clean) if prior else len(clean) / slices
                    chance = (1 - hit / shards) ** requests
                else:
                    left = (shards * slices - len(clean)) * subjects
                    chance = math.comb(left, requests) / math.comb(shards * slices * subjects, requests)
                total -= (-1) ** count * chance
    return total


def test_drawn_trees_of_uneven_length():
    tree = StageTree.from_sequences(20, [(3,), (0, 1), range(10, 20)])
    prior = [(index + 1) / 210 for index in range(20)]
    exact = sum(p * len(tree.best_live({hit})) for hit, p in enumerate(prior))
    mean, se = expected_depth(tree, 1, prior=prior, samples=100_000)
    assert abs(mean - exact) <= 4 * se


def test_drawn_is_a_function_of_the_seed():
    tree = build("rotation", 13)
    assert expected_depth(tree, 5, seed=1) == expected_depth(tree, 5, seed=1) != expected_depth(tree, 5, seed=2)
    utility = [*range(8), *[7] * 6]
    assert expected_depth(tree, 5, utility=utility).mean < expected_depth(tree, 5).mean
    assert expected_depth(tree, 0) == (13, 0)


def test_the_ideal_is_known_at_any_size():
    assert ideal(64, 3).mean == 64 * (63 / 64) ** 3
    assert ideal(64, 3, shards=2, utility=[min(d, 61) / 4 for d in range(65)]).se == 0
    prior = [0.5, *[0.5 / 63] * 63]
    assert ideal(64, 1, prior=prior).mean == pytest.approx(63)
    mean, se = ideal(64, 1, prior=prior, utility=[d / 2 for d in range(65)])
    assert mean == 31.5
    assert se == 0  # one hit always leaves 63


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"requests": -1}, r"requests: wanted at least 0, got -1"),
        ({"shards": 0}, r"shards: wanted at least 1, got 0"),
        ({"prior": (0.5, 0.6, 0, 0)}, r"prior: wanted probabilities that sum to 1"),
        ({"subjects": 0}, r"subjects: wanted at least 1"),
        ({"subjects": 5, "prior": (0.1, 0.2, 0.3, 0.4)}, r"prior: wanted a uniform one beside"),
        ({"subjects": 1, "requests": 9, "shards": 2}, r"requests: wanted at most 8, one for each subject, got 9"),
        ({"utility": (0, 1, 2)}, r"utility: wanted 5 numbers, F\(0\)\.\.F\(4\), got 3"),
        ({"utility": (0, 1, 2, 1, 3)}, r"utility: wanted finite numbers that never decrease"),
        ({"utility": (0, 1, 2, 3, math.inf)}, r"utility: wanted finite numbers"),
    ],
)
def test_bad_arguments_are_refused(wrong, message):
    arguments = {"requests": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        expected_depth(build("sisa", 4), **arguments)
    with pytest.raises(ValueError, match=message):
        ideal(4, **arguments)


def test_one_draw_has_no_error():
    with pytest.raises(ValueError, match="samples: wanted at least 2, got 1"):
        expected_depth(build("sisa", 13), 1, samples=1)
