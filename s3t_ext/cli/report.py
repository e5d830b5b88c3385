"""``s3t report``: the state of a store as a page with figures."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import opened


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, where the page goes and a declared evaluation part."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder: report.md and figures")
    parser.add_argument("--evaluation", metavar="TABLE", help="declared part: answers as served and at each depth")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Write the page."""
    opened(args.store, args.evaluation)

    from s3t_ext.system.report import report

    told = report(args.store, args.folder, args.evaluation)
    return 0, told, f"{told['report']}\nIt is registered: receipts of people in these slices will name it."
