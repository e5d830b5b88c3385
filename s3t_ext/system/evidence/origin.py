"""Tell another table than the one that a store was made from, before anything is retrained on it.

A difference between a store and a table is a leak, or a mistake in giving the table. A mistake is refused (exit status
2); the bits decide all else (status 1), so nothing here may call a leak a mistake:

- Only *who* has how many rows is held against the table, of whole generations and not of slices: a store that places,
  scales or fits by what was deleted has the same people, in other slices or with other content, and is compared.
- Rows of people who were deleted count on neither side: a store that kept theirs is compared, and differs.
- The store's word for whose a row is is not taken: a surplus row with the content of a deleted person's, under whatever
  name, is compared. So give the table with the deleted still in it: without them it is as good as one that lacks rows.
- Records that cannot be read say nothing: what they should have been is compared.

What is left, more or fewer rows of people who never asked, is what a table in the wrong order, cut off, or of another
generation has. A store with rows that nobody gave looks the same, and the message says so; nothing is certified.
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


def check_origin(folder: StoreFolder, given: Sequence[Rows]) -> int:
    """Refuse tables that are not those that the generations of a store were laid out from.

    Args:
        given: the rows of each generation's table, those of deleted people among them.

    Returns:
        In how many rows the tables differ from what the store holds, in content alone.

    Raises:
        ValueError: names the generation, and how its table differs.
    """
    generations = folder.ledger.generations
    held = [_held(folder, generation) for generation in generations]
    gone = [folder.ledger.gone(g.first) for g in generations]  # last: who is missing above by now is in it
    changed = 0
    for number, (generation, rows, table) in enumerate(zip(generations, held, given, strict=True)):
        if rows is None:
            continue
        ours, theirs = _left(folder, rows, gone[number]), _left(folder, table, gone[number])
        more, fewer = ours - theirs, theirs - ours
        of_deleted = {content for _, content in table - theirs}
        same = [
            other.number
            for other, found, out in zip(generations, held, gone, strict=True)
            if other.number != number and found and _left(folder, found, out) == _left(folder, table, out)
        ]
        if of_deleted & {content for _, content in more} or not (same or _people(more) != _people(fewer)):
            changed += more.total()
            continue
        raise ValueError(
            f"table: expected the records that generation {number} (shards {generation.first} to "
            f"{generation.first + generation.shards - 1}) was laid out from, got {fewer.total()} others and "
            f"{more.total()} missing{f': it is that of generation {same[0]}' if same else ''}; give the whole table of "
            "each generation, in their order. If it is that table, the store was made from another, and nothing about "
            "it is verified"
        )
    return changed


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
