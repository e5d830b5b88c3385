"""Back up a store while it serves and deletes. Loads no torch.

A backup is a folder with the store's files as they lie, sealed ones sealed, its ledger at one moment, and
``backup.json``: SHA-256 of each file and where the ledger ends (checked). The store key and the outer anchor are not in
it: a backup alone opens nothing and proves nothing about its own age.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s3t_ext.ledger.database import now
from s3t_ext.store.beside import new_folder
from s3t_ext.store.files import (
    StoreError,
    advice,
    destroy_tree,
    exclusive,
    read_checked,
    sync_folder,
    system_errors,
    write_checked,
)
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder, sweep_beside
from s3t_ext.system.lost import Losses, abandoned, losses, named
from s3t_ext.system.unlearn import erase, erase_pending

MANIFEST = "backup.json"
LEDGER = "ledger.sqlite"
_BLOCK = 1 << 20


def backup(path: Path | str, dest: Path | str) -> dict[str, Any]:
    """Write a consistent copy of a store, durably, to a new folder that appears when it is whole.

    Training and erasing wait for it, requests and answers do not. Requests that are pending are erased first. It is
    entered in the ledger as an export of all slices: the receipt of everybody who is deleted later names it.

    Returns:
        backup (its path), files and bytes (copied), nodes, ledger (where it ends), lost_slices (whose records cannot
        be read, and are not in it: why, by "shard-slice").

    Raises:
        ValueError: the destination exists, or lies in the store.
        StoreError, LedgerError: the store cannot be read or what is pending not be erased, or the copy not be written;
            no folder of that name stays.
    """
    path = Path(path).absolute()
    dest = new_folder(dest, path)
    with StoreFolder(path) as folder:
        with exclusive(path), _appearing(dest) as part:
            slices = folder.ledger.slices()
            folder.ledger.export(dest.name, "backup", folder.trained(slices).values(), slices)
            lost = erase(folder)  # what was acknowledged before that event: receipts do not name this copy
            _refuse_residue(folder, lost)
            lost |= losses(folder, look=True)  # a copy of a damaged file would pass for one
            live = folder.trained(folder.ledger.slices()).values()
            names = [*folder.declared, *(f"nodes/{node}.{kind}" for node in live for kind in ("sealed", "json"))]
            absent = sorted({*lost, *abandoned(folder)})
            names += [f"records/{shard}-{slice_}.sealed" for shard, slice_ in slices.keys() - set(absent)]
            files = {name: _copy(path / name, part / name) for name in names}
            end = folder.ledger.backup(part / LEDGER)  # last: no request that a file has missed is missing here
            files[LEDGER] = _hash(part / LEDGER)
            write_checked(
                part / MANIFEST, {"files": files, "ledger": end.body(), "time": now(), "lost": [*map(list, absent)]}
            )
            copied = sum((part / name).stat().st_size for name in files)
        lost |= erase_pending(folder)  # what was requested meanwhile
    return {
        "backup": str(dest),
        "files": len(files),
        "bytes": copied,
        "nodes": len(live),
        "ledger": end.body(),
        "lost_slices": named(lost),
    }


def _refuse_residue(folder: StoreFolder, lost: Losses) -> None:
    """Refuse to copy what was erased once, and has come back with an older copy of a file; find lost slices."""
    left = residue(folder, lost).keys()
    back = left - {request.request_id for request in folder.ledger.unerased()}  # which came in just now
    if back:
        raise StoreError(
            f"{folder.path} holds files of deleted people again: run `s3t erase {folder.path}`, then repeat"
        )


@contextmanager
def _appearing(dest: Path) -> Iterator[Path]:
    """Give a folder beside a place that takes it, durably, when the block ends."""
    try:
        sweep_beside(dest)
        part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".part", dir=dest.parent))
    except OSError as error:
        raise StoreError(f"cannot create {dest}: {error.strerror or error}; {advice(error)}") from error
    try:
        with exclusive(part):
            yield part
            with system_errors("write", dest):
                for folder in [part, *(entry for entry in part.rglob("*") if entry.is_dir())]:
                    sync_folder(folder)
                os.rename(part, dest)
                try:
                    sync_folder(dest.parent)
                except BaseException:
                    os.rename(dest, part)
                    raise
    finally:
        if part.exists():
            destroy_tree(part)
            part.rmdir()


def _copy(source: Path, target: Path) -> str:
    """Copy a file durably but for its name; return its SHA-256."""
    digest = hashlib.sha256()
    with system_errors("copy", source):
        target.parent.mkdir(exist_ok=True)
        with open(source, "rb") as old, open(target, "xb") as new:
            while block := old.read(_BLOCK):
                digest.update(block)
                new.write(block)
            new.flush()
            os.fsync(new.fileno())
    return digest.hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with system_errors("read", path), open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check(backup: Path) -> dict[str, Any]:
    """Read a backup's manifest and hold every file against it.

    Raises:
        StoreError: it is no backup, or one of its files is missing or differs.
    """
    if not (backup / MANIFEST).exists():
        raise StoreError(f"{backup} is no backup: it has no {MANIFEST}; give a folder that `s3t backup` wrote")
    body: dict[str, Any] = read_checked(backup / MANIFEST)
    if "files" not in body:
        raise StoreError(f"{backup / MANIFEST} is damaged: it is another file; use another backup")
    for name, digest in body["files"].items():
        if _hash(backup / name) != digest:
            raise StoreError(f"{backup / name} is damaged: it does not match {MANIFEST}; use another backup")
    return body
