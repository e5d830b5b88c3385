"""One table for every strategy: what a plan costs to train and to hold, and how long it lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from s3t_ext.plan.depth import expected_depth
from s3t_ext.plan.strategies import BUDGETED, PRICED, STRATEGIES, WEIGHED, build
from s3t_ext.plan.theory import death
from s3t_ext.plan.tree import StageTree

LONG = 64  # requests for each slice after which a depth counts as never lost: e^-64 of a clean slice is left
SEARCHED = 10  # slices up to which `greedy` stands in the table


def describe(
    tree: StageTree,
    shards: int,
    *,
    prior: Sequence[float] | None = None,
    requests: Sequence[int] = (),
    floor: float | None = None,
    samples: int = 20_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give a plan's cost, of one shard, and its life, under independent requests.

    Args:
        tree: the plan of every shard.
        shards: m.
        prior: probability that a request hits each slice of its shard, (L,); None: uniform.
        requests: numbers of hits on one shard at which to give its expected depth.
        floor: a depth above 0; adds the requests to the system after which the expected depth of a shard is below it.
        samples, seed: of the expected depth above 12 slices, where it is sampled.

    Returns:
        stages, slice_passes, layer_passes, sequences, heads; deletion_rate: first, half and last death, each an
        expected number of requests (None where it may never come), deletion_sd: their standard deviations;
        expected_depth by number of hits, expected_depth_se: 0 where it is exact; with a floor depth_floor.
    """
    half = (shards + 1) // 2
    options: dict[str, Any] = {"prior": prior, "samples": samples, "seed": seed}
    deaths = {name: death(tree, shards, j, prior=prior) for name, j in (("first", 1), ("half", half), ("last", shards))}
    depths = {str(r): expected_depth(tree, r, **options) for r in requests}
    report: dict[str, Any] = {
        "shards": shards,
        "slices": tree.slices,
        "stages": tree.stages,
        "slice_passes": tree.slice_passes,
        "layer_passes": tree.layer_passes,
        "sequences": len(tree.sequences),
        "heads": len(tree.heads),
        "deletion_rate": {name: finite(moments.mean) for name, moments in deaths.items()},
        "deletion_sd": {name: finite(moments.sd) for name, moments in deaths.items()},
        "expected_depth": {r: estimate.mean for r, estimate in depths.items()},
        "expected_depth_se": {r: estimate.se for r, estimate in depths.items()},
    }
    if floor is not None:
        report["depth_floor"] = _requests_to(tree, shards, floor, options)
    return report


def beside(
    tree: StageTree, sequences: int | None = None, *, prior: Sequence[float] | None = None, seed: int = 0
) -> dict[str, StageTree]:
    """Build what every strategy makes of an equal budget.

    Args:
        tree: the plan to compare with.
        sequences: its budget, where it was made for one: the others get as many. None: they get as many as its
            slice-passes pay for. `greedy` gets the slice-passes in either case.

    Returns:
        The trees by strategy. Left out is what does not exist at this size, and `greedy` above 10 slices, where it
        takes ten seconds and more.
    """
    trees: dict[str, StageTree] = {}
    for name in STRATEGIES:
        reads = prior if name in WEIGHED else None

        def made(budget: int | None, name: str = name, reads: Sequence[float] | None = reads) -> StageTree:
            return build(name, tree.slices, budget, prior=reads, seed=seed)

        with suppress(ValueError):
            if name in PRICED:
                if tree.slices <= SEARCHED:
                    trees[name] = made(tree.slice_passes)
            elif name not in BUDGETED:
                trees[name] = made(None)
            elif sequences is None:
                trees[name] = made(_affordable(made, tree))
            else:
                trees[name] = made(sequences)
    return trees


def _affordable(made: Callable[[int], StageTree], tree: StageTree) -> int:
    """Find how many sequences cost at most the slice-passes of a tree, by bisection; one at least."""
    low, high = 1, min(tree.slice_passes // tree.slices + 1, math.factorial(tree.slices)) + 1  # L for each last node
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if made(middle).slice_passes <= tree.slice_passes else (low, middle)
    return low


def finite(value: float) -> float | None:
    """Give None for what JSON has no number: a time that never comes."""
    return value if math.isfinite(value) else None


def _requests_to(tree: StageTree, shards: int, floor: float, options: dict[str, Any]) -> int | None:
    """Find the first number of requests after which the expected depth of a shard is below a floor; None: far off."""
    if not 0 < floor <= tree.slices:
        raise ValueError(f"floor: wanted a depth above 0 and up to {tree.slices}, got {floor}")

    def below(requests: int) -> bool:
        return expected_depth(tree, requests, shards=shards, **options).mean < floor

    low, high = -1, 0
    while not below(high):
        low, high = high, max(1, 2 * high)
        if high > LONG * shards * tree.slices:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if below(middle) else (middle, high)
    return high
