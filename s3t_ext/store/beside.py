"""What lies beside a store: copies that leave it; of killed runs parts of stores, their keys and anchors, records."""

from __future__ import annotations

import glob
from contextlib import suppress
from pathlib import Path

from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import (
    StoreError,
    destroy,
    destroy_tree,
    exclusive,
    exists,
    outside,
    read_bytes,
    read_checked,
    remove,
)


def new_folder(dest: Path | str, store: Path) -> Path:
    """Give the absolute path of a folder that something of a store is to be written to.

    Raises:
        ValueError: something is there, or it lies in the store.
    """
    dest = Path(dest).absolute()
    if store.resolve() in (dest.resolve(), *dest.resolve().parents):
        raise ValueError(f"FOLDER: expected a new folder outside the store, got {dest}, which lies in it")
    if exists(dest):
        raise ValueError(f"FOLDER: expected a new folder, got {dest}, which exists: name another, or move it away")
    return dest


def sweep_beside(path: Path) -> None:
    """Destroy what killed runs left beside a store: stores that never came to be, and copies that verified it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(StoreError, OSError):
            with exclusive(part):
                # First: without the folder nothing would tell what is its own from another store's of this name.
                if not exists(path / "store.json"):
                    if _is_anchor_of(part, outside(path, "anchor")):
                        remove(outside(path, "anchor"))
                    if _is_key_of(part, outside(path, "key")):
                        destroy(outside(path, "key"))
                destroy_tree(part)
            part.rmdir()


def _is_anchor_of(part: Path, file: Path) -> bool:
    """Tell whether an anchor is that of a store that never came to be; a backup has none."""
    with suppress(StoreError):
        return bool(read_checked(part / "anchor")["origin"] == read_checked(file)["origin"])
    return False


def _is_key_of(part: Path, file: Path) -> bool:
    """Tell whether a key file is that of a store that never came to be; of zeros it is one that was being destroyed."""
    with suppress(StoreError):  # no key, or none yet
        drawn = exists(part / "epoch") and read_checked(part / "store.json")["store_key"]  # a backup has no epoch
        data = read_bytes(file)
        return bool(drawn) and (not any(data) or StoreKey.from_hex(data.decode("latin-1"), str(file)).name == drawn)
    return False
