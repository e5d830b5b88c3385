"""``s3t status``: the state of a store."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store."""
    parser.add_argument("store", metavar="STORE")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Report depths, dirty slices, nodes and requests."""
    from s3t_ext.system.unlearn import status

    report = status(args.store)
    nodes = report["nodes"]
    text = (
        f"{args.store}: {report['shards']} shards of {report['slices']} slices, {report['strategy']}, placement "
        f"{report['placement']}\n"
        f"depth of each shard: {report['depths']}  dirty slices: {len(report['dirty'])}\n"
        f"nodes: {nodes['trained']} serving or ready, {nodes['missing']} to train, of {nodes['planned']} planned\n"
        f"requests: {report['requests']}, erasure pending for {report['pending_erasure']}, certified "
        f"{report['states']['certified']}"
    )
    if report["overdue"]:
        text += f"\npast their deadline and not erased: {', '.join(report['overdue'])}"
    return 0, report, text
