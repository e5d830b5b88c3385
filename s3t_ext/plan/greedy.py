"""The greedy strategy: chains of stages by gain per cost, for a training budget, a prior, a utility and a horizon.

Depth depends on sets alone: with clean slices C a shard reaches depth d where some node of depth d has all its slices
in C. So a plan is a family of sets, one node for each, in which each set has a parent: the set less one member, or
nothing. Its objective is a weighted coverage of cells (d, C): the node on S covers those with d = |S| and S within C.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from s3t_ext.plan.depth import LATTICE_LIMIT, best_depths, check_utility, sizes
from s3t_ext.plan.prior import Prior, check_prior
from s3t_ext.plan.strategies import BUDGETED, PRICED, STRATEGIES, WEIGHED, build
from s3t_ext.plan.tree import NodePath, StageTree

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

UNITS = {"stages": 0, "slice_passes": 1, "layer_passes": 2}
"""A node at depth d costs d to this power; for `layer_passes` divided by L."""

ONE = 1 << 52  # gains are counted in 2^-52 of the utility's range: sums are exact and the same on every machine
DENSE = 64  # starts: every budget to 64 sequences, then by quarters
NO_CHAIN = -1


def greedy(
    slices: int,
    budget: float | None = None,
    *,
    unit: str = "slice_passes",
    prior: Sequence[float] | None = None,
    utility: Sequence[float] | None = None,
    horizon: Collection[int] | None = None,
    starts: Iterable[StageTree] = (),
) -> StageTree:
    """Build a tree of great mean utility within a training budget.

        J = mean over r in the horizon of E[F(depth) after r hits on the shard]

    Adds the chain of stages, from a node of the tree or from nothing to any set of slices, that gains most J per cost
    and still fits; starts from nothing and from what fits of every other strategy; then takes out chains, least loss
    per cost first, and fills the room anew while that is better. Returns the best tree seen, of equals the cheapest.

    Args:
        slices: L, at most 12.
        budget: what the stages of one shard may cost, in `unit`; what `rotation` with B = L costs where none is given.
        unit: "stages", "slice_passes" or "layer_passes", as the tree counts them.
        prior: probability that a hit falls on each slice, (L,); uniform where none is given.
        utility: F(0)..F(L), (L+1,), never decreasing; the depth itself where none is given.
        horizon: numbers r of hits, of equal weight; 0..2L where none is given.
        starts: further trees to start from, each within the budget.

    Raises:
        ValueError: an argument is out of range, or the budget does not pay for one stage.

    Notes:
        Chains, not single stages: with F = [depth >= 3] no first stage gains anything. Ties go to the lower cost, then
        to the set whose bits make the smaller number. Of the other strategies it tries every budget to 64 sequences,
        then budgets a quarter apart. On one core it takes 0.03, 0.05, 0.15, 0.7, 7 s for L = 4, 6, 8, 10, 12
        with the default budget, and 0.5, 2.5, 40 s for L = 8, 10, 12 at half of what `subsets` costs. No bound on the
        distance to the best tree is claimed.
    """
    weights, values = check_prior(slices, prior), check_utility(slices, utility)
    if slices > LATTICE_LIMIT:
        raise ValueError(
            f"slices: greedy weighs all 2^L sets of slices, wanted at most {LATTICE_LIMIT}, got {slices}; "
            "above, use rotation, or bms for a prior"
        )
    if unit not in UNITS:
        raise ValueError(f"unit: wanted one of {', '.join(UNITS)}, got {unit!r}")
    if budget is None:
        budget = getattr(build("rotation", slices), unit)
    scale = slices if unit == "layer_passes" else 1
    if not 1 <= budget * scale < math.inf:
        raise ValueError(f"budget: wanted at least {1 / scale:.6g} {unit}, what one stage costs, got {budget!r}")
    cover = _Cover(slices, [depth ** UNITS[unit] for depth in range(slices + 1)], chances(weights, horizon), values)
    room = math.floor(budget * scale + 1e-6)  # a sum of d * d / L may have come out a little low
    families = [cover.nothing, *_others(cover, room, None if prior is None else weights)]
    for tree in starts:
        if tree.slices != slices or cover.cost(family := cover.family(tree)) > room:
            raise ValueError(
                f"starts: wanted trees of {slices} slices and at most {budget} {unit}, "
                f"got one of {tree.slices} and {getattr(tree, unit)}"
            )
        families.append(family)
    every = ~cover.nothing  # `subsets`: where each stage of it gains something and it fits, there is nothing to search
    every[0] = False
    if cover.cost(every) <= room and min(weights) > 0 and all(a < b for a, b in itertools.pairwise(values)):
        best = every
    else:
        filled = max((cover.fill(family, room) for family in families), key=cover.rank)
        best = max((*families, filled, cover.swap(filled, room)), key=cover.rank)
    if not best.any():
        best[1 << weights.index(min(weights))] = True  # nothing gains: one stage, on the safest slice
    return cover.tree(best)


def objective(
    tree: StageTree,
    *,
    prior: Sequence[float] | None = None,
    utility: Sequence[float] | None = None,
    horizon: Collection[int] | None = None,
) -> float:
    """Compute what `greedy` maximises: E[F(depth)] of one shard, averaged over the horizon. At most 12 slices."""
    values = check_utility(tree.slices, utility)
    if tree.slices > LATTICE_LIMIT:
        raise ValueError(f"slices: wanted at most {LATTICE_LIMIT} to weigh all their sets, got {tree.slices}")
    found = chances(check_prior(tree.slices, prior), horizon)
    return math.fsum(chance * values[depth] for chance, depth in zip(found.tolist(), best_depths(tree).tolist()))


def chances(prior: Prior, horizon: Collection[int] | None) -> Array:
    """Compute P[the clean slices are C], averaged over the horizon, (2^L,), hit by hit: nothing is subtracted."""
    import numpy as np

    rounds = list(range(2 * len(prior) + 1) if horizon is None else horizon)
    if not rounds or min(rounds) < 0:
        raise ValueError(f"horizon: wanted numbers of hits of at least 0, got {rounds}")
    outside = np.zeros(1)
    for p in prior:
        outside = np.concatenate((outside + p, outside))  # (2^i,) p of the slices outside C
    now, total = np.zeros(len(outside)), np.zeros(len(outside))
    now[-1] = 1
    for hits in range(max(rounds) + 1):
        total += now * rounds.count(hits)
        after = now * outside  # on a slice hit before
        for index, p in enumerate(prior):
            after.reshape(-1, 2, 1 << index)[:, 0] += p * now.reshape(-1, 2, 1 << index)[:, 1]
        now = after
    return total / len(rounds)


def _others(cover: _Cover, room: int, prior: Prior | None) -> Iterator[Array]:
    """Yield of every other strategy the best family that fits."""
    for name in STRATEGIES:
        if name in PRICED:
            continue
        fitting = []
        for budget in _budgets(cover.slices) if name in BUDGETED else (None,):
            family = cover.family(build(name, cover.slices, budget, prior=prior if name in WEIGHED else None))
            if (cost := cover.cost(family)) <= room:
                fitting.append(family)
            elif cost > room + cover.chain_costs[-1]:  # costs grow with the budget, give or take a sequence
                break
        if fitting:
            yield max(fitting, key=cover.rank)


def _budgets(slices: int) -> Iterator[int]:
    budget = 1
    while budget <= math.factorial(slices):
        yield budget
        budget += max(1, budget // 4 if budget >= DENSE else 1)


class _Cover:
    """What families of sets cover and cost. A family is (2^L,) bool; bit i of a set's index says if slice i is in."""

    def __init__(self, slices: int, costs: Sequence[int], chances: Array, utility: Sequence[float]) -> None:
        import numpy as np

        self.slices = slices
        self.size = sizes(slices)  # (2^L,)
        self.costs = np.array([0, *costs[1:]])  # (L+1,) of a node, by depth
        self.chain_costs = np.cumsum(self.costs)  # (L+1,) of a chain from nothing
        self.own_cells = self.size - 1, np.arange(len(self.size))  # (|S|, S) of each set
        self.own = np.arange(1, slices + 1)[:, None] == self.size  # (L, 2^L)
        self.layers = [row.nonzero()[0] for row in self.own]  # the sets of each depth
        self.parents = []  # (sets, depth) of each set in a layer
        for depth, layer in enumerate(self.layers, 1):
            members = np.nonzero(layer[:, None] >> np.arange(slices) & 1)[1].reshape(len(layer), depth)
            self.parents.append(layer[:, None] ^ 1 << members)
        gained = (np.array(utility, dtype=float) - utility[0]) / (utility[-1] - utility[0] or 1)  # (L+1,)
        self.worth = np.diff(np.rint(chances * gained[:, None] * ONE).astype(np.int64), axis=0)  # (L, 2^L) of each cell
        self.spans = self.chain_costs[self.size][:, None] - self.chain_costs[:-1]  # (2^L, L) to a set from depth t
        self.nothing = np.zeros(1 << slices, dtype=bool)

    def family(self, tree: StageTree) -> Array:
        family = self.nothing.copy()
        for path in tree.sequences:
            family[list(itertools.accumulate((1 << index for index in path), operator.or_))] = True
        return family

    def tree(self, family: Array) -> StageTree:
        """Give each set the parent of the smallest path."""
        paths: dict[int, NodePath] = {0: ()}
        for subset in family.nonzero()[0].tolist():
            members = [index for index in range(self.slices) if subset >> index & 1]
            below = [(*paths[subset ^ 1 << last], last) for last in members if subset ^ 1 << last in paths]
            paths[subset] = min(below)
        return StageTree.from_sequences(self.slices, [path for path in paths.values() if path])

    def cost(self, family: Array) -> int:
        return int(self.costs[self.size[family]].sum())

    def value(self, family: Array) -> int:
        return int(self.worth[self.covers(family) > 0].sum())

    def rank(self, family: Array) -> tuple[int, int]:
        return self.value(family), -self.cost(family)

    def covers(self, family: Array) -> Array:
        """Count the sets of the family that cover each cell, (L, 2^L)."""
        counts = (self.own & family).astype("int16")
        for index in range(self.slices):
            pairs = counts.reshape(self.slices, -1, 2, 1 << index)
            pairs[:, :, 1] += pairs[:, :, 0]
        return counts

    def worth_where(self, cells: Array) -> Array:
        """Add up, for every set, those of the cells that it would cover, (L, 2^L) bool -> (2^L,)."""
        sums = self.worth * cells
        for index in range(self.slices):
            pairs = sums.reshape(self.slices, -1, 2, 1 << index)
            pairs[:, :, 0] += pairs[:, :, 1]
        return sums[self.own_cells]

    def chain(self, family: Array, room: int, barred: Array) -> list[int]:
        """Find the chain of most gain per cost that fits and does not end in a barred set: its new sets, or none.

        A new set covers, below its parent, what no set of its depth covers yet; so gains add up along a chain.
        """
        import numpy as np

        alone = self.worth_where(self.covers(family) == 0)  # (2^L,)
        gains = np.full(self.spans.shape, NO_CHAIN)  # (2^L, L) of the best chain to each set from depth t
        gains[0, 0] = 0
        for depth, (layer, parents) in enumerate(zip(self.layers, self.parents), 1):
            below = gains[parents].max(axis=1)  # (sets, L)
            gains[layer] = np.where(below == NO_CHAIN, NO_CHAIN, below + alone[layer, None])
            gains[layer[family[layer]], depth : depth + 1] = 0  # a chain starts here; one through here costs more
        ratio = np.where((gains > 0) & (self.spans <= room) & ~barred[:, None], gains / np.maximum(self.spans, 1), 0)
        if not (best := ratio.max()):
            return []
        ends = np.argwhere(ratio == best).tolist()
        last, start = min(ends, key=lambda end: (self.spans[end[0], end[1]], end[0]))
        chain = [last]
        while self.size[last] > start + 1:
            rest = gains[last, start] - alone[last]
            last = min(p for p in self.parents_of(last) if gains[p, start] == rest)
            chain.append(last)
        return chain

    def parents_of(self, subset: int) -> list[int]:
        return [subset ^ 1 << index for index in range(self.slices) if subset >> index & 1]

    def fill(self, family: Array, room: int, barred: Array | None = None) -> Array:
        """Add chains until none that gains anything fits."""
        filled = family.copy()
        while chain := self.chain(filled, room - self.cost(filled), self.nothing if barred is None else barred):
            filled[chain] = True
        return filled

    def swap(self, family: Array, room: int) -> Array:
        """Take out a chain and fill the room anew, at first without it, until that makes nothing better."""
        best, tried = family, None
        while tried is not best:
            tried = best
            for thinned in self.thinned(tried):
                other = self.fill(thinned, room, barred=tried & ~thinned)
                best = max(tried, self.fill(other, room), key=self.rank)
                if best is not tried:
                    break
        return best

    def thinned(self, family: Array) -> list[Array]:
        """Take out each chain that nothing hangs on; least loss per cost first."""
        found: list[tuple[float, int, Array]] = []
        lost_of, free_of = self.losses(family), self.free(family)
        for last in free_of.nonzero()[0].tolist():
            left, lost, free, loss = family, lost_of, free_of, 0
            while True:
                left = left.copy()
                left[last] = False
                loss += int(lost[last])
                found.append((loss / (self.cost(family) - self.cost(left)), len(found), left))
                before, free = free, self.free(left)
                if not (freed := (free & ~before).nonzero()[0].tolist()):
                    break
                lost = self.losses(left)
                last = min(freed, key=lambda subset: (lost[subset], subset))
        return [left for _, _, left in sorted(found, key=lambda item: item[:2])]

    def free(self, family: Array) -> Array:
        """Find the sets that are no other's only parent, (2^L,) bool."""
        fathered = self.nothing.astype("int8")
        rooted = family.copy()
        rooted[0] = True
        for index in range(self.slices):
            fathered.reshape(-1, 2, 1 << index)[:, 1] += rooted.reshape(-1, 2, 1 << index)[:, 0]
        only = family & (fathered == 1)
        needed = self.nothing.copy()
        for index in range(self.slices):
            needed.reshape(-1, 2, 1 << index)[:, 0] |= only.reshape(-1, 2, 1 << index)[:, 1]
        return family & ~needed

    def losses(self, family: Array) -> Array:
        return self.worth_where(self.covers(family) == 1)
