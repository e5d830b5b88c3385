"""What an audit takes: known, told and held against the machine before any of its work."""

from __future__ import annotations

import shutil
from pathlib import Path

from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.training.budget import free_bytes, told
from s3t_ext.system.wording import counted

HELD = 6.5  # times the records of the store, what is in memory at the most (seen: 6.2)


def extent(folder: StoreFolder, scratch: Path, references: int, isolation: int, strangers: bool) -> str:
    """Tell what an audit will train, and take of disk and memory.

    Args:
        scratch: where its stores lie; ``references``, ``isolation``: as of ``audit``.
        strangers: whether it is given records that the store never held, and so attacks the store too.

    Raises:
        ValueError: there is not so much room.
    """
    slices = folder.ledger.slices()
    records = sum(folder.records.size(*cell) for cell in slices)
    paths = 3 + 2 * strangers + references  # the rehearsal and two oracles of it, two of the store
    chains = paths * folder.shards * folder.tree.depth + isolation * len(folder.identities(slices))
    disk = "disk beside the store", (paths + isolation) * records, shutil.disk_usage(scratch).free
    memory = "memory for its tables", HELD * records, free_bytes()
    for what, needed, free in (disk, memory):
        if needed > free:
            raise ValueError(
                f"audit: expected {told(needed)} of {what}, got {told(free)}: the store's records take "
                f"{told(records)}, and {counted(paths + isolation, 'scratch store')} are made of them; use fewer "
                "references and slices of isolation, or a machine with more"
            )
    return (
        f"audit: the store's records take {told(records)}; {counted(paths + isolation, 'scratch store')} of that size, "
        f"about {counted(chains, 'node')} to train, up to {told(HELD * records)} of memory for tables"
    )
