"""``s3t verify``: an oracle by the front door."""

from __future__ import annotations

import argparse


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
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--certify", action="store_true", help="enter in the ledger that erased requests are certified")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Verify; status 1 on any difference, 2 where a request was to be certified and was not."""
    from s3t_ext.system.verify import verify

    report = verify(args.store, args.tables, args.nodes, seed=args.seed, certify=args.certify, progress=not args.json)
    text = (
        f"{report['nodes']} of {report['live']} live nodes retrained from the table less the deleted subjects "
        f"(depths {report['depths']}, shards {report['shards']}): {report['mismatched']} differ"
    )
    for node in report["differing"]:
        text += f"\n  differs: shard {node['shard']}, slices {node['path']}, node {node['node']}"
    if report["changed_rows"]:
        text += (
            f"\n  {report['changed_rows']} rows of the tables have another content than the store holds of these people"
        )
    if report["missing_rows"] or report["other_rows"]:
        text += (
            f"\n  {report['missing_rows']} rows that the store holds are not in the tables, "
            f"{report['other_rows']} of the tables are not in the store: "
            "where these are not the whole tables it was made from, give those"
        )
    if report["incomparable"]:
        text += f"\n  {report['incomparable']} nodes cannot be compared here: {report['reason']}"
    left = report.get("uncertified", {})
    if args.certify:
        text += f"\n  certified: {len(report['certified'])} requests"
        text += "".join(f"\n  not certified: {request}: {why}" for request, why in left.items())
    if not report["nodes"] and not left:
        why = f"{report['reason']}; verify where these agree" if report["reason"] else "no live node in the store"
        raise ValueError(f"verify: no node could be compared: {why}")
    return (1 if report["mismatched"] else 2 if left else 0), report, text
