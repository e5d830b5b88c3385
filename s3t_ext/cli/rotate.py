"""``s3t rotate``: a new store key."""

from __future__ import annotations

import argparse

from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and the new key's file."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "--new-key", metavar="FILE", help="64 hex digits (default: drawn; needed where the key is in S3T_STORE_KEY)"
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Rotate and report; status 1 where a file is damaged."""
    import os

    from s3t_ext.store.files import outside
    from s3t_ext.system.unlearn import rotate

    report = rotate(args.store, args.new_key)
    text = f"opened by the store key {report['key'][:8]}... alone: {counted(report['files'], 'file')} of {args.store}"
    if os.environ.get("S3T_STORE_KEY"):
        text += f"; set S3T_STORE_KEY to the digits in {args.new_key}, and start what serves anew"
    else:
        text += f", in {outside(args.store, 'key')}; the old one was overwritten"
    text += (
        "\n  older backups need the old key (`s3t restore --backup-key`): back up anew, then destroy every copy of it"
    )
    if report["damaged"]:
        text += f"\n  damaged, left as they are: {', '.join(report['damaged'])}"
    return (1 if report["damaged"] else 0), report, text
