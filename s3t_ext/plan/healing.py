"""Healing: in which order missing nodes are worth training, and a simulation of a system that heals on and on."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from s3t_ext.plan.depth import LATTICE_LIMIT
from s3t_ext.plan.greedy import ONE, chances
from s3t_ext.plan.prior import check_prior
from s3t_ext.plan.simulate import mean_and_error
from s3t_ext.plan.streams import Independent, Stream, check_count, chunks
from s3t_ext.plan.tree import Node, NodePath, StageTree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_RATE = 1e9
WEIGHED = 1 << 18  # nodes x sets of slices up to which every set is weighed, node by node: a second at most


def healing_order(tree: StageTree, trained: Sequence[Collection[NodePath]]) -> list[Node]:
    """Order the missing nodes of several shards, most valuable first.

        value of a shard = mean over r = 0..2L of E[depth after r more hits on it]

    Again and again the chain of missing nodes is taken, of all shards, that gains most value per slice-pass. What gains
    nothing comes last, shallow nodes first.

    Args:
        tree: the plan of every shard.
        trained: of each shard the live nodes that it has.

    Returns:
        Every missing (shard, path), parents first.

    Notes:
        Of large plans (more than 12 slices, or more than 2^18 nodes x sets of slices) the value is the depth now. A
        function of the plan and of what is trained alone: of equals the cheapest chain, the first path, the lowest
        shard. The shards' values add up, so each has an order of its own, and these are merged.
    """
    worth = _Worth(tree)
    chains = {key: worth.chains(key) for key in {frozenset(paths) for paths in trained}}
    queues = [iter(chains[frozenset(paths)]) for paths in trained]
    heads = [(*head, shard) for shard, queue in enumerate(queues) if (head := next(queue, None))]
    heapq.heapify(heads)
    order: list[Node] = []
    while heads:
        *_, chain, shard = heads[0]
        order += [(shard, path) for path in chain]
        head = next(queues[shard], None)
        heapq.heapreplace(heads, (*head, shard)) if head else heapq.heappop(heads)
    return order


_Chain = tuple[float, int, tuple[NodePath, ...]]
"""What it gains per slice-pass, negative; its cost in slice-passes; its nodes, parents first."""


class _Worth:
    """What nodes of a plan are worth on every set of clean slices (columns), or on all slices alone."""

    def __init__(self, tree: StageTree) -> None:
        import numpy as np

        self.nodes = tree.nodes
        slices = tree.slices
        every = slices <= LATTICE_LIMIT and len(self.nodes) << slices <= WEIGHED
        sets = np.arange(1 << slices) if every else np.array([-1])  # (S,) bit i: slice i is clean
        self.weights = np.rint(chances(check_prior(slices), None) * ONE).astype(np.int64) if every else np.array([ONE])
        rows: dict[NodePath, Any] = {(): np.zeros(len(sets), np.int64)}
        for path in self.nodes:  # the depth that is left of each path where only these slices are clean
            held = sum(1 << k for k in path) if every else 0
            rows[path] = np.where(sets & held == held, len(path), rows[path[:-1]])
        self.depth = np.stack([rows[path] for path in self.nodes])  # (nodes, S)
        place = {path: number for number, path in enumerate(self.nodes)}
        self.layers = []  # of each depth, which ends of paths there are, and their parents
        for depth in range(1, tree.depth + 1):
            layer = [number for path, number in place.items() if len(path) == depth]
            self.layers.append((np.array(layer), np.array([place.get(self.nodes[n][:-1], -1) for n in layer])))

    def chains(self, trained: Collection[NodePath]) -> list[_Chain]:
        """Give the order of one shard's missing nodes, in chains."""
        import numpy as np

        have, found = set(trained), list[_Chain]()
        own = np.array([0 if path in have else len(path) for path in self.nodes])  # (nodes,) cost of each, if missing
        while own.any():
            costs = np.append(own, 0)  # of all that is missing on the way to each; the last one: of no node
            for layer, parents in self.layers:
                costs[layer] += costs[parents]
            costs = costs[:-1]  # (nodes,)
            best = np.max(self.depth, axis=0, where=(costs == 0)[:, None], initial=0)  # (S,)
            rates = (np.maximum(self.depth, best) - best) @ self.weights / np.maximum(costs, 1)  # (nodes,)
            if not rates.max():
                return found + [(0.0, len(path), (path,)) for path, left in zip(self.nodes, own, strict=True) if left]
            at = min(np.flatnonzero(rates == rates.max()), key=lambda n: (costs[n], n))
            path = self.nodes[at]
            chain = tuple(path[:depth] for depth in range(1, len(path) + 1) if path[:depth] not in have)
            found.append((-float(rates[at]), int(costs[at]), chain))
            have.update(chain)
            own = np.array([0 if path in have else len(path) for path in self.nodes])
        return found


@dataclass(frozen=True)
class Healing:
    """Averages over time after the burn-in, one for each of R repetitions.

    Args:
        depth: mean depth of the shards, (R,).
        available: share of time in which every shard has a live node, (R,).
        live: mean share of shards that have one, (R,).
    """

    depth: NDArray[np.float64]
    available: NDArray[np.float64]
    live: NDArray[np.float64]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return mean and standard error of each over the repetitions, as plain types."""
        return {name: mean_and_error(getattr(self, name)) for name in ("depth", "available", "live")}


def simulate_healing(
    tree: StageTree,
    shards: int,
    rate: float,
    *,
    burn_in: int | None = None,
    requests: int | None = None,
    repeats: int = 200,
    seed: int = 0,
    stream: Stream | None = None,
) -> Healing:
    """Simulate deletions and retraining on `shards` shards of one plan, from full depth on.

    One request arrives in each unit of time. A hit slice, less its deleted record, is clean again at once, but the
    nodes on it are missing until they are retrained. One job at a time trains one missing node whose parent is live,
    for as many slice-passes as the node is deep, and runs to its end unless its path is hit: then its work is lost.
    The next job goes to the shard of least depth among those that miss nodes (ties: lowest index); in it to the first
    missing node on the cheapest way to one more stage of depth (ties: lowest path), or at full depth to the first of
    its missing nodes by (depth, path).

    Args:
        tree: the plan of every shard.
        shards: m.
        rate: rho, slice-passes of training between two requests; 0: none.
        burn_in: requests before the averages begin (default: 5 m L).
        requests: requests over which they are taken (default: 20 m L).
        repeats: independent repetitions R.
        seed: of the streams; equal seeds meet the requests that `simulate` meets.
        stream: law of the requests (default: independent and uniform).

    Raises:
        ValueError: an argument out of range, or a stream that ends before burn-in and requests are over.

    Notes:
        Time is counted in integers (rho as a fraction with a denominator of at most 10^6), so that a job that ends as a
        request arrives has always ended before it. The averages are exact integrals over time. Every job is a step of
        its own, over R x nodes numbers: a fast rate on a large plan takes its time.
    """
    import numpy as np

    for name, value, least in (("shards", shards, 1), ("repeats", repeats, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    stream = Independent() if stream is None else stream
    pace = _pace(rate)
    burn_in = 5 * shards * tree.slices if burn_in is None else burn_in
    requests = 20 * shards * tree.slices if requests is None else requests
    for name, value, least in (("burn_in", burn_in, 0), ("requests", requests, 1)):
        check_count(name, value, least)
    length = stream.length(shards, tree.slices)
    if length is not None and length < burn_in + requests:
        raise ValueError(f"stream: wanted at least {burn_in + requests} requests, burn-in included, it has {length}")
    found = np.zeros((3, repeats))
    for start, count, blocks in chunks(stream, shards, tree.slices, repeats, seed):
        system = _Systems(tree, shards, count, pace)
        for number, hits in zip(range(burn_in + requests), _columns(blocks)):
            system.hit(hits)
            area = system.train()
            if number >= burn_in:
                found[:, start : start + count] += area / requests
    return Healing(*found)


def _pace(rate: float) -> Fraction:
    if math.isfinite(rate) and 0 <= rate <= MAX_RATE:
        pace = Fraction(rate).limit_denominator(10**6)
        if pace or not rate:
            return pace
    raise ValueError(f"rate: wanted 0 or 1e-6..{MAX_RATE:g} slice-passes a request, got {rate!r}")


def _columns(blocks: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    for block in blocks:
        yield from block.T


class _Systems:
    """R independent systems of m shards. A unit of time is `ticks` long, a slice-pass of training `cost` ticks.

    `kept` (R, m, nodes) is the number of live stages on the path of each node. A parent is live whenever its child is,
    so these are the first ones; the node is live when all are, and the depth of a shard is the greatest of them.
    """

    def __init__(self, tree: StageTree, shards: int, repeats: int, pace: Fraction) -> None:
        import numpy as np

        self.ticks, self.cost = pace.numerator, pace.denominator
        place = {path: number for number, path in enumerate(tree.nodes)}
        self.size = np.array([len(path) for path in tree.nodes], dtype=np.int16)  # (nodes,)
        self.full = tree.depth
        self.stage = np.full((tree.depth, len(place)), -1, dtype=np.int32)  # (D, nodes) at each depth of a path
        self.before = np.tile(self.size, (tree.slices, 1))  # (L, nodes) stages on the path before the slice
        for path, number in place.items():
            for depth, slice_ in enumerate(path):
                self.stage[depth, number] = place[path[: depth + 1]]
                self.before[slice_, number] = depth
        self.kept = np.tile(self.size, (repeats, shards, 1))
        self.depth = np.full((repeats, shards), tree.depth)
        self.whole = np.ones((repeats, shards), dtype=bool)  # no node is missing
        self.job = np.full(repeats, -1)  # the node in training, -1: none
        self.shard = np.zeros(repeats, dtype=np.int64)
        self.work = np.zeros(repeats, dtype=np.int64)  # ticks until it is done

    def hit(self, requests: NDArray[np.int64]) -> None:
        """Let a request (R,) arrive in each system."""
        import numpy as np

        shard, slice_ = np.divmod(requests, len(self.before))
        self.job[(shard == self.shard) & (self.before[slice_, self.job] < self.size[self.job])] = -1
        rows = np.arange(len(requests))
        self._set(rows, shard, np.minimum(self.kept[rows, shard], self.before[slice_]))

    def train(self) -> NDArray[np.float64]:
        """Let a unit of time pass; return the integrals over it of mean depth, availability and live shards, (3, R)."""
        import numpy as np

        area = np.zeros((3, len(self.job)))
        left = np.full(len(self.job), max(self.ticks, 1))
        rows = np.arange(len(self.job)) if self.ticks else np.arange(0)
        while len(rows := self._employ(rows)):
            step = np.minimum(left[rows], self.work[rows])
            area[:, rows] += self._state(rows) * (step / self.ticks)
            left[rows] -= step
            self.work[rows] -= step
            self._publish(rows[self.work[rows] == 0])
            rows = rows[left[rows] > 0]
        idle = np.flatnonzero(left)
        area[:, idle] += self._state(idle) * (left[idle] / max(self.ticks, 1))
        return area

    def _state(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        import numpy as np

        live = self.depth[rows] > 0
        return np.stack([self.depth[rows].mean(axis=1), live.all(axis=1), live.mean(axis=1)])

    def _employ(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give a job to those of the systems `rows` that have none; return those that then have one."""
        import numpy as np

        free = rows[self.job[rows] < 0]
        need = np.where(self.whole[free], self.full + 1, self.depth[free])  # (free, m)
        shard = need.argmin(axis=1)
        missing = ~self.whole[free, shard]
        free, shard = free[missing], shard[missing]
        kept, depth = self.kept[free, shard], self.depth[free, shard]  # (free, nodes), (free,)
        # One stage deeper, the node with most live stages above it is cheapest; at full depth no node is that deep.
        goal = np.where(self.size == depth[:, None] + 1, kept, -1).argmax(axis=1)
        goal = np.where(depth == self.full, (kept < self.size).argmax(axis=1), goal)
        node = self.stage[kept[np.arange(len(free)), goal], goal]
        self.job[free], self.shard[free], self.work[free] = node, shard, self.size[node] * self.cost
        return rows[self.job[rows] >= 0]

    def _publish(self, rows: NDArray[np.int64]) -> None:
        node, shard = self.job[rows], self.shard[rows]
        below = node[:, None] == self.stage[self.size[node] - 1]  # (rows, nodes) the node and its descendants
        self._set(rows, shard, self.kept[rows, shard] + below)
        self.job[rows] = -1

    def _set(self, rows: NDArray[np.int64], shard: NDArray[np.int64], kept: NDArray[np.int16]) -> None:
        self.kept[rows, shard] = kept
        self.depth[rows, shard] = kept.max(axis=1)
        self.whole[rows, shard] = (kept == self.size).all(axis=1)
