"""Slices whose records cannot be read: which, why, who waits for them, and which were given up. Loads no torch."""

from __future__ import annotations

from typing import Any

from s3t_ext.ledger import Request
from s3t_ext.ledger.log import Cell
from s3t_ext.store.files import StoreError
from s3t_ext.store.records import Lost
from s3t_ext.system.folder import StoreFolder

Losses = dict[Cell, Lost]
"""Slices whose records cannot be read, and why: a request on one of them stays pending, all else goes on."""


def held(folder: StoreFolder, request: Request) -> set[Cell]:
    """Name the slices that hold, or held, records of a request's subjects."""
    places = [place for name in request.subjects for place in folder.ledger.find(name)]
    return {place.cell for place in places if place.cell is not None}


def losses(folder: StoreFolder, look: bool = False) -> Losses:
    """Find the lost slices: those without a file, of pending requests the damaged ones; ``look``: into every file."""
    pending = {cell for request in folder.ledger.unerased() for cell in held(folder, request)}
    pending |= folder.ledger.given_up().keys()
    lost: Losses = {}
    for cell in sorted(folder.ledger.slices().keys() - abandoned(folder).keys()):
        if look or cell in pending or not folder.records.size(*cell):
            try:
                folder.records.get(*cell)
            except Lost as error:
                lost[cell] = error
            except StoreError:  # the store key is missing, or the disk busy: that says nothing about the slice
                pass
    return lost


def named(lost: Losses) -> dict[str, str]:
    """Give lost slices as plain JSON: the reason by "shard-slice"."""
    return {f"{shard}-{slice_}": str(lost[shard, slice_]) for shard, slice_ in sorted(lost)}


def abandoned(folder: StoreFolder) -> dict[Cell, str]:
    """Give the slices that were given up and did not come back, and what became of their file: none of them is lost."""
    given = folder.ledger.given_up()
    return {cell: given[cell].file for cell in sorted(given) if not folder.records.size(*cell)}


def given_up(folder: StoreFolder) -> dict[str, dict[str, Any]]:
    """Tell by "shard-slice" what was given up: time, file (what became of it), subjects (how many had records in it),
    and requests (ids of those that were erased without a look into it)."""
    requests = folder.ledger.requests()
    return {
        f"{cell[0]}-{cell[1]}": {
            "time": given.time,
            "file": given.file,
            "subjects": given.subjects,
            "requests": [r.request_id for r in requests if cell in {(s, k) for s, k, _ in r.unseen}],
        }
        for cell, given in sorted(folder.ledger.given_up().items())
    }
