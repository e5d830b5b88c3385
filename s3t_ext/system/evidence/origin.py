"""Tell in which rows the tables given differ from those that a store holds, beside the bits that are compared.

A difference between a store and a table is a leak, or a mistake in giving the table, and no count of rows tells the two
apart: what a deleted person said may have decided which rows of others there are, whose they are and what they hold. So
the bits are always compared, and what is found here is told beside them. One mistake alone is refused before any work:
a table whose rows are, one by one, those that another generation holds.

Rows of people who were deleted count on neither side. Records that cannot be read say nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from s3t_ext.ledger.generation import Generation
from s3t_ext.ledger.identity import subject_hash
from s3t_ext.store.files import StoreError
from s3t_ext.system.data.ingest import record_bytes
from s3t_ext.system.folder import StoreFolder

Rows = Counter[tuple[tuple[str, ...], bytes]]
"""How often a row is there: whose it is, and a hash of its content."""


def rows_of(subjects: Iterable[Sequence[str]], inputs: np.ndarray, labels: np.ndarray) -> Rows:
    """Name the rows of a table, or of a slice."""
    contents = (hashlib.sha256(record_bytes(x, y)).digest() for x, y in zip(inputs, labels, strict=True))
    return Counter((tuple(names), content) for names, content in zip(subjects, contents, strict=True))


def check_origin(folder: StoreFolder, given: Sequence[Rows]) -> dict[str, int]:
    """Count the rows in which tables differ from what the generations of a store hold, and refuse tables in disorder.

    Args:
        given: the rows of each generation's table, those of deleted people among them.

    Returns:
        changed_rows (of the same people, with another content), missing_rows (that the store holds and the tables do
        not), other_rows (that the tables hold and the store does not).

    Raises:
        ValueError: a table is that of another generation.
    """
    generations = folder.ledger.generations
    held = [_held(folder, generation) for generation in generations]
    gone = [folder.ledger.gone(g.first) for g in generations]  # last: who is missing above by now is in it
    changed = missing = others = 0
    for number, (generation, rows, table) in enumerate(zip(generations, held, given, strict=True)):
        if rows is None:
            continue
        ours, theirs = _left(folder, rows, gone[number]), _left(folder, table, gone[number])
        for other, found, out in zip(generations, held, gone, strict=True):
            same = found and other.number != number and _left(folder, found, out) == _left(folder, table, out)
            if same and ours != theirs:
                raise ValueError(
                    f"table: expected that of generation {number} (shards {generation.first} to "
                    f"{generation.first + generation.shards - 1}), got that of generation {other.number}; give the "
                    "tables of all generations in their order"
                )
        more, fewer = _people(ours - theirs), _people(theirs - ours)
        changed += (more & fewer).total()
        missing += (more - fewer).total()
        others += (fewer - more).total()
    return {"changed_rows": changed, "missing_rows": missing, "other_rows": others}


def _held(folder: StoreFolder, generation: Generation) -> Rows | None:
    """Name the rows that a generation's slices hold; None: one cannot be read."""
    found: Rows = Counter()
    try:
        for cell in filter(lambda cell: generation.holds(cell[0]), folder.ledger.slices()):
            records = folder.records.get(*cell)
            found += rows_of(records.subjects, records.inputs, records.labels)
    except StoreError:
        return None
    return found


def _left(folder: StoreFolder, rows: Rows, gone: Collection[str]) -> Rows:
    """Leave out the rows that name one of these subjects (hashes)."""
    names = {name for people, _ in rows for name in people}
    out = {name for name in names if subject_hash(folder.key, name) in gone} if gone else set()
    return Counter({row: count for row, count in rows.items() if out.isdisjoint(row[0])})


def _people(rows: Rows) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for (people, _), count in rows.items():
        found[people] += count
    return found
