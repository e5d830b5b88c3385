"""Deletion rate and retraining frequency of plans under uniform requests: in closed form, and counted one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from s3t_ext.plan import StageTree, build, death

SHARDS, SLICES = 5, 4
REQUESTS = 50_000  # counted, of each plan


def plans() -> dict[str, tuple[StageTree, int]]:
    """Give the plans to compare, each with its number of shards."""
    staged = {"sisa": None, "rotation": SLICES, "subsets": None}
    trees = {name: (build(name, SLICES, budget), SHARDS) for name, budget in staged.items()}
    return {"one-slice": (build("sisa", 1), SHARDS * SLICES), **trees}


def rates(seed: int) -> Iterator[dict[str, Any]]:
    """Tell what requests cost each plan: until shards are dead, and in the long run where a dead shard is retrained.

    Beside them what is retrained at each request: SISA's shard from the slice that was hit on, and all data.
    """
    for name, (tree, shards) in plans().items():
        hits = death(tree, 1, 1).mean  # on one shard, until it is dead
        retrainings, passes = counted(tree, shards, seed)
        for metric, value, exact in (
            ("cost", shards * tree.slice_passes, None),
            ("first", None, death(tree, shards, 1).mean),
            ("last", None, death(tree, shards, shards).mean),
            ("retrainings", retrainings, 1 / hits),
            ("passes", passes, tree.slice_passes / hits),
        ):
            unit = {"cost": "slice-passes", "first": "requests", "last": "requests", "passes": "slice-passes a request"}
            row = {"method": name, "metric": metric, "unit": unit.get(metric, "a request")}
            yield from ([row | {"value": value, "x": "counted"}] if value is not None else [])
            yield from ([row | {"value": exact, "x": "exact"}] if exact is not None else [])
    sisa = build("sisa", SLICES)
    onwards = [sum(range(k, SLICES + 1)) for k in range(1, SLICES + 1)]
    for name, cost, passes in (
        ("sisa at once", SHARDS * sisa.slice_passes, fmean(onwards)),
        ("all at once", SHARDS * SLICES, SHARDS * SLICES),
    ):
        row = {"method": name, "x": "exact"}
        yield row | {"metric": "cost", "value": cost, "unit": "slice-passes"}
        yield row | {"metric": "retrainings", "value": 1, "unit": "a request"}
        yield row | {"metric": "passes", "value": passes, "unit": "slice-passes a request"}


def counted(tree: StageTree, shards: int, seed: int, requests: int = REQUESTS) -> tuple[float, float]:
    """Play requests one by one, retraining all of a shard when it is dead.

    Returns:
        Retrainings a request, and slice-passes a request.
    """
    rng, dirty, retrained = random.Random(seed), [set() for _ in range(shards)], 0
    for _ in range(requests):
        shard = dirty[rng.randrange(shards)]
        shard.add(rng.randrange(tree.slices))
        if not tree.best_live(shard):
            shard.clear()
            retrained += 1
    return retrained / requests, retrained * tree.slice_passes / requests
