"""One table for every strategy: what a plan costs to train and to hold, and how long it lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        expected number of requests (None where it may never come); expected_depth by number of hits; with a floor
        depth_floor.
    """
    half = (shards + 1) // 2
    options: dict[str, Any] = {"prior": prior, "samples": samples, "seed": seed}
    report = {
        "shards": shards,
        "slices": tree.slices,
        "stages": tree.stages,
        "slice_passes": tree.slice_passes,
        "layer_passes": tree.layer_passes,
        "sequences": len(tree.sequences),
        "heads": len(tree.heads),
        "deletion_rate": {
            name: _finite(death(tree, shards, j, prior=prior).mean)
            for name, j in (("first", 1), ("half", half), ("last", shards))
        },
        "expected_depth": {str(r): expected_depth(tree, r, **options).mean for r in requests},
    }
    if floor is not None:
        report["depth_floor"] = _requests_to(tree, shards, floor, options)
    return report


def beside(
    tree: StageTree,
    budget: int | None,
    *,
    prior: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, StageTree]:
    """Build what every strategy makes of an equal budget.

    Args:
        tree: the plan to compare with; `greedy` gets its slice-passes, the others as many sequences.
        budget: number of sequences of a shard where the plan was made for one; None: as many as it has, up to L.

    Returns:
        The trees by strategy. Left out is what does not exist at this size, and `greedy` above 10 slices, where it
        takes ten seconds and more.
    """
    slices, trees = tree.slices, {}
    sequences = min(len(tree.sequences), slices) if budget is None else budget
    for name in STRATEGIES:
        if name in PRICED and slices > SEARCHED:
            continue
        wanted = tree.slice_passes if name in PRICED else sequences if name in BUDGETED else None
        with suppress(ValueError):
            trees[name] = build(name, slices, wanted, prior=prior if name in WEIGHED else None, seed=seed)
    return trees


def _finite(value: float) -> float | None:
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
