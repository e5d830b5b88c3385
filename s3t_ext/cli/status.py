"""``s3t status``: the state of a store."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import told
from s3t_ext.system.wording import counted

BELOW = 3


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and the floor."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "--floor",
        type=float,
        metavar="D",
        help="status 3 where the mean depth of the shards is below (default: as fit)",
    )
    parser.add_argument(
        "--shard-floor", type=float, metavar="D", help="status 3 where the depth of a shard is below (default: as fit)"
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Report the state and what healing would bring; status 3 below the floor, 2 locked, 1 where a slice is lost."""
    from s3t_ext.system.folder import Floor, StoreFolder
    from s3t_ext.system.status import status

    declared = StoreFolder(args.store).floor
    floor = Floor(
        declared.mean if args.floor is None else args.floor,
        declared.shard if args.shard_floor is None else args.shard_floor,
    )
    report = status(args.store, floor)
    nodes, healing = report["nodes"], report["healing"]
    generations = len(report["generations"])
    several = f" in {generations} generations" if generations > 1 else ""
    dirty = nodes["planned"] - nodes["live"]
    text = (
        f"{args.store}: {counted(report['shards'], 'shard')} of {counted(report['slices'], 'slice')}{several}, "
        f"{report['strategy']}, placement {report['placement']}\n"
        f"depth of each shard: {report['depths']}  mean: {report['mean_depth']:.2f}  dirty slices: "
        f"{len(report['dirty'])}\n"
        f"nodes: {nodes['trained']} serving or ready, {nodes['missing']} to train, of {nodes['planned']} planned"
        f"{f', of which {dirty} are on dirty slices, trained before or not' if dirty else ''}\n"
        f"requests: {report['requests']}, erasure pending for {report['pending_erasure']}, certified "
        f"{report['states']['certified']}"
    )
    if report["next_deadline"]:
        text += f", next deadline {report['next_deadline']}"
    if healing["nodes"]:
        text += (
            f"\n`s3t heal` would train {counted(healing['nodes'], 'node')} in "
            f"{counted(healing['slice_passes'], 'slice-pass')}, to depths {healing['depths_after']}"
        )
    if report["overdue"]:
        text += f"\npast their deadline and not erased: {', '.join(report['overdue'])}"
    for line in report["below"]:
        text += f"\nbelow the floor: {line}"
    if report["locked"]:
        text += f"\nnothing can be served, deleted or trained: {report['locked']}"
    text += told(report)
    return 2 if report["locked"] else BELOW if report["below"] else int(bool(report["lost_slices"])), report, text
