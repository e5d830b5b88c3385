"""``s3t demo``: the main job on the embedded default."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add where to put the results, and the seed."""
    parser.add_argument("--out", default="s3t-demo", help="new folder for report, figure and store (default s3t-demo)")
    parser.add_argument("--seed", type=int, default=0, help="of data split, base, key and requests")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Run the demo; status 1 if any verified node differs."""
    from s3t_ext.demo import run as run_demo

    report, text = run_demo(args.out, args.seed, quiet=args.json)
    return (1 if report["verify"]["mismatched"] else 0), report, text
