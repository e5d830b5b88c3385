"""The greedy strategy against every other one, against all chains by enumeration, and against the optimum."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.plan import BUDGETED, PRICED, STRATEGIES, WEIGHED, StageTree, build, expected_depth, ideal, objective
from s3t_ext.plan.depth import best_depths, sizes
from s3t_ext.plan.greedy import ONE, UNITS, _Cover, greedy
from s3t_ext.plan.greedy import chances as _chances

SKEWED = {4: (0.4, 0.3, 0.2, 0.1), 6: (0.05, 0.05, 0.1, 0.1, 0.3, 0.4)}
STEP = {4: (0, 0, 0, 1, 1), 6: (0, 0, 0, 1, 1, 1, 1)}
SETTINGS = {
    "plain": lambda slices: {},
    "prior": lambda slices: {"prior": SKEWED[slices]},
    "step": lambda slices: {"utility": STEP[slices]},
    "root": lambda slices: {"utility": [math.sqrt(d) for d in range(slices + 1)], "horizon": (2, 5, 5)},
}


@functools.cache
def planned(slices, budget, unit, setting):
    return greedy(slices, budget, unit=unit, **SETTINGS[setting](slices))


@pytest.mark.parametrize(("slices", "setting"), [*((4, setting) for setting in SETTINGS), (6, "prior"), (6, "step")])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - PRICED))
def test_it_is_never_below_another_strategy_of_its_budget(strategy, slices, unit, setting):
    kinds = SETTINGS[setting](slices)
    weighed = {"prior": kinds["prior"]} if strategy in WEIGHED and "prior" in kinds else {}
    for sequences in (1, slices, slices + 3) if strategy in BUDGETED else (None,):
        other = build(strategy, slices, sequences, **weighed)
        tree = planned(slices, getattr(other, unit), unit, setting)
        assert getattr(tree, unit) <= getattr(other, unit) + 1e-9
        assert objective(tree, **kinds) >= objective(other, **kinds) - 1e-12


def test_chains_pay_where_no_single_stage_does():
    """With F = [depth >= 3] the first two stages of any chain gain nothing: greedy by single stages stops at once."""
    cover = _Cover(6, range(7), _chances((1 / 6,) * 6, None), STEP[6])
    first = [cover.value(np.arange(64) == 1 << index) for index in range(6)]
    assert first == [0] * 6
    assert greedy(6, 6, utility=STEP[6]).sequences == ((0, 1, 2),)
    values = [objective(greedy(6, budget, utility=STEP[6]), utility=STEP[6]) for budget in (6, 12, 21, 36, 84)]
    assert values == sorted(set(values))
    best = np.mean([ideal(6, hits, utility=STEP[6]).mean for hits in range(13)])
    assert values[-1] == pytest.approx(best, abs=1e-12)  # all 6 + 15 + 20 sets of three or fewer: 6 + 30 + 60 passes


def optimum(slices, budget, unit, prior=None, utility=None, horizon=None):
    """Find the best tree there is, and its objective: the choice of a family of sets as an integer programme."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    size, everything = sizes(slices), range(1, 1 << slices)
    values = utility or range(slices + 1)
    cells = [(depth, clean) for clean in everything for depth in range(1, size[clean] + 1)]
    chances = _chances(prior or (1 / slices,) * slices, horizon)
    worth = [chances[clean] * (values[depth] - values[depth - 1]) for depth, clean in cells]
    columns = len(everything) + len(cells)
    rows, limits = [np.zeros(columns)], [budget]
    rows[0][: len(everything)] = [size[subset] ** UNITS[unit] for subset in everything]
    for subset in everything:
        if size[subset] > 1:
            row = np.zeros(columns)
            row[subset - 1] = 1
            row[[(subset ^ 1 << index) - 1 for index in range(slices) if subset >> index & 1]] = -1
            rows.append(row)
    for column, (depth, clean) in enumerate(cells, len(everything)):
        row = np.zeros(columns)
        row[[subset - 1 for subset in everything if size[subset] == depth and subset & ~clean == 0]] = -1
        row[column] = 1
        rows.append(row)
    limits += [0] * (len(rows) - 1)
    solved = milp(
        -np.array([0.0] * len(everything) + worth),
        integrality=np.array([1] * len(everything) + [0] * len(cells)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(rows), -np.inf, limits),
        options={"mip_rel_gap": 0},
    )
    family = np.array([False, *(solved.x[: len(everything)] > 0.5)])
    return _Cover(slices, range(slices + 1), chances, values).tree(family), values[0] - solved.fun


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("unit", UNITS)
def test_it_is_near_the_optimum(unit, setting):
    kinds = SETTINGS[setting](4)
    full = getattr(build("subsets", 4), unit) * (4 if unit == "layer_passes" else 1)
    for share in (0.25, 0.5, 0.75):
        budget = math.floor(full * share)
        found = objective(planned(4, budget / (4 if unit == "layer_passes" else 1), unit, setting), **kinds)
        _, best = optimum(4, budget, unit, **kinds)
        assert 0.95 * best <= found <= best + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_chain_it_adds_is_the_best_of_all_chains(data):
    slices = data.draw(st.integers(1, 4))
    unit = data.draw(st.sampled_from(sorted(UNITS)))
    weights = data.draw(st.lists(st.integers(1, 5), min_size=slices, max_size=slices))
    utility = sorted(data.draw(st.lists(st.integers(0, 4), min_size=slices, max_size=slices + 1))) or [0]
    utility = [0] * (slices + 1 - len(utility)) + utility
    paths = data.draw(st.lists(st.permutations(range(slices)).map(tuple), max_size=3))
    room = data.draw(st.integers(0, 12))
    costs = [depth ** UNITS[unit] for depth in range(slices + 1)]
    cover = _Cover(slices, costs, _chances(tuple(w / sum(weights) for w in weights), None), utility)
    family = cover.nothing.copy()
    for path in paths:
        family |= cover.family(StageTree(slices, (path[: data.draw(st.integers(1, slices))],)))

    best = (0.0,)
    for path in itertools.permutations(range(slices)):
        masks = [0, *itertools.accumulate((1 << index for index in path), lambda a, b: a | b)]
        for start, end in itertools.combinations(range(slices + 1), 2):
            new = masks[start + 1 : end + 1]
            cost = sum(costs[start + 1 : end + 1])
            if (start == 0 or family[masks[start]]) and not family[new].any() and cost <= room:
                grown = family.copy()
                grown[new] = True
                best = max(best, ((cover.value(grown) - cover.value(family)) / cost, -cost, -new[-1]))
    chain = cover.chain(family, room, cover.nothing)
    assert bool(chain) == (best[0] > 0)
    if chain:
        grown = family.copy()
        grown[chain] = True
        cost = cover.cost(grown) - cover.cost(family)
        assert ((cover.value(grown) - cover.value(family)) / cost, -cost, -chain[0]) == best
        assert cover.family(cover.tree(grown)).tolist() == grown.tolist()  # each set has its parent


def test_ties_go_to_the_lower_cost():
    """One hit, always on slice 0: each further stage on the others gains the same, for the same."""
    cover = _Cover(4, [0, 1, 1, 1, 1], _chances((1, 0, 0, 0), (1,)), range(5))
    assert cover.chain(cover.nothing, 3, cover.nothing) == [0b10]


@pytest.mark.parametrize("strategy", ["sisa", "rotation", "subsets"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_objective_is_the_mean_over_the_horizon(strategy, setting):
    kinds = SETTINGS[setting](6)
    tree = build(strategy, 6)
    horizon = kinds.pop("horizon", range(13))
    mean = np.mean([expected_depth(tree, hits, **kinds).mean for hits in horizon])
    assert objective(tree, **SETTINGS[setting](6)) == pytest.approx(mean, rel=1e-13)
    cover = _Cover(6, range(7), _chances(kinds.get("prior", (1 / 6,) * 6), horizon), kinds.get("utility", range(7)))
    scale = kinds.get("utility", range(7))[-1]
    assert cover.value(cover.family(tree)) / ONE * scale == pytest.approx(mean, abs=1e-12)
    assert (cover.tree(cover.family(tree)).depth, tree.depth) == (6, 6)
    assert best_depths(cover.tree(cover.family(tree))).tolist() == best_depths(tree).tolist()


def test_it_is_one_of_the_strategies():
    assert build("greedy", 6) == greedy(6, build("rotation", 6).slice_passes)
    assert build("greedy", 6, 50, prior=SKEWED[6]) == greedy(6, 50, prior=SKEWED[6])
    assert greedy(6, unit="stages").stages == build("rotation", 6).stages


def test_it_stays_the_same():
    assert greedy(4, 10).sequences == ((1,), (3,), (0, 1), (0, 2), (2, 3))


def test_the_horizon_counts():
    assert greedy(4, 10, horizon=(0,)).sequences == ((0, 1, 2, 3),)
    assert greedy(4, 4, horizon=(12,)).sequences == ((0,), (1,), (2,), (3,))  # at best one slice is left


def test_the_safest_slices_come_first():
    assert greedy(4, 1, prior=SKEWED[4]).sequences == ((3,),)
    assert greedy(4, 3, prior=(0, 1, 0, 0)).sequences == ((0, 2),)
    assert greedy(4, 2, prior=SKEWED[4], utility=STEP[4]).sequences == ((3,),)  # nothing gains


def test_it_pays_for_nothing_that_gains_nothing():
    assert greedy(4, 1000).slice_passes == 32
    assert greedy(4, 1000, utility=(0, 1, 1, 1, 1)).slice_passes == 4
    assert greedy(4, 1000, utility=(2,) * 5).slice_passes == 1
    assert objective(greedy(6, 1000)) == pytest.approx(objective(build("subsets", 6)), abs=1e-12)


@pytest.mark.parametrize(("slices", "room", "prior"), [(4, 16, (0.1, 0.2, 0.3, 0.4)), (6, 64, None)])
def test_swaps_mend_what_chains_leave(slices, room, prior):
    cover = _Cover(slices, range(slices + 1), _chances(prior or (1 / 6,) * 6, None), range(slices + 1))
    filled = cover.fill(cover.nothing, room)
    swapped = cover.swap(filled, room)
    assert cover.cost(swapped) <= room
    assert cover.value(swapped) > cover.value(filled)
    best = optimum(slices, room, "slice_passes", prior)[1]
    assert cover.value(swapped) / ONE * slices == pytest.approx(best, abs=1e-12)


def test_the_other_strategies_are_starts(monkeypatch):
    """Where greedy misses the optimum, it finds it as soon as another strategy is the optimum."""
    tree, best = optimum(4, 10, "slice_passes")
    assert objective(greedy(4, 10)) < best - 1e-3
    assert objective(greedy(4, 10, starts=[tree])) == pytest.approx(best, abs=1e-12)
    monkeypatch.setitem(STRATEGIES, "optimum", lambda slices: tree)
    assert objective(greedy(4, 10)) == pytest.approx(best, abs=1e-12)


def test_given_starts_are_checked():
    start = greedy(6, 40, unit="stages")
    with pytest.raises(ValueError, match="starts: wanted trees of 6 slices and at most 20 stages, got one of 6 and 40"):
        greedy(6, 20, unit="stages", starts=[start])
    with pytest.raises(ValueError, match="starts: wanted trees of 4 slices"):
        greedy(4, 40, unit="stages", starts=[start])
    start = StageTree.from_sequences(7, [(0, 1, 2, 3), (1, 2, 3, 4), (5,)])
    assert math.floor(start.layer_passes * 7) == 60  # of 61: the quotient by 7 came out low
    assert greedy(7, start.layer_passes, unit="layer_passes", starts=[start]).layer_passes <= start.layer_passes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slices": 13}, r"slices: greedy weighs all 2\^L sets of slices, wanted at most 12, got 13; above, use"),
        ({"slices": 0}, "slices: wanted an integer of at least 1, got 0"),
        ({"budget": 0}, "budget: wanted at least 1 slice_passes, what one stage costs, got 0"),
        ({"budget": 0.2, "unit": "layer_passes"}, "budget: wanted at least 0.25 layer_passes"),
        ({"budget": math.inf}, "budget"),
        ({"budget": math.nan}, "budget"),
        ({"unit": "nodes"}, "unit: wanted one of stages, slice_passes, layer_passes, got 'nodes'"),
        ({"prior": (1, 0, 0)}, "prior: wanted 4 probabilities"),
        ({"utility": (0, 1)}, "utility: wanted 5 numbers"),
        ({"horizon": ()}, "horizon: wanted numbers of hits of at least 0"),
        ({"horizon": (3, -1)}, "horizon: wanted numbers of hits of at least 0"),
    ],
)
def test_bad_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        greedy(**{"slices": 4, "budget": 10, **wrong})


def test_objectives_are_refused_above_the_lattice():
    with pytest.raises(ValueError, match="slices: wanted at most 12"):
        objective(build("sisa", 13))
