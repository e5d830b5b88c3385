"""``s3t backup``: a copy of a store, while it serves."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import told
from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and where the copy goes."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Back up and report; status 1 where a slice is lost, and not in it."""
    from s3t_ext.store.files import outside
    from s3t_ext.system.backup import backup

    report = backup(args.store, args.folder)
    text = (
        f"{report['backup']}: {counted(report['files'], 'file')}, {counted(report['nodes'], 'node')}, ledger up to "
        f"entry {report['ledger']['count']}\nNot in it, keep copies apart: {outside(args.store, 'key')} (the store "
        f"key, without which nothing in it can be read) and {outside(args.store, 'anchor')}"
    )
    return int(bool(report["lost_slices"])), report, text + told(report)
