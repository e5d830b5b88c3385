"""Direct simulation of a plan under streams of requests: when shards die, and the depth that is kept.

It counts requests one by one and shares no formula with the closed forms, which it is there to check.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s3t_ext.plan.streams import Independent, Stream, check_count, chunks
from s3t_ext.plan.tree import NodePath, StageTree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEVER = 2**31 - 1
"""The time of what did not happen before the stream ended."""
PATIENCE = 1000  # default limit of an endless stream, in requests for each slice
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Simulation:
    """What each of R repetitions saw.

    Args:
        stops: by `first`, `last`, the number j and `floor`: requests until then, (R,) int32, `NEVER` if not reached.
        depths: by number of requests: mean depth of the shards after them, (R,), NaN where the stream ended before.
    """

    stops: dict[str, NDArray[np.int32]]
    depths: dict[int, NDArray[np.float64]]

    def summary(self, quantiles: Sequence[float] = QUANTILES) -> dict[str, Any]:
        """Return mean, standard error, quantiles and the number of repetitions that reached it, as plain types.

        Where not all repetitions reached a stop, its mean and standard error are None: the mean of those that did
        would be too small. Quantiles are order statistics, and None only where they lie among the others.
        """
        return {
            **{name: _summary(times, times != NEVER, quantiles) for name, times in self.stops.items()},
            "depth": {str(after): _summary(d, d == d, quantiles) for after, d in self.depths.items()},
        }


def mean_and_error(values: NDArray[Any]) -> dict[str, float | None]:
    """Return the mean of (R,) values and its standard error, sd / sqrt(R), None for R = 1."""
    count = len(values)
    mean = math.fsum(values) / count  # rounded once, so that equal values have no spread
    return {"mean": mean, "se": math.sqrt(math.fsum((values - mean) ** 2) / (count - 1) / count) if count > 1 else None}


def _summary(values: NDArray[Any], reached: NDArray[np.bool_], quantiles: Sequence[float]) -> dict[str, Any]:
    import numpy as np

    ordered = np.sort(values)  # what was not reached, NEVER or NaN, comes last
    ranks = [max(1, math.ceil(quantile * len(values))) for quantile in quantiles]
    count = int(reached.sum())
    return {
        **(mean_and_error(values) if count == len(values) else {"mean": None, "se": None}),
        "quantiles": {str(q): ordered[k - 1].item() if k <= count else None for q, k in zip(quantiles, ranks)},
        "reached": count,
    }


def simulate(
    tree: StageTree,
    shards: int,
    *,
    repeats: int = 1000,
    seed: int = 0,
    stream: Stream | None = None,
    j: int | None = None,
    floor: float | None = None,
    depth_after: Sequence[int] = (),
    limit: int | None = None,
) -> Simulation:
    """Simulate deletions on `shards` shards of one plan, `repeats` times.

    A node dies with the first hit on its path, a shard keeps depth k until its last node at depth k dies, and is dead
    when depth 1 is lost.

    Args:
        tree: the plan of every shard.
        shards: m.
        repeats: independent repetitions R.
        seed: of the streams; plans that share it meet the same requests.
        stream: law of the requests (default: independent and uniform).
        j: which death to time besides the first and the last, 1..m.
        floor: time when the mean depth of the shards falls below it, above 0 and at most the depth of the tree.
        depth_after: numbers of requests after which the mean depth is wanted.
        limit: requests after which a repetition is given up (default: the end of the stream, 1000 m L if it has none).

    Raises:
        ValueError: an argument out of range.

    Notes:
        First hits of all slices, (R, m, L), then a running minimum down the tree and a maximum over each of its levels;
        below the first level only if a floor or depths are asked for.
    """
    import numpy as np

    slices = tree.slices
    stream = Independent() if stream is None else stream
    for name, value, least in (("shards", shards, 1), ("repeats", repeats, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    _check_stops(tree, shards, j, floor, depth_after)
    if limit is None:
        limit = stream.length(shards, slices) or max(PATIENCE * shards * slices, *depth_after, 0)
    check_count("limit", limit)
    limit = min(limit, NEVER - 1)
    numbers = {"first": 1, **({} if j is None else {str(j): j}), "last": shards}
    waited = _waited(tree, shards, stream.reachable(shards, slices), floor)
    levels = _levels(tree)[: 1 if floor is None and not depth_after else None]
    names = [*numbers, *([] if floor is None else ["floor"])]
    found = Simulation(
        {name: np.empty(repeats, dtype=np.int32) for name in names}, {r: np.empty(repeats) for r in depth_after}
    )
    for start, count, blocks in chunks(stream, shards, slices, repeats, seed):
        rows = slice(start, start + count)
        hits, seen = _first_hits(blocks, (count, shards * slices), waited, limit, max(depth_after, default=0))
        lost = _lost(levels, hits.reshape(count * shards, slices)).reshape(-1, count, shards)
        deaths = np.sort(lost[0], axis=1)  # (R, m)
        for name, number in numbers.items():
            found.stops[name][rows] = deaths[:, number - 1]
        if floor is not None:
            found.stops["floor"][rows] = _falls_below(floor, lost)
        for after, depth in found.depths.items():
            depth[rows] = (lost > after).sum(axis=(0, 2)) / shards if after <= seen else np.nan
    return found


def _check_stops(tree: StageTree, shards: int, j: int | None, floor: float | None, depth_after: Sequence[int]) -> None:
    if j is not None and not (isinstance(j, int) and 1 <= j <= shards):
        raise ValueError(f"j: wanted 1..{shards}, got {j!r}")
    if floor is not None and not 0 < floor <= tree.depth:
        raise ValueError(f"floor: wanted above 0 and at most the tree's depth, {tree.depth}, got {floor!r}")
    for after in depth_after:
        check_count("depth_after", after, least=0)


def _waited(tree: StageTree, shards: int, reachable: NDArray[np.bool_], floor: float | None) -> NDArray[np.int64]:
    """Give the slices among m*L to wait for: with all heads hit every shard is dead, and below any floor."""
    import numpy as np

    heads = np.zeros(tree.slices, dtype=bool)
    heads[list(tree.heads)] = True
    first = np.tile(heads, shards)
    enough = floor is None or bool(reachable[first].all())
    return np.flatnonzero(first & reachable if enough else reachable)


def _first_hits(
    blocks: Iterator[NDArray[np.int64]], size: tuple[int, int], waited: NDArray[np.int64], limit: int, least: int
) -> tuple[NDArray[np.int32], int]:
    """Read requests until all `waited` slices are hit and `least` are read, or the limit or the end is reached.

    Returns:
        The request that hit each slice first, (R, m*L), from 1 on, or `NEVER`; and the number of requests read.
    """
    import numpy as np

    hits = np.full(size, NEVER, dtype=np.int32)  # (R, m*L)
    rows = np.arange(size[0])[:, None] * size[1]
    seen = 0
    for block in blocks:
        block = block[:, : limit - seen]  # (R, T)
        when = np.broadcast_to(np.arange(seen + 1, seen + 1 + block.shape[1], dtype=np.int32), block.shape)
        np.minimum.at(hits.reshape(-1), (block + rows).reshape(-1), when.reshape(-1))
        seen += block.shape[1]
        if seen == limit or (seen >= least and (hits[:, waited] != NEVER).all()):
            break
    return hits, seen


def _falls_below(floor: float, lost: NDArray[np.int32]) -> NDArray[np.int32]:
    """Compute when the mean depth falls below the floor, (R,), from when each shard loses each depth, (D, R, m)."""
    import numpy as np

    depths, repeats, shards = lost.shape
    keep = bisect.bisect_left(range(depths * shards), floor, key=lambda total: total / shards)
    place = depths * shards - keep  # losing this one, in order of time, leaves keep - 1
    return np.partition(lost.swapaxes(0, 1).reshape(repeats, -1), place, axis=1)[:, place]


def _levels(tree: StageTree) -> list[tuple[list[int], list[int]]]:
    """List, for each depth, the position of every node's parent one level up, and the slice that the node adds."""
    levels: list[tuple[list[int], list[int]]] = []
    above: dict[NodePath, int] = {(): 0}
    for _, group in itertools.groupby(tree.nodes, key=len):
        paths = list(group)
        levels.append(([above[path[:-1]] for path in paths], [path[-1] for path in paths]))
        above = {path: position for position, path in enumerate(paths)}
    return levels


def _lost(levels: Sequence[tuple[list[int], list[int]]], hits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Compute when each shard loses each depth, (D, N), from the first hits of its slices, (N, L).

    T(node) = min(T(parent), hit(slice)),   U_k = max of T over the nodes at depth k
    """
    import numpy as np

    rows = np.ascontiguousarray(hits.T)  # (L, N): whole rows are gathered
    alive = rows[levels[0][1]]  # (nodes, N)
    lost = [alive.max(axis=0)]
    for parents, slices in levels[1:]:
        alive = np.minimum(alive[parents], rows[slices])  # (nodes, N)
        lost.append(alive.max(axis=0))
    return np.stack(lost)  # (D, N)
