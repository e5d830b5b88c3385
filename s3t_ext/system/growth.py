"""New records open new shards: a generation of its own, on the same key, plan and base. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from s3t_ext.ledger.generation import Generation
from s3t_ext.ledger.identity import subject_hash
from s3t_ext.store.spool import Spool
from s3t_ext.system.creation import write_slices
from s3t_ext.system.data.ingest import Layout, lay_out
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.lost import abandoned
from s3t_ext.system.unlearn import erase

Read = Callable[[], Iterable[Table]]
"""Reads a table, in chunks, as often as it is called."""


def lay_out_generation(
    folder: StoreFolder,
    table: Table | Iterable[Table],
    generation: Generation,
    gone: Collection[str] | None = None,
    spool: Spool | None = None,
) -> Layout:
    """Lay a table out in the shards of a generation, less the subjects (hashes) who are gone from it.

    Args:
        gone: who; None: as the ledger says. ``spool``: see ``lay_out``.
    """
    gone = folder.ledger.gone(generation.first) if gone is None else gone
    size = generation.shards, folder.config.slices
    return lay_out(table, folder.key, *size, frozenset(gone), spool, generation.number, generation.first)


def find_generation(folder: StoreFolder, read: Read, grow: bool = False) -> tuple[Layout | None, str]:
    """Find the generation that holds the records of a table, no others and no fewer.

    Of a given-up slice nothing is known but who was in it.

    Args:
        grow: whether another may be opened: one that has no record left then matches no table.

    Returns:
        Its layout, of which counts are left; or None, and how the table differs from the generation that comes nearest.
    """
    differing, out = [], abandoned(folder)
    for generation in folder.ledger.generations:
        new = gone = same = 0
        with Spool(folder.path) as spool:
            layout = lay_out_generation(folder, read(), generation, spool=spool)
            for cell, records in layout.slices.items():
                if cell in out:
                    people = {subject_hash(folder.key, name) for names in records.subjects for name in names}
                    new += len(people - set(folder.ledger.placed(cell)))
                    continue
                given, held = set(records.keys), set(folder.records.get(*cell).keys)
                new, gone, same = new + len(given - held), gone + len(held - given), same + len(given & held)
        if not new and not gone and (same or not grow):
            return layout, ""
        differing.append((new, gone))
    new, gone = min(differing, key=sum)
    return None, f"{new} others and {gone} missing"


def last_request(folder: StoreFolder) -> int:
    """Give the number of the last request's event, 0 where there is none."""
    return max((request.seq for request in folder.ledger.requests()), default=0)


def grow(folder: StoreFolder, read: Read, shards: int, readmit: Sequence[str] = (), since: int | None = None) -> Layout:
    """Open a generation of new shards with the records of a table, under the writer's lock; train nothing.

    Args:
        shards: how many; ``readmit``: deleted subjects whose records in this table are taken all the same.
        since: what ``last_request`` gave when this was asked for: who has asked to be forgotten since is not taken.

    Raises:
        ValueError: a shard would be empty, the records of a generation are in the table again, or who is to be
            re-admitted was not deleted or is not in it.
    """
    since = last_request(folder) if since is None else since
    back = set(folder.hashes(readmit)) if readmit else set()
    _check_readmitted(folder, read, readmit)
    while True:
        erase(folder)
        generation = Generation(len(folder.ledger.generations), folder.shards, shards, 0, frozenset())
        with Spool(folder.path) as spool:
            layout = lay_out_generation(folder, read(), generation, folder.ledger.deleted() - back, spool)
            layout.check()
            _check_new(folder, layout)
            try:
                gone = folder.ledger.grow(*write_slices(folder, layout), back, since)
            except ValueError:
                folder.records.keep(folder.ledger.slices())  # not what was just written
                raise
            if not gone:
                return layout  # otherwise one of its people was deleted just now: lay it out again


def _check_readmitted(folder: StoreFolder, read: Read, readmit: Sequence[str]) -> None:
    deleted = folder.ledger.deleted()
    present = {name for chunk in read() for names in chunk.subjects for name in names} if readmit else set()
    known = {folder.hashed(name) for name in present}
    for name in readmit:
        if folder.hashed(name) not in deleted:
            raise ValueError(f"readmit: expected somebody who was deleted, got {name!r}, who was not")
        if folder.hashed(name) not in known:
            raise ValueError(f"readmit: expected somebody in the table, got {name!r}, of whom it has no record")


def _check_new(folder: StoreFolder, layout: Layout) -> None:
    """Refuse the table that somebody has added rows to: its old rows would be trained twice."""
    keys, out = layout.keys(), abandoned(folder)
    for generation in folder.ledger.generations:
        cells = [cell for cell in folder.ledger.slices().keys() - out if generation.holds(cell[0])]
        held = {key for cell in cells for key in folder.records.get(*cell).keys}
        if held and held <= keys:
            raise ValueError(
                f"table: expected new records, got all {len(held)} of generation {generation.number} among them; "
                "give the new rows only"
            )
