"""``s3t export``: a live node as a PEFT adapter."""

from __future__ import annotations

import argparse

from s3t_ext.cli.store import opened


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, where the adapter goes and which node it is."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder, which PeftModel.from_pretrained loads")
    parser.add_argument("--shard", type=int, required=True, help="whose node, from 0")
    parser.add_argument("--path", metavar="0,2", help="slices in training order (default: the node that serves)")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Export and report."""
    opened(args.store)
    try:
        path = None if args.path is None else [int(k) for k in args.path.split(",")]
    except ValueError:
        raise ValueError(f"--path: expected slices as 0,2, got {args.path!r}") from None

    from s3t_ext.system.export import export

    report = export(args.store, args.folder, args.shard, path)
    head = f", head in {report['head']}" if report["head"] else ""
    text = (
        f"{report['export']}: shard {report['shard']}, slices {','.join(map(str, report['slices']))}, "
        f"rank {report['rank']}{head}\nIt is registered: receipts of people in these slices will name it."
    )
    return 0, report, text
