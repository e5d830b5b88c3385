"""``s3t verify``: an oracle by the front door."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import opened
from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the raw table and how many nodes."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "tables",
        metavar="TABLE",
        nargs="+",
        help="the raw table, of each generation in order, deleted subjects still in it",
    )
    parser.add_argument(
        "--nodes",
        default="all",
        help="'all' (default), or how many to draw, in turn from each shard that requests hit, then from the others; "
        "the nodes above them are compared too",
    )
    parser.add_argument("--seed", type=int, help="of the draw (default 0)")
    parser.add_argument("--certify", action="store_true", help="enter in the ledger that erased requests are certified")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Verify; status 1 on any difference, 2 where a request was to be certified and was not."""
    opened(args.store, *args.tables)
    if args.seed is not None and args.nodes == "all":
        raise ValueError("--seed: expected it beside a number of --nodes alone: of all none is drawn")

    from s3t_ext.system.verify import verify

    report = verify(
        args.store, args.tables, args.nodes, seed=args.seed or 0, certify=args.certify, progress=not args.json
    )
    text = (
        f"{report['nodes']} of {counted(report['live'], 'live node')} retrained from the table less the deleted "
        f"subjects (depths {report['depths']}, shards {report['shards']}): {report['mismatched']} differ"
    )
    for node in report["differing"]:
        text += f"\n  differs: shard {node['shard']}, slices {node['path']}, node {node['node']}"
    if report["changed_rows"]:
        text += (
            f"\n  {counted(report['changed_rows'], 'row')} of the tables with another content than the store holds of "
            "these people"
        )
    if report["missing_rows"] or report["other_rows"]:
        text += (
            f"\n  {counted(report['missing_rows'], 'row')} that the store holds not in the tables, "
            f"{report['other_rows']} of the tables not in the store: "
            "where these are not the whole tables it was made from, give those"
        )
    if report["incomparable"]:
        text += f"\n  {counted(report['incomparable'], 'node')} not to be compared here: {report['reason']}"
    left = report.get("uncertified", {})
    if args.certify:
        text += f"\n  certified: {counted(len(report['certified']), 'request')}"
        text += "".join(f"\n  not certified: {request}: {why}" for request, why in left.items())
    if not report["nodes"] and not left:
        why = f"{report['reason']}; verify where these agree" if report["reason"] else "no live node in the store"
        raise ValueError(f"verify: no node could be compared: {why}")
    return (1 if report["mismatched"] else 2 if left else 0), report, text
