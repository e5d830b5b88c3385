"""``s3t heal``: dirty slices less the deleted are clean slices, and what is missing is trained while others serve."""

from __future__ import annotations

import argparse

from s3t_ext.cli.losses import told
from s3t_ext.cli.settings import add_settings, settings


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and the limits."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("--budget", type=int, metavar="N", help="slice-passes to train (a node of depth i costs i)")
    parser.add_argument("--minutes", type=float, metavar="T", help="begin no pass after so many")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; tell what it would bring")
    add_settings(parser)


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Heal, and report depths before and after; status 1 where a slice is lost."""
    from s3t_ext.system.heal import heal

    report = heal(
        args.store,
        budget=args.budget,
        minutes=args.minutes,
        dry_run=args.dry_run,
        settings=settings(args),
        progress=not args.json,
    )
    left, change = report["left"], f"depths {report['depths_before']} {{}} {report['depths_after']}"
    if args.dry_run:
        text = (
            f"nothing changed; {report['slices']} slices would be clean again, less the deleted, and {report['nodes']} "
            f"nodes trained in {report['slice_passes']} slice-passes; {change.format('would become')}"
        )
    else:
        text = (
            f"{len(report['healed'])} slices are clean again, less {report['dropped']} deleted subjects; "
            f"{report['nodes']} nodes trained in {report['slice_passes']} slice-passes; {change.format('became')}"
        )
    if left["nodes"]:
        text += f"; {left['nodes']} nodes, {left['slice_passes']} slice-passes, are left"
    return int(bool(report["lost_slices"])), report, text + told(report)
