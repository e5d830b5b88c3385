"""Which nodes a service answers with, and which it holds: functions of the live nodes, the memory and the prior."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from s3t_ext.plan import Node, NodePath


class Served(NamedTuple):
    """A path that answers, and the weight of its answer; the weights of all sum to 1."""

    shard: int
    path: NodePath
    weight: float


def rooted(nodes: Collection[Node]) -> set[Node]:
    """Keep the nodes whose ancestors are all among them."""
    kept: set[Node] = set()
    for shard, path in sorted(nodes, key=lambda node: len(node[1])):
        if len(path) == 1 or (shard, path[:-1]) in kept:
            kept.add((shard, path))
    return kept


def maximal(nodes: Collection[Node]) -> list[Node]:
    """List the rooted nodes that no other one continues: by shard, the deepest first."""
    kept = rooted(nodes)
    inner = {(shard, path[:-1]) for shard, path in kept}
    return sorted(kept - inner, key=lambda node: (node[0], -len(node[1]), node[1]))


def weighted(paths: Sequence[Node]) -> tuple[Served, ...]:
    """Weigh paths: a shard by its depth, and within it each path by its own.

    weight(p) = D_s / sum of D over shards * d_p / sum of d over the paths of s,   D_s = deepest path of s
    """
    depths: dict[int, list[int]] = defaultdict(list)
    for shard, path in paths:
        depths[shard].append(len(path))
    total = sum(map(max, depths.values()))
    return tuple(
        Served(shard, path, max(depths[shard]) / total * (len(path) / sum(depths[shard]))) for shard, path in paths
    )


def to_hold(
    live: Collection[Node], answering: Sequence[Node], room: Sequence[int], prior: Sequence[float] | None = None
) -> list[Node]:
    """Choose the nodes to hold in memory, the most needed first, each after its ancestors.

    First the paths that answer, all of them down to depth 1, then to depth 2, and so on; then the deepest path that
    each shard would have after one more deletion, the likeliest first; then all others, shallow ones first.

    Args:
        live: nodes in the store that may serve; ``answering``: those of them that answer, while all are held.
        room: slots for nodes at each depth, (L,), or one number for all depths together.
        prior: probability of a deletion in each slice, (L,); None: uniform.
    """
    left, chosen = list(room), dict[Node, None]()

    def add(shard: int, path: NodePath) -> None:
        for depth in range(1, len(path) + 1):
            column = min(depth, len(left)) - 1
            if (shard, path[:depth]) in chosen:
                continue
            if not left[column]:
                return
            left[column] -= 1
            chosen[shard, path[:depth]] = None

    for depth in range(1, 1 + max((len(path) for _, path in answering), default=0)):
        for shard, path in answering:
            add(shard, path[:depth])
    for shard, path in _next(live, prior):
        add(shard, path)
    for shard, path in sorted(rooted(live), key=lambda node: (len(node[1]), node[1], node[0])):
        add(shard, path)
    return list(chosen)


def _next(live: Collection[Node], prior: Sequence[float] | None) -> list[Node]:
    """List the deepest path of each shard after one more deletion in any of its slices, the likeliest first."""
    chance: dict[Node, float] = defaultdict(float)
    left: dict[int, set[int]] = defaultdict(set)  # slices of a shard without which its best path is not known yet
    slices = {k for _, path in live for k in path}
    for shard, path in sorted(rooted(live), key=lambda node: (-len(node[1]), node[1])):
        missed = left.setdefault(shard, set(slices)) - set(path)
        for k in sorted(missed):
            chance[shard, path] += 1.0 if prior is None else prior[k]
        left[shard] -= missed
    return sorted(chance, key=lambda node: (-chance[node], -len(node[1]), node))


def rooms(memory: int | None, costs: Sequence[int], wished: Sequence[int], needed: Sequence[int]) -> list[int]:
    """Share out memory among pools.

    Args:
        memory: bytes, None: no limit.
        costs: bytes of a slot of each pool; ``wished``, ``needed``: slots, at most and at least.

    Returns:
        Slots of each pool: what is needed, then one more for each pool in turn, as long as something fits.

    Raises:
        ValueError: memory that is less than needed.
    """
    if memory is None:
        return list(wished)
    given = list(needed)
    left = memory - sum(n * cost for n, cost in zip(given, costs, strict=True))
    if left < 0:
        raise ValueError(
            f"memory: expected at least {memory - left} bytes, for the paths that answer and one more, got {memory}"
        )
    while open_ := [i for i, n in enumerate(given) if n < wished[i] and costs[i] <= left]:
        rounds = min(left // sum(costs[i] for i in open_), *(wished[i] - given[i] for i in open_))
        for i in open_:
            more = max(rounds, int(costs[i] <= left))
            given[i] += more
            left -= more * costs[i]
    return given


def by_shard(served: Sequence[Served], shards: int) -> tuple[int, ...]:
    """Give the depth at which each shard answers."""
    depths = [0] * shards
    for shard, path, _ in served:
        depths[shard] = max(depths[shard], len(path))
    return tuple(depths)
