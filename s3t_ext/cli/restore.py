"""``s3t restore``: bring a store back from a backup, and nobody who was deleted with it."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import told
from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add backup, store, and where to find what the backup does not know."""
    parser.add_argument("backup", metavar="BACKUP", help="a folder that `s3t backup` wrote")
    parser.add_argument("store", metavar="STORE", help="its place; what is whole there stays")
    parser.add_argument("--ledger", metavar="FILE", help="a newer copy of ledger.sqlite")
    parser.add_argument("--receipts", metavar="FILE", nargs="+", default=[], help="signed receipts, or folders of them")
    parser.add_argument("--backup-key", metavar="FILE", help="the store key of the backup, if the store has a new one")
    parser.add_argument(
        "--without-anchor", action="store_true", help="the outer anchor is lost: go on with the requests that are here"
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Restore and report; status 1 where a slice is lost here and there."""
    from s3t_ext.system.restore import restore

    report = restore(
        args.backup,
        args.store,
        args.ledger,
        args.receipts,
        backup_key=args.backup_key,
        without_anchor=args.without_anchor,
    )
    text = (
        f"{report['store']}: ledger {report['ledger']}, {counted(report['replayed'], 'request')} replayed from "
        f"receipts, up to entry {report['seq']}; written: {counted(report['nodes'], 'node')}, "
        f"{counted(report['records'], 'slice')} of records"
    )
    if report["lost"]:
        first, last = report["lost"]
        text += (
            f"\nof entries {first} to {last} only requests are back, not exports, certificates, healings, new shards "
            "or slices given up"
        )
    if report["missing"]:
        text += f"\nmissing: {counted(report['missing'], 'live node')}; `s3t fit` trains again what is missing"
    return int(bool(report["lost_slices"])), report, text + told(report)
