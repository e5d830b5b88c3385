"""Files that survive a crash and show a flipped byte: atomic writes, checked documents, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORMAT = 2
PART = ".part"
"""Suffix of a file being written or destroyed; one that is found under the lock was left by a killed run."""

_BLOCK = 1 << 20
_HEAD = 4096  # holds the wrapped key of a sealed file


class StoreError(Exception):
    """The store cannot be read or written; the message says in one line what is wrong and what to do."""


class Damaged(StoreError):
    """A sealed file is there, and the store key does not open it."""


class Locked(StoreError):
    """Another writer holds the store's lock."""


def outside(store: str | Path, kind: str) -> Path:
    """Name a file that belongs to a store but lies outside its folder, so that no copy of the folder holds it.

    Args:
        store: the store's folder.
        kind: "key" (its store key) or "anchor" (the end of its ledger).

    Returns:
        ``NAME.kind``, NAME that of the folder, beside the folder, or in the folder that ``S3T_KEY_FOLDER`` names.

    Raises:
        StoreError: ``S3T_KEY_FOLDER`` is relative, or lies in the store.
    """
    store = Path(store).resolve()
    folder = Path(os.environ.get("S3T_KEY_FOLDER") or store.parent)
    if not folder.is_absolute() or store in (folder.resolve(), *folder.resolve().parents):
        raise StoreError(f"S3T_KEY_FOLDER: expected an absolute path outside {store}, got {str(folder)!r}")
    return folder / f"{store.name}.{kind}"


def advice(error: OSError) -> str:
    """Say what to do about a failed system call."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space and repeat"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable for this user, or use another one"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "check the path"
    return "check the disk and repeat"


@contextmanager
def system_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StoreError` that names the action and the path."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {action} {path}: {error.strerror or error}; {advice(error)}") from error


def canonical_json(value: Any) -> bytes:
    """Encode plain JSON types in the one way that is hashed: sorted string keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: a value without an exact JSON form, or a key that is not a string (1 and "1" would be one key).
    """
    _refuse_other_keys(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise ValueError(f"value: wanted plain, finite JSON types: {error}") from error


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"value: wanted string keys, got {key!r}")
            _refuse_other_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_other_keys(item)


# Writing and removing


def sync_folder(folder: Path) -> None:
    """Make the folder's own entries (new names, renames, removals) durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")


def atomic_write(path: str | Path, data: bytes, *, destroy_old: bool = False, part: Path | None = None) -> None:
    """Write a whole file durably: after a crash at any point `path` holds the old content or all of the new one.

    Args:
        path: the file; its folder must exist.
        data: the new content.
        destroy_old: overwrite the content that is replaced before its blocks are freed.
        part: the name to write under first. Default: one that `sweep` knows, so that the caller must hold the store's
            lock where there is one; a writer with a lock of its own gives another, and finds it again after a kill.

    Raises:
        StoreError: the disk is full, the folder read-only, ...; the old content is as it was, or the new one is in
            place. Where nothing can be erased either, a file stays that `sweep` destroys.
    """
    path = Path(path)
    new, old = part or _part(path), _part(path)
    with system_errors("write", path):
        try:
            with open(new, "wb" if part else "xb") as file:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            replaced = destroy_old and path.exists()
            if replaced:
                os.link(path, old)  # a second name: a crash after the rename leaves it for `sweep`
            os.replace(new, path)
        except BaseException:
            for leftover in (new, old):
                with suppress(StoreError):
                    discard(leftover)
            raise
        sync_folder(path.parent)
    if replaced:
        destroy(old)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def remove(path: str | Path) -> None:
    """Unlink a file durably; one that is not there is fine."""
    with system_errors("remove", path := Path(path)):
        path.unlink(missing_ok=True)
        if path.parent.exists():
            sync_folder(path.parent)


def destroy(path: str | Path) -> None:
    """Overwrite a file with zeros, then unlink it, both durably; one that is not there is fine.

    The head goes first, synced before the rest is touched: of a sealed file nothing can be read from then on.

    Notes:
        Copy-on-write file systems, snapshots and flash translation may keep the old blocks all the same.
    """
    if exists(path):
        overwrite(path)
    remove(path)


def exists(path: str | Path) -> bool:
    """Tell whether a file is there; a `StoreError` where that cannot be told."""
    with system_errors("look for", Path(path)):
        return Path(path).exists()


def overwrite(path: str | Path) -> None:
    """Overwrite a file with zeros, durably, its head first; see `destroy`."""
    with system_errors("erase", path := Path(path)), open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        _zero(file.fileno(), min(size, _HEAD))
        if size > _HEAD:
            _zero(file.fileno(), size - _HEAD)


def _zero(handle: int, left: int) -> None:
    while left > 0:
        left -= os.write(handle, bytes(min(left, _BLOCK)))
    os.fsync(handle)


def destroy_tree(folder: str | Path) -> None:
    """Overwrite and unlink everything in a folder; the folder itself stays."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):  # what lies in a folder comes before it
        if path.is_dir() and not path.is_symlink():
            with system_errors("remove", path):
                path.rmdir()
        else:
            destroy(path)


def sweep(root: str | Path) -> list[Path]:
    """Destroy the half-written files that a killed run left below `root`; return them. Call it under the lock."""
    with system_errors("search", Path(root)):
        found = sorted(Path(root).rglob(f".*{PART}"))
    for path in found:
        discard(path)
    return found


def discard(part: Path) -> None:
    """Remove a half-written file: overwritten first, unless it is a second name of one in place."""
    with system_errors("remove", part):
        second = part.exists() and part.stat().st_nlink > 1
    (remove if second else destroy)(part)


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        StoreError: it is missing or cannot be read.
    """
    with system_errors("read", Path(path)):
        return Path(path).read_bytes()


# Checked documents


def check_format(found: object, what: str | Path) -> None:
    """Refuse data that another version of the format wrote.

    Raises:
        StoreError: `found` is not `FORMAT`; the message names both.
    """
    if found != FORMAT or isinstance(found, bool):
        raise StoreError(
            f"{what} has format {found!r}, this version of s3t_ext reads format {FORMAT}: "
            "use the version that wrote it (or restore the file, if it is damaged)"
        )


def write_checked(path: str | Path, body: Any, *, destroy_old: bool = False, part: Path | None = None) -> None:
    """Write a JSON document in its canonical form with the format's version and a SHA-256 of both, atomically."""
    atomic_write(path, _document(body), destroy_old=destroy_old, part=part)


def read_checked(path: str | Path) -> Any:
    """Read back the body that `write_checked` wrote.

    Raises:
        StoreError: the file is missing, of another format, or differs in any byte from what was written.
    """
    data = read_bytes(path)
    try:
        document = json.loads(data)
        found, body = document["format"], document["body"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(path) from None
    check_format(found, path)
    with suppress(ValueError):  # a flip can make a NaN, which no document holds
        if _document(body) == data:  # as bytes: a flipped space or an equivalent spelling of a number is a flip as well
            return body
    raise _damaged(path)


def _document(body: Any) -> bytes:
    digest = hashlib.sha256(canonical_json({"body": body, "format": FORMAT})).hexdigest()
    return canonical_json({"body": body, "format": FORMAT, "sha256": digest}) + b"\n"


def _damaged(path: str | Path) -> StoreError:
    return StoreError(f"{path} is damaged: its content does not match its checksum; restore it from a backup")


# One writer


@contextmanager
def exclusive(root: str | Path) -> Iterator[None]:
    """Hold the store's writer lock for the block, and first sweep what a killed writer left.

    Raises:
        Locked: another writer holds it; the message gives its process id.
        StoreError: the folder is not writable.
    """
    root = Path(root)
    path = root / "lock"
    with system_errors("lock", path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            holder = "this process" if pid == str(os.getpid()) else f"another process ({pid})"
            raise Locked(f"{holder} is writing to {root}; wait for it or stop it") from None
        with system_errors("lock", path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        sweep(root)
        yield
    finally:
        os.close(handle)  # closing releases the lock; the file stays, since unlinking it would race with the next one
