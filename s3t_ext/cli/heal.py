"""``s3t heal``: dirty slices less the deleted are clean slices, and what is missing is trained while others serve."""

from __future__ import annotations

import argparse

from s3t_ext.cli.settings import add_settings, settings
from s3t_ext.cli.store import told
from s3t_ext.system.wording import counted


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

    for name, value in (("budget", args.budget), ("minutes", args.minutes)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name}: expected more than 0, got {value:g}: nothing would be trained")
    if args.dry_run and args.minutes is not None:
        raise ValueError("--minutes: expected none beside --dry-run, which does not know how long a pass takes")
    report = heal(
        args.store,
        budget=args.budget,
        minutes=args.minutes,
        dry_run=args.dry_run,
        settings=settings(args),
        progress=not args.json,
    )
    left, change = report["left"], f"depths {report['depths_before']} {{}} {report['depths_after']}"
    trained = f"{counted(report['nodes'], 'node')} trained in {counted(report['slice_passes'], 'slice-pass')}"
    if args.dry_run:
        text = f"nothing changed; {counted(report['slices'], 'slice')} would be clean again, less the deleted, and "
        text += f"{trained}; {change.format('would become')}"
    else:
        text = f"clean again: {counted(len(report['healed']), 'slice')}, less "
        text += f"{counted(report['dropped'], 'deleted subject')}; {trained}; {change.format('became')}"
    if left["nodes"]:
        text += f"; left: {counted(left['nodes'], 'node')}, {counted(left['slice_passes'], 'slice-pass')}"
    if out := report["not_trained_on"]:
        text += f"; nothing is trained on what was given up, slice {', '.join(out)}, until `s3t restore` brings it back"
    return int(bool(report["lost_slices"])), report, text + told(report)
