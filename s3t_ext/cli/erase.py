"""``s3t erase``: what acknowledged requests left, now; and a search for what must be gone."""

from __future__ import annotations

import argparse
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and what to search for."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "--scan",
        metavar="FILE",
        help="search every file of the store for a table's inputs, subjects and record keys, or for lines of text; "
        "status 1 where something is found, or a sealed file is opened by no key",
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Erase and report; status 1 where something is left, was found, or could not be looked into."""
    from s3t_ext.system.evidence.residue import remove, residue, scan
    from s3t_ext.system.folder import StoreFolder
    from s3t_ext.system.unlearn import erase_pending

    with StoreFolder(args.store) as folder:
        before = [request.request_id for request in folder.ledger.unerased()]
        erase_pending(folder)
        pending = [request.request_id for request in folder.ledger.unerased()]
        found = {} if pending else residue(folder)
        if found:
            remove(folder, found)
        left = residue(folder) if found else {}
        report: dict[str, Any] = {
            "erased": [r for r in before if r not in pending],
            "pending": pending,
            "erased_again": found,
            "residue": left,
        }
        if args.scan:
            report["scan"] = scan(folder, args.scan)
    lines = [f"erased now: {', '.join(report['erased']) or 'nothing was pending'}"]
    if pending:
        lines.append(f"pending, until the process that writes to the store ends: {', '.join(pending)}")
    for what, listed in (("was there again", found), ("is left", left)):
        lines += [f"{what} of request {request or '?'}: {', '.join(names)}" for request, names in listed.items()]
    if args.scan:
        lines += _told(report["scan"])
    scanned = report.get("scan", {})
    return int(bool(left or scanned.get("hits") or scanned.get("unopened"))), report, "\n".join(lines)


def _told(scan: dict[str, Any]) -> list[str]:
    lines = [f"searched {scan['files']} files, {scan['bytes']} bytes, for {scan['canaries']} things of the file"]
    for file, found in scan["hits"].items():
        first = ", ".join(list(found)[:5]) + (", ..." if len(found) > 5 else "")
        lines.append(f"  found {sum(found.values())} times in {file}: {first}")
    lines[0] += "" if scan["hits"] else ": found none"
    if scan["not_searched"]:
        lines.append(f"  not searched for, too short to be told from chance: {', '.join(scan['not_searched'][:5])}")
    if scan["unopened"]:
        lines.append(
            f"  not looked into, so the search is incomplete: {', '.join(scan['unopened'][:5])}: "
            "sealed, and opened by no key at hand; put the key there, or remove what is none of this store"
        )
    return lines
