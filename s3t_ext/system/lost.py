"""Slices whose records cannot be read: which, why, who waits for them, and which were given up. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
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
    lost: Losses = {}
    for cell in sorted(folder.ledger.slices().keys() - abandoned(folder)):
        if (look or cell in pending or not folder.records.has(*cell)) and (error := _loss(folder, cell)):
            lost[cell] = error
    return lost


def _loss(folder: StoreFolder, cell: Cell) -> Lost | None:
    try:
        folder.records.get(*cell)
    except Lost as error:
        return error
    except StoreError:  # the store key is missing, or the disk busy: that says nothing about the slice
        pass
    return None


def listed(cells: Iterable[Cell]) -> list[str]:
    """Give slices as plain JSON, "shard-slice"."""
    return [f"{shard}-{slice_}" for shard, slice_ in sorted(cells)]


def named(lost: Losses) -> dict[str, str]:
    """Give lost slices as plain JSON: the reason by "shard-slice"."""
    return dict(zip(listed(lost), (str(lost[cell]) for cell in sorted(lost)), strict=True))


def abandoned(folder: StoreFolder) -> set[Cell]:
    """Name the slices that were given up and did not come back, as a file that can be read: none of them is lost."""
    return {cell for cell in folder.ledger.given_up() if not folder.records.has(*cell) or _loss(folder, cell)}


def remains(folder: StoreFolder) -> tuple[set[Cell], set[str]]:
    """Tell what is still in the store of given-up slices: those with a file that nobody can read, and nodes (ids)."""
    given = folder.ledger.given_up()
    if not given:
        return set(), set()
    live = folder.identities(folder.ledger.slices()).values()  # a digest may be back since, and with it an id
    dead = {name for entry in given.values() for name in entry.nodes}.difference(live)
    files = {cell for cell in abandoned(folder) if folder.records.has(*cell)}
    return files, {name for name in dead if folder.nodes.remains(name)}


def given_up(folder: StoreFolder) -> dict[str, dict[str, Any]]:
    """Tell by "shard-slice" what was given up and is not back and healed.

    Returns:
        time, file (how it was found then), subjects (how many had records in it), and requests (ids of those that were
        erased without a look into it). Where an earlier version gave it up for these alone, and it is lost still, time
        and subjects are None.
    """
    given = folder.ledger.given_up()
    unseen: dict[Cell, dict[str, str]] = {cell: {} for cell in given}
    for request in folder.ledger.requests():
        for shard, slice_, file in request.unseen if request.state == "erased" else ():
            unseen.setdefault((shard, slice_), {})[request.request_id] = file
    told = {}
    for cell, files in sorted(unseen.items()):
        if entry := given.get(cell):
            known = {"time": entry.time, "file": entry.file, "subjects": entry.subjects}
        elif _loss(folder, cell):
            known = {"time": None, "file": next(iter(files.values())), "subjects": None}
        else:
            continue
        told[f"{cell[0]}-{cell[1]}"] = {**known, "requests": list(files)}
    return told
