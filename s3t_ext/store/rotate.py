"""A new store key for a store: after it the old one opens nothing, neither what is left on the drive of erased files.

Three passes, so that at every instant the one key that ``store.json`` names opens every file::

    1   every file gets the new key in its free slot              store.json names the old one
    2   store.json names the new one
    3   every file's old slot is zeroed; the old key file is overwritten and the new one takes its name
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3t_ext.store.crypt import StoreKey, grant, revoke
from s3t_ext.store.files import (
    StoreError,
    destroy,
    exists,
    outside,
    overwrite,
    read_checked,
    sync_folder,
    system_errors,
    write_checked,
)
from s3t_ext.store.sealed import SealedFiles


def rotate(store: str | Path, new_key: str | Path | None = None) -> dict[str, Any]:
    """Give a store a new store key; killed at any instant, the store opens, and the same call ends what was begun.

    Call it under the lock. Until it ends the new key lies in ``NAME.key.new``. Running processes go on;
    those that were given their key in ``S3T_STORE_KEY`` must be started anew.

    Args:
        store: its folder.
        new_key: a file with the 64 hex digits of the new key. Default: one is drawn. Where the key is in
            ``S3T_STORE_KEY`` it is needed, and written if it is not there.

    Returns:
        store; key, the new one's public name; files, how many it opens; damaged, those that it does not, as they were.

    Raises:
        ValueError: no `new_key` where it is needed, or the store's own.
        StoreError: a key is missing or wrong, or a file cannot be written: repeat the call.
    """
    store = Path(store)
    if not exists(store / "store.json"):
        raise StoreError(f"{store} holds no store")
    return _from_environment(store, new_key) if os.environ.get("S3T_STORE_KEY") else _from_file(store, new_key)


def _from_file(store: Path, new_key: str | Path | None) -> dict[str, Any]:
    current, old, new = StoreKey.find(store), outside(store, "key"), outside(store, "key.new")
    wanted = None if new_key is None else StoreKey.load(Path(new_key))
    StoreKey.sweep(new)
    try:
        begun = StoreKey.load(new) if exists(new) else None
    except StoreError:
        if StoreKey.load(old) != current:
            raise
        begun = None  # half destroyed, when the store did not name it yet
    if begun == current and wanted not in (None, begun):
        raise ValueError(f"new_key: a rotation to the key in {new} is unfinished; end it first, without a new key")
    if begun != current:  # else the store names it already
        if wanted == current:
            raise ValueError("new_key: expected another key than the store's own")
        if begun is None or wanted not in (None, begun):
            destroy(new)  # no file depends on it
            begun = wanted or StoreKey.new()
            begun.keep(new)
    report = _rewrap(store, current, begun)
    if exists(old):
        overwrite(old)
    with system_errors("replace", old):
        os.replace(new, old)
        sync_folder(old.parent)
    return report


def _from_environment(store: Path, new_key: str | Path | None) -> dict[str, Any]:
    if new_key is None:
        raise ValueError(
            "new_key: the store key is in S3T_STORE_KEY, so name a file for the new one, there or to be written"
        )
    path = Path(new_key)
    if not exists(path):
        StoreKey.find(store)
        StoreKey.new().keep(path)
    new = StoreKey.load(path)
    named = read_checked(store / "store.json")["store_key"]
    return _rewrap(store, new if new.name == named else StoreKey.find(store), new)


def _rewrap(store: Path, current: StoreKey, new: StoreKey) -> dict[str, Any]:
    files = SealedFiles(store, current)
    if new != current:
        _each(files, lambda path, name: grant(path, name, current, new))
        body = read_checked(store / "store.json")
        write_checked(store / "store.json", {**body, "store_key": new.name})
    damaged = _each(files, lambda path, name: revoke(path, name, new))
    return {"store": str(store), "key": new.name, "files": len(files.all()) - len(damaged), "damaged": damaged}


def _each(files: SealedFiles, change: Callable[[Path, str], None]) -> list[str]:
    damaged = []
    for path in files.all():
        try:
            change(path, files.name(path))
        except ValueError:
            damaged.append(files.name(path))
    return damaged
