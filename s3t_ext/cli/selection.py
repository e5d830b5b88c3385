"""Options that say which records of a table are meant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3t_ext.system.data.schema import Schema
    from s3t_ext.system.data.tables import Table

OPTIONS = "--subject, --subjects, --class or --rows"


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add people, classes and rows, of which one is given."""
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--subject", metavar="NAME", nargs="+", help="forget people, as in the table")
    who.add_argument("--subjects", metavar="FILE", help="forget people, one a line; - is standard input")
    who.add_argument("--class", metavar="NAME", nargs="+", dest="classes", help="forget all records of classes")
    who.add_argument("--rows", metavar="1-20,35", help="forget rows of TABLE, the first one is 1")


def is_selected(args: argparse.Namespace) -> bool:
    """Tell whether any of the options was given."""
    return bool(args.subject or args.subjects or args.classes or args.rows)


def selected(args: argparse.Namespace, table: Table, schema: Schema) -> list[bool]:
    """Say of each record of a table whether it is meant: of people's, every one that is about one of them.

    Raises:
        ValueError: a person, class or row is not there.
    """
    if args.rows:
        rows = _rows(args.rows, len(table))
        return [i in rows for i in range(len(table))]
    if args.classes:
        if not schema.classes:
            raise ValueError(f"--class: expected none for the task {schema.task!r}; use --rows, got {args.classes}")
        if unknown := sorted(set(args.classes) - set(schema.classes)):
            raise ValueError(f"--class: expected one of {list(schema.classes)[:12]}, got {unknown[0]!r}")
        gone = [schema.classes[label] in args.classes for label in table.labels]
        if not any(gone):
            raise ValueError(f"--class: expected one with records in {args.table}, got {args.classes}, which have none")
        return gone
    return _by_people(args, table, schema)


def _by_people(args: argparse.Namespace, table: Table, schema: Schema) -> list[bool]:
    from s3t_ext.cli.delete import subjects_in
    from s3t_ext.ledger.identity import normalise_subject

    names = args.subject
    if args.subjects:
        names = subjects_in(sys.stdin.buffer.read() if args.subjects == "-" else Path(args.subjects).read_bytes())
        if not names:
            raise ValueError(f"--subjects: expected one a line, got none in {args.subjects}")
    people = [normalise_subject(name, schema.normalise) for name in names]
    there = {name for each in table.subjects for name in each}
    if lacking := [i for i, name in enumerate(people, 1) if name not in there]:
        raise ValueError(  # nobody's name: errors end in logs
            f"--subject: expected people of {args.table}, {len(there)} in its column {schema.subject!r}, got "
            f"{len(lacking)} of {len(people)} without a record there, number {lacking[0]} for one"
        )
    return [not set(people).isdisjoint(each) for each in table.subjects]


def _rows(text: str, count: int) -> set[int]:
    """Read ``1-20,35`` as indices from 0."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-") if "-" in part else (part, "", part)
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= count):
            raise ValueError(f"--rows: expected rows of 1 to {count} as 1-20,35, got {part!r}")
        found |= set(range(int(first) - 1, int(last)))
    return found
