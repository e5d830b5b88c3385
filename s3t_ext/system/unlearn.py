"""Deletion: durable record, acknowledgement, then erasure. Loads no torch."""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s3t_ext.ledger import Applied, LedgerError, Request, ShardChange
from s3t_ext.ledger.database import now
from s3t_ext.ledger.identity import canonical_json, subject_hash
from s3t_ext.ledger.log import Cell
from s3t_ext.ledger.receipts import build as build_receipt
from s3t_ext.ledger.receipts import subject_rows
from s3t_ext.ledger.signature import sign
from s3t_ext.store import rotate as rotation
from s3t_ext.store.files import Locked, StoreError, exclusive
from s3t_ext.store.records import Lost
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.lost import Losses, abandoned, held, remains


def delete(
    path: Path | str, subjects: Sequence[str], request_id: str | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Forget people: everything trained on their records stops serving, durably, before this returns.

    The receipt is the acknowledgement. Erasure of dead nodes and of the records follows at once, or, while another
    process writes to the store, by that process. Where it fails a warning says so, and the next request tries again.

    Args:
        path: of the store; ``subjects``: as in the table.
        request_id: makes the request idempotent: the same id gives the same receipt. None: a fresh one.
        dry_run: change nothing; tell the depths that the request would leave, and what is held.

    Returns:
        The receipt (see ``s3t_ext.ledger.receipts``), or for ``dry_run`` the depths before and after, and the
        rows of the receipt's ``subjects``.

    Raises:
        ValueError: no subject, an empty one, or a known request id with other subjects.
        StoreError, LedgerError: nothing was acknowledged; the message says what to do.
    """
    with StoreFolder(path) as folder:
        if dry_run:
            return _preview(folder, subjects)
        receipt = delete_from(folder, subjects, request_id)
        erase_or_warn(folder)
        return receipt


def cells(folder: StoreFolder, subjects: Sequence[str]) -> set[Cell]:
    """Find the slices that hold private records of these subjects."""
    return folder.ledger.hit(folder.hashes(subjects))


def deleted_in(folder: StoreFolder, cell: Cell) -> dict[str, str]:
    """Name, by hash, those in a slice's records who were deleted from it."""
    gone = folder.ledger.gone(cell[0])
    names = {name for record in folder.records.get(*cell).subjects for name in record}
    hashed = {subject_hash(folder.key, name): name for name in names}
    return {found: name for found, name in hashed.items() if found in gone}


def delete_from(folder: StoreFolder, subjects: Sequence[str], request_id: str | None) -> dict[str, Any]:
    """Record a request durably and return its receipt; erase nothing yet."""
    received, hashes = now(), folder.hashes(subjects)
    if request_id == "":
        raise ValueError("request_id: expected some text, got an empty one; leave it out for a fresh one")
    return folder.ledger.delete(
        request_id or secrets.token_hex(16), hashes, lambda applied: _receipt(folder, applied), received
    )


def _receipt(folder: StoreFolder, applied: Applied) -> dict[str, Any]:
    planned = folder.identities(applied.before)
    before = {node: name for node, name in planned.items() if folder.nodes.has(name)}
    after = {node: name for node, name in before.items() if folder.alive(*node, applied.after)}
    best = folder.best(before), folder.best(after)
    # Trained or not: a node that another process publishes at this moment is erased by this list too.
    dead = {node: name for node, name in planned.items() if not folder.alive(*node, applied.after)}
    shards = [
        ShardChange(
            shard,
            dead=[name for node, name in dead.items() if node[0] == shard],
            kept=[
                {"node": name, "slices": [applied.after[shard, k] for k in node[1]], **_hashes(folder, name)}
                for node, name in after.items()
                if node[0] == shard
            ],
            depth_before=len(best[0][shard]),
            depth_after=len(best[1][shard]),
            untrained=[name for node, name in dead.items() if node[0] == shard and node not in before],
        )
        for shard in sorted({shard for shard, _ in applied.newly_dirty})
    ]
    return sign(build_receipt(applied, shards), folder.signing_key)


def _hashes(folder: StoreFolder, node: str) -> dict[str, str | None]:
    try:
        manifest = folder.nodes.manifest(node)
    except StoreError:  # damaged, or erased by another process: no reason to refuse a deletion
        return {"weights": None, "provenance": None}
    provenance = hashlib.sha256(canonical_json(manifest["provenance"])).hexdigest()
    return {"weights": manifest["weights"], "provenance": provenance}


def receipt(path: Path | str, request_id: str) -> dict[str, Any]:
    """Return the receipt of an acknowledged request.

    Raises:
        ValueError: no such request.
    """
    with StoreFolder(path) as folder:
        found = folder.ledger.receipt(request_id)
    if found is None:
        raise ValueError(f"REQUEST_ID: {path} has acknowledged no request {request_id!r}")
    return found


def _preview(folder: StoreFolder, subjects: Sequence[str]) -> dict[str, Any]:
    slices = folder.ledger.slices()
    after = {**slices, **dict.fromkeys(cells(folder, subjects))}
    depths = [[len(p) for p in folder.best(folder.trained(state))] for state in (slices, after)]
    rows = []
    for name in sorted(set(folder.hashes(subjects))):
        places, left = folder.ledger.find(name), folder.ledger.hit([name])
        already = [place for place in places if place.cell is not None and place.cell not in left]
        rows += subject_rows(name, places, already)
    return {"dry_run": True, "depths_before": depths[0], "depths_after": depths[1], "subjects": rows}


def erase_or_warn(folder: StoreFolder, told: Collection[Cell] = ()) -> None:
    """Erase what is pending; where that fails, warn: the requests are acknowledged all the same.

    Args:
        told: slices of which the caller says that they are lost.
    """
    try:
        lost = erase_pending(folder)
    except (StoreError, LedgerError) as error:
        warnings.warn(f"acknowledged, but not erased yet: {error}; the next request tries again", stacklevel=3)
    else:
        for cell in sorted(lost.keys() - set(told)):
            waiting = [request.request_id for request in folder.ledger.unerased() if cell in held(folder, request)]
            names = ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else "")
            warnings.warn(f"acknowledged, but not erased yet: request {names}: {lost[cell]}", stacklevel=3)


def erase_pending(folder: StoreFolder) -> Losses:
    """Erase what acknowledged requests, and giving up slices, left behind; give what `erase` gives.

    While another process writes to the store nothing is done here: `writing` looks again after letting go.

    Raises:
        StoreError, LedgerError: something could not be erased; all else was, and the next call tries again.
    """
    lost: Losses = {}
    tried: set[object] = set()
    while new := {request.seq for request in folder.ledger.unerased()}.union(*remains(folder)) - tried:
        tried |= new
        try:
            with exclusive(folder.path):
                lost |= erase(folder)
        except Locked:
            break
    return lost


@contextmanager
def writing(folder: StoreFolder) -> Iterator[set[Cell]]:
    """Hold the writer's lock for the block, and afterwards erase what was requested meanwhile: its sender could not.

    Yields:
        A set for the slices that the block itself reports as lost: no warning says it again.

    Raises:
        StoreError: another process writes to the store, or the folder is not writable.
    """
    told: set[Cell] = set()
    try:
        with exclusive(folder.path):
            yield told
    finally:
        erase_or_warn(folder, told)


def rotate(path: Path | str, new_key: Path | str | None = None) -> dict[str, Any]:
    """Give a store a new store key, beside requests; see ``s3t_ext.store.rotate``."""
    with StoreFolder(path) as folder, writing(folder):
        return rotation.rotate(path, new_key)


def erase(folder: StoreFolder) -> Losses:
    """Erase, under the writer's lock, the dead nodes and the records of acknowledged requests.

    Of given-up slices too what was trained on them, and a file that cannot be read: whatever stopped it before.

    Returns:
        The lost slices among those that hold records of requests: these requests, with all else of them erased, stay
        pending.

    Raises:
        StoreError: of the first request that could not be erased, after all others were.
    """
    slices, out = folder.ledger.slices(), abandoned(folder)
    folder.records.keep(slices)  # no others: of a growth that ended before its shards were entered
    files, dead = remains(folder)
    for cell in files:
        folder.records.erase(*cell)
    _erase_nodes(folder, dead)
    clean, lost, given = set(out), Losses(), folder.ledger.given_up()
    done, unseen = list[int](), dict[int, dict[Cell, str]]()
    failed: StoreError | None = None
    for request in folder.ledger.unerased():
        try:
            _erase_request(folder, request, clean, lost)
            mine = held(folder, request)
            if mine & out and not mine & lost.keys():
                unseen[request.seq] = {cell: given[cell].file for cell in mine & out}
            elif not mine & lost.keys():
                done.append(request.seq)
        except StoreError as error:
            failed = failed or error
    if done:
        folder.ledger.mark_erased(done)
    for seq, slices_ in unseen.items():
        folder.ledger.mark_erased([seq], slices_)
    if failed:
        raise failed
    return lost


def _erase_request(folder: StoreFolder, request: Request, done: set[Cell], lost: Losses) -> None:
    receipt = folder.ledger.receipt(request.request_id) or {"shards": []}
    dead = {name for shard in receipt["shards"] for name in shard["dead"]}
    if request.seq < folder.ledger.healed():  # a digest may be back since, and with it the id of a node that died
        dead -= set(folder.identities(folder.ledger.slices()).values())
    _erase_nodes(folder, dead)
    for cell in sorted(held(folder, request) - done - lost.keys()):
        try:
            folder.records.erase_subjects(*cell, deleted_in(folder, cell).values())
            done.add(cell)
        except Lost as error:
            lost[cell] = error


def _erase_nodes(folder: StoreFolder, names: Iterable[str]) -> None:
    for name in sorted(names):
        folder.nodes.erase(name)


def give_up(folder: StoreFolder, given: Collection[Cell]) -> set[Cell]:
    """Give up lost slices, under the writer's lock: all their records count as deleted from them, asked for or not.

    A damaged file is overwritten unread, and what was trained on it is erased: after a kill by the next `erase`.
    Requests that wait for them alone count as erased; the ledger says of each, and of those to come, which slice nobody
    could look into.

    Returns:
        Those that had not been given up before.

    Raises:
        ValueError: one of them is no slice, or can be read: then nothing is done.
        StoreError: no slice has a file: the disk is not mounted, perhaps.
    """
    slices = folder.ledger.slices()
    found: dict[Cell, str] = {}
    for cell in sorted(given):
        try:
            if cell in slices:
                folder.records.get(*cell)
            raise ValueError(f"lost: expected a slice whose records cannot be read, got {cell[0]}-{cell[1]}")
        except Lost as error:
            found[cell] = "missing" if error.missing else "damaged"
    if new := {cell: file for cell, file in found.items() if cell not in folder.ledger.given_up()}:
        if not any(folder.records.has(*cell) for cell in slices):
            raise StoreError(
                f"{folder.records.folder} has no file of any slice: nothing was given up; mount it, or restore the "
                "store from a backup; where all records are lost, say so by an empty file in place of one, such as "
                f"{min(new)[0]}-{min(new)[1]}.sealed, and give up all in one command"
            )
        ids = folder.identities(slices)
        dead = [name for (shard, path), name in ids.items() if any((shard, k) in new for k in path)]
        folder.ledger.give_up(new, dead)
    erase(folder)
    return set(new)
