"""``s3t delete``: forget people."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the subjects and how the request is named."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("subjects", metavar="SUBJECT", nargs="*", help="as in the table")
    parser.add_argument("--from", dest="source", metavar="FILE", help="one subject a line; - is standard input")
    parser.add_argument("--request-id", help="the same id gives the same receipt (default: a fresh one)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="change nothing; tell the depths it would leave, and what is held of each",
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Delete and report the receipt."""
    from s3t_ext.system.unlearn import delete

    if args.dry_run and args.request_id is not None:
        raise ValueError("--request-id: expected none beside --dry-run, which makes no request")
    subjects = list(args.subjects)
    if args.source:
        data = sys.stdin.buffer.read() if args.source == "-" else Path(args.source).read_bytes()
        subjects += subjects_in(data)
    if not subjects:
        raise ValueError("SUBJECT: expected at least one, on the command line or by --from FILE, got none")
    receipt = delete(args.store, subjects, args.request_id, dry_run=args.dry_run)
    if args.dry_run:
        text = f"nothing changed; depths {receipt['depths_before']} would become {receipt['depths_after']}"
        return 0, receipt, "\n".join([text, *_told(receipt["subjects"])])
    lines = [f"request {receipt['request_id']} acknowledged, durable as ledger entry {receipt['ledger']['seq']}"]
    lines += _told(receipt["subjects"])
    lines += map(_changed, receipt["shards"])
    return 0, receipt, "\n".join(lines)


def _changed(shard: dict[str, Any]) -> str:
    """Tell what became of a shard; a receipt of an earlier version does not know which nodes were trained."""
    untrained = len(shard.get("untrained", ()))
    off = counted(len(shard["dead"]) - untrained, "node")
    more = f" ({untrained} more of the plan were not trained yet)" if untrained else ""
    change = f"{off} switched off{more}, {len(shard['kept'])} kept"
    return f"  shard {shard['shard']}: {change}, depth {shard['depth_before']} -> {shard['depth_after']}"


def _told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Give a line a subject: what becomes of the records in each of their places."""
    found: dict[str, list[str]] = {}
    for row in rows:
        part = row["part"] if row["part"] not in (None, "private") else ""
        place = f"shard {row['shard']}, slice {row['slice']}" if row["shard"] is not None else "check the spelling"
        found.setdefault(row["subject"], []).append(f"{row['status']} ({part or place})")
    return [f"  {subject[:16]}  {'; '.join(told)}" for subject, told in found.items()]


def subjects_in(data: bytes) -> list[str]:
    """List the subjects of a file, one a line; only line feeds end one, since a name may hold U+2028 or the like."""
    return [line for line in data.decode("utf-8-sig").replace("\r\n", "\n").split("\n") if line.strip()]
