"""Restore a store from a backup, so that nobody who was deleted since comes back. Loads no torch.

The ledger goes first. It is the newest there is, and what it lacks against the anchor outside the store is made up for
from signed receipts. Only then nodes and records are written, and only live ones, of people who are not deleted in it.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3t_ext.ledger import LedgerError, subject_hash
from s3t_ext.ledger.log import Cell, End
from s3t_ext.ledger.replay import Copy, alone, last_epoch, read_anchor, settle, unknown_receipts
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import (
    PART,
    StoreError,
    atomic_write,
    exclusive,
    outside,
    read_bytes,
    read_checked,
    remove,
    system_errors,
)
from s3t_ext.store.records import Lost, SliceRecords
from s3t_ext.system.backup import LEDGER, MANIFEST, check
from s3t_ext.system.folder import DECLARED, StoreFolder
from s3t_ext.system.lost import Losses, abandoned, named
from s3t_ext.system.scratch import scratch_beside
from s3t_ext.system.unlearn import erase, erase_pending

OWN = "of the store"
_WRITTEN = {LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", "epoch", "anchor", "anchor.new", "nodes", "records"}


@dataclass(frozen=True)
class Given:
    """What a restore may draw on."""

    backup: Path
    store: Path
    ledger: Path | None
    receipts: Sequence[Path]
    without_anchor: bool


def restore(
    backup: Path | str,
    store: Path | str,
    ledger: Path | str | None = None,
    receipts: Sequence[Path | str] = (),
    *,
    backup_key: Path | str | None = None,
    without_anchor: bool = False,
) -> dict[str, Any]:
    """Bring a store back: what is missing or damaged in its folder comes from the backup, who was deleted does not.

    It may be repeated, and after a kill at any moment it goes on.

    Args:
        backup: a folder that ``backup`` wrote; ``store``: its place, which may hold an older copy, or what is left.
        ledger: a newer copy of the ledger's file, where there is one.
        receipts: files with signed receipts, or folders of them, for requests that no ledger here has.
        backup_key: file of the store key that opens the backup, where the store has another by now.
        without_anchor: go on although the anchor outside the store is lost, or was never written since nothing was
            ever requested: nobody knows then whether requests are missing.

    Returns:
        ledger (which one was taken), replayed (how many requests), seq (its last event), lost (first and last of the
        events that no ledger had: of them only requests are back, not exports, certificates, healings, new shards or
        slices given up; or None), nodes and records (how many were written), missing (live nodes that were in neither;
        ``fit`` trains them), lost_slices (whose records were lost when the backup was made, and are here: why, by
        "shard-slice").

    Raises:
        ValueError: a receipt is not of this store.
        StoreError, LedgerError: the backup is damaged, acknowledged requests are missing, a service holds the store,
            ...; what was served before is served still.
    """
    given = Given(
        Path(backup).absolute(),
        Path(store).absolute(),
        None if ledger is None else Path(ledger).absolute(),
        [Path(receipt) for receipt in receipts],
        without_anchor,
    )
    check(given.backup)
    existed = given.store.exists()
    key = _keys(given, None if backup_key is None else Path(backup_key))
    given.store.mkdir(0o700, parents=True, exist_ok=True)
    try:
        with exclusive(given.store), scratch_beside(given.store) as scratch:
            report = _restore_ledger(given, scratch)
            with StoreFolder(given.backup, key) as source:
                _restore_declared(given.store, source)
                absent = {(s, k) for s, k in read_checked(given.backup / MANIFEST).get("lost", ())}
                with StoreFolder(given.store) as folder:
                    report |= _restore_files(folder, source, absent)
        with StoreFolder(given.store) as folder:
            erase_pending(folder)  # what was requested meanwhile
        return {"store": str(given.store), **report}
    finally:
        if not existed and _names(given.store) <= {"lock"}:  # refused
            remove(given.store / "lock")
            given.store.rmdir()


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.endswith(PART)}


def _keys(given: Given, backup_key: Path | None) -> StoreKey:
    """Give the store key that opens the backup; the store's own must be there too, before anything is written."""
    theirs, ours = read_checked(given.backup / "store.json"), None
    with suppress(StoreError):
        ours = read_checked(given.store / "store.json")
    if ours is None and given.store.exists() and not _names(given.store) <= {"lock", "base", *DECLARED, *_WRITTEN}:
        raise ValueError(f"STORE: expected a store or a new folder, got {given.store}, which holds other files")
    if ours is not None:
        own = StoreKey.find(given.store)
    else:  # it gets the backup's `store.json`, and is opened by the same key
        file = outside(given.store, "key")
        if not file.exists() and not os.environ.get("S3T_STORE_KEY"):
            raise StoreError(f"the store key is missing: put your copy of it at {file}, or in S3T_STORE_KEY")
        own = StoreKey.draw(given.store)
        if own.name != theirs["store_key"]:
            raise StoreError(f"{given.store} needs the store key {theirs['store_key'][:8]}..., found {own.name[:8]}...")
    key = StoreKey.load(backup_key) if backup_key else own
    if key.name != theirs["store_key"]:
        raise StoreError(
            f"{given.backup} is opened by the store key {theirs['store_key'][:8]}..., found {key.name[:8]}...: "
            "name the file of that one by --backup-key"
        )
    return key


# The ledger


def _restore_ledger(given: Given, scratch: Path) -> dict[str, Any]:
    """Put the newest ledger in place, whole; refuse, with everything as it was, where a request is missing."""
    path, outer = given.store / LEDGER, outside(given.store, "anchor")
    with alone(path) as own, ExitStack() as open_copies:
        ends, inner = _ends(given), read_anchor(given.store / "anchor")
        name, copy = _newest(given, ends, scratch, own, open_copies)
        new = unknown_receipts(copy, given.receipts)
        missing = max([copy.missing(end, new) for end in ends], default=0)
        if missing > 0:
            raise StoreError(
                f"{missing} acknowledged requests are missing: the newest ledger, {name}, ends at entry "
                f"{copy.end.count} with {len(copy.requests)} of them; give the receipts of later entries by --receipts"
            )
        if not outer.exists() and not given.without_anchor:
            raise StoreError(
                f"{outer} is missing, which knows how many requests there were: put your copy of it there; if it is "
                "lost, --without-anchor goes on with the requests that are here"
            )
        lost = [end for end in ends if not copy.holds(end)]
        epoch = max(last_epoch(path) or 0, inner.count if inner else 0)
        gap = [copy.end.count + 1, max(end.count for end in lost)] if lost else None
        changed = bool(new or lost) or epoch > copy.end.count
        if changed:
            copy.replay(new, lost, epoch)
        end = copy.end
        if changed or name != OWN:
            copy.install(path, own)
        settle(path, outer, end)
    return {"ledger": name, "replayed": len(new), "seq": end.count, "lost": gap}


def _ends(given: Given) -> list[End]:
    """List where the ledger is known to have ended: by the outer anchor, or, where it is lost, by the inner one."""
    path = outside(given.store, "anchor")
    outer, inner = read_anchor(path), read_anchor(given.store / "anchor")
    if outer is not None:
        return [outer]
    if path.exists() and not given.without_anchor:
        raise StoreError(f"{path} is damaged: put your copy of it there; if it is lost, say --without-anchor")
    return [inner] if inner is not None and inner.origin == _end_of(given.backup).origin else []


def _end_of(backup: Path) -> End:
    return End.parse(read_checked(backup / MANIFEST)["ledger"])


def _newest(
    given: Given, ends: Sequence[End], scratch: Path, own: sqlite3.Connection | None, copies: ExitStack
) -> tuple[str, Copy]:
    """Choose the ledger that all anchors agree with, or else the one that goes farthest."""
    places = {OWN: given.store / LEDGER, "of --ledger": given.ledger, "of the backup": given.backup / LEDGER}
    origin = ends[0].origin if ends else _end_of(given.backup).origin
    found: list[tuple[tuple[bool, int], str, Copy]] = []
    for number, (name, place) in enumerate(places.items()):
        if place is None or not place.exists():
            continue
        try:
            copy = copies.enter_context(closing(Copy(place, scratch / str(number), own if name == OWN else None)))
        except LedgerError:
            if name == "of --ledger":
                raise
            continue
        if name == OWN and copy.end.origin != origin:
            raise ValueError(f"STORE: expected the store of the backup, got another one in {given.store}")
        forked = any(end.count <= copy.end.count and not copy.holds(end) for end in ends)
        if copy.end.origin == origin and not forked:
            found.append(((all(map(copy.holds, ends)), copy.end.count), name, copy))
        elif name != OWN:
            raise StoreError(f"the ledger {name} is not an earlier state of the one in {given.store}")
    if not found:
        raise StoreError("no ledger can be read, neither of the store nor of the backup: check the disk and repeat")
    return max(found, key=lambda entry: entry[0])[1:]  # the first of equals


# What is declared, nodes and records


def _restore_declared(store: Path, source: StoreFolder) -> None:
    """Write what is missing or damaged of what was declared once; ``store.json`` last, for it makes a store."""
    files = None
    with suppress(StoreError):
        files = StoreFolder(store).files
    for name in source.declared[::-1]:
        there, data = store / name, read_bytes(source.path / name)
        sealed = files if name in ("key", "signing-key") else None  # by the store key of today
        with suppress(StoreError):
            if sealed:
                sealed.read(there)
                continue
            if read_bytes(there) == data or (files and name == "store.json"):
                continue
        there.parent.mkdir(parents=True, exist_ok=True)
        if sealed:
            sealed.write(there, source.files.read(source.path / name))
        else:
            atomic_write(there, data)


def _restore_files(folder: StoreFolder, source: StoreFolder, absent: Collection[Cell]) -> dict[str, Any]:
    """Write the live nodes and the records of people who are not deleted, where they are missing or damaged."""
    slices = folder.ledger.slices()
    live = folder.identities(slices).values()
    with system_errors("create", folder.nodes.folder):
        folder.nodes.folder.mkdir(exist_ok=True)
    nodes = sum(_restore_node(folder, source, node) for node in live)
    lost = Losses()
    records = sum(_restore_slice(folder, source, cell, absent, lost) for cell in slices)
    lost |= erase(folder)
    # Of an older copy that was put back, and that the ledger has on record as erased.
    for node in {file.stem for file in folder.nodes.folder.iterdir()} - set(live):
        if re.fullmatch("[0-9a-f]{64}", node):  # else of somebody else: a README, ...
            folder.nodes.erase(node)
    missing = sum(not folder.nodes.has(node) for node in live)
    return {"nodes": nodes, "records": records, "missing": missing, "lost_slices": named(lost)}


def _restore_node(folder: StoreFolder, source: StoreFolder, node: str) -> bool:
    if folder.nodes.has(node):
        with suppress(StoreError):
            folder.nodes.get(node)
            return False
    folder.nodes.erase(node)
    if not source.nodes.has(node):
        return False
    manifest, tensors = source.nodes.get(node)
    folder.nodes.put(manifest["identity"], tensors, manifest["provenance"])
    return True


def _restore_slice(
    folder: StoreFolder, source: StoreFolder, cell: Cell, absent: Collection[Cell], lost: Losses
) -> bool:
    gone = folder.ledger.gone(cell[0])
    try:
        found = folder.records.get(*cell)
        kept = _less(found, folder, gone)
        if len(kept) < len(found):
            folder.records.put(*cell, kept)
        return False
    except Lost as error:
        if cell in abandoned(folder) and not source.records.has(*cell):
            return False
        if cell in absent:
            lost[cell] = error
            return False
    except StoreError:
        pass
    if not source.records.has(*cell):
        raise StoreError(
            f"the records of slice {cell[0]}-{cell[1]} are missing, and {source.path} is older than its shards: restore"
            " from a backup that was made after they were opened"
        )
    try:
        found = source.records.get(*cell)
    except Lost as error:  # before it was copied: the rest comes back
        lost[cell] = error
        return False
    folder.records.put(*cell, _less(found, folder, gone))
    return True


def _less(records: SliceRecords, folder: StoreFolder, gone: frozenset[str]) -> SliceRecords:
    """Drop the records that name a deleted person."""
    dead = {name for names in records.subjects for name in names if subject_hash(folder.key, name) in gone}
    return records.take([row for row, names in enumerate(records.subjects) if dead.isdisjoint(names)])
