"""``s3t erase``: what acknowledged requests left, now; and a search for what must be gone."""

from __future__ import annotations

import argparse
import re
from typing import Any

from s3t_ext.system.wording import counted, told


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store and what to search for."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "--scan",
        metavar="FILE",
        help="search every file of the store for a table's inputs, subjects and record keys, or for lines of text; "
        "status 1 where something is found, or a sealed file is opened by no key",
    )
    parser.add_argument(
        "--lost",
        metavar="SHARD-SLICE",
        action="append",
        default=[],
        help="give up a slice whose records cannot be read, asked for or not: a damaged file is overwritten unread, "
        "what was trained on it is erased, requests that wait for it alone count as erased, and the ledger says that "
        "nobody looked in; killed? any next command that writes ends it",
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Erase and report; status 1 where something is left, was found, or could not be looked into."""
    from s3t_ext.system.evidence.residue import remove, residue, scan
    from s3t_ext.system.folder import StoreFolder
    from s3t_ext.system.heal import depths
    from s3t_ext.system.lost import given_up, listed, named
    from s3t_ext.system.unlearn import erase_pending, give_up, writing

    cells = [_cell(name) for name in args.lost]
    with StoreFolder(args.store) as folder:
        before = [request.request_id for request in folder.ledger.unerased()]
        new, deep = set(cells), depths(folder)
        if cells:
            with writing(folder) as known:
                new = give_up(folder, cells)
                known |= set(folder.ledger.slices())
        lost = erase_pending(folder)
        pending = [request.request_id for request in folder.ledger.unerased()]
        found = {} if pending and not lost else residue(folder, lost)
        if found:
            remove(folder, found, lost)
        left = residue(folder, lost) if found else {}
        report: dict[str, Any] = {
            "erased": [r for r in before if r not in pending],
            "pending": pending,
            "erased_again": found,
            "residue": left,
            "given_up": {name: given for name, given in given_up(folder).items() if _cell(name) in cells},
            "given_up_before": listed(set(cells) - new),
            "depths_before": deep,
            "depths_after": depths(folder),
            "lost_slices": named(lost),
        }
        if args.scan:
            report["scan"] = scan(folder, args.scan)
    lines = [f"erased now: {', '.join(report['erased']) or 'nothing was pending'}"]
    lines += [f"slice {name} was given up before, and nothing new is on record" for name in report["given_up_before"]]
    if pending:
        until = "what is lost is back, or given up" if lost else "the process that writes to the store ends"
        lines.append(f"pending, until {until}: {', '.join(pending)}")
    lines += told(report)
    if cells:
        lines.append(f"depths {deep} became {report['depths_after']}")
    for what, names in (("was there again", found), ("is left", left)):
        lines += [f"{what} of request {request or '?'}: {', '.join(of)}" for request, of in names.items()]
    if args.scan:
        lines += _told(report["scan"])
    scanned = report.get("scan", {})
    return int(bool(left or lost or scanned.get("hits") or scanned.get("unopened"))), report, "\n".join(lines)


def _cell(name: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", name, re.ASCII)
    if found is None:
        raise ValueError(f"--lost: expected SHARD-SLICE, as 2-1, got {name!r}")
    return int(found[1]), int(found[2])


def _told(scan: dict[str, Any]) -> list[str]:
    lines = [
        f"searched {counted(scan['files'], 'file')}, {scan['bytes']} bytes, "
        f"for {counted(scan['canaries'], 'thing')} of the file"
    ]
    for file, found in scan["hits"].items():
        first = ", ".join(list(found)[:5]) + (", ..." if len(found) > 5 else "")
        lines.append(f"  found {counted(sum(found.values()), 'time')} in {file}: {first}")
    lines[0] += "" if scan["hits"] else ": found none"
    if scan["not_searched"]:
        lines.append(f"  not searched for, too short to be told from chance: {', '.join(scan['not_searched'][:5])}")
    if scan["unopened"]:
        lines.append(
            f"  not looked into, so the search is incomplete: {', '.join(scan['unopened'][:5])}: "
            "sealed, and opened by no key at hand; put the key there, or remove what is none of this store"
        )
    return lines
