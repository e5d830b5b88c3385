"""``s3t plan``: the cost and the life of a plan, before any training."""

from __future__ import annotations

import argparse
from typing import Any

from s3t_ext.plan import STRATEGIES, StageTree, build, death, expected_depth

REQUESTS = (1, 2, 3, 4, 6, 8)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the plan's arguments."""
    parser.add_argument("--shards", type=int, default=5, help="m (default 5)")
    parser.add_argument("--slices", type=int, default=4, help="L, slices of a shard (default 4)")
    parser.add_argument("--strategy", default="subsets", help=f"one of {', '.join(STRATEGIES)} (default subsets)")
    parser.add_argument("--budget", type=int, help="B, sequences of a shard (rotation only)")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Report the plan and, beside it, the other strategies."""
    if args.shards < 1:
        raise ValueError(f"--shards: expected at least 1, got {args.shards}")
    report = describe(build(args.strategy, args.slices, args.budget), args.shards)
    report = {"strategy": args.strategy, "budget": args.budget, **report}
    rows = [(args.strategy, report)]
    for name in STRATEGIES:
        if name != args.strategy:
            try:
                rows.append(
                    (name, describe(build(name, args.slices, args.slices if name == "rotation" else None), args.shards))
                )
            except ValueError:
                continue  # this one does not exist at this size
    report["beside"] = dict(rows[1:])
    return 0, report, _text(args, rows)


def describe(tree: StageTree, shards: int) -> dict[str, Any]:
    """Give a plan's cost for one shard and its life under uniform requests."""
    exact = tree.slices <= 12
    return {
        "shards": shards,
        "slices": tree.slices,
        "stages": tree.stages,
        "slice_passes": tree.slice_passes,
        "layer_passes": tree.layer_passes,
        "sequences": len(tree.sequences),
        "deletion_rate": {
            "first": death(tree, shards).mean,
            "last": death(tree, shards, shards).mean,
        },
        "expected_depth": {str(r): expected_depth(tree, r).mean for r in REQUESTS} if exact else {},
    }


def _text(args: argparse.Namespace, rows: list[tuple[str, dict]]) -> str:
    lines = [
        f"{args.shards} shards of {args.slices} slices; stages and passes of one shard; requests hit slices uniformly",
        f"{'strategy':<12}{'stages':>8}{'passes':>8}{'sequences':>11}{'first death':>13}{'last death':>12}"
        + "".join(f"{'E depth r=' + str(r):>13}" for r in REQUESTS[:4]),
    ]
    for name, row in sorted(rows, key=lambda item: item[1]["slice_passes"]):
        depth = row["expected_depth"]
        lines.append(
            f"{name:<12}{row['stages']:>8}{row['slice_passes']:>8}{row['sequences']:>11}"
            f"{row['deletion_rate']['first']:>13.1f}{row['deletion_rate']['last']:>12.1f}"
            + "".join(f"{depth[str(r)]:>13.3f}" for r in REQUESTS[:4] if depth)
        )
    return "\n".join(lines)
