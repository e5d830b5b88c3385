"""Sealed files: content under a key of its own, which is wrapped by the store key, which lies outside the store.

A sealed file is a head of two slots, 512 bytes each, and the content::

    slot      name of a store key (16 bytes), nonce (12), the content's key wrapped by that store key (48), zeros
    content   AES-256-GCM under the content's key, in segments of 64 MiB; nonce: the segment's number

The file's name in its store is authenticated with both, so that no file passes for another. Two slots, each in a sector
of its own: a new store key gets the second while the first still opens the file. Whoever zeroes the head destroys the
file: `destroy` does that first.
"""

from __future__ import annotations

import errno
import glob
import hmac
import os
import secrets
import stat
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from s3t_ext.store.files import (
    FORMAT,
    PART,
    StoreError,
    discard,
    exists,
    outside,
    read_bytes,
    read_checked,
    sync_folder,
    system_errors,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
SLOT = 512
HEAD = 2 * SLOT
_NAME, _NONCE, _TAG = 16, 12, 16
USED = _NAME + _NONCE + KEY_BYTES + _TAG  # of a slot
_SEGMENT = 1 << 26


class StoreKey:
    """A secret of 32 bytes that opens a store, kept outside its folder; never printed, never pickled."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes) or len(secret) != KEY_BYTES:
            raise ValueError(f"secret: wanted {KEY_BYTES} bytes, got {type(secret).__name__} of another size")
        self._secret = secret

    @classmethod
    def new(cls) -> StoreKey:
        """Draw a key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_hex(cls, text: str, source: str) -> StoreKey:
        """Read a key from 64 hex digits; an error names their source and never shows them."""
        with suppress(ValueError):
            return cls(bytes.fromhex(text.strip()))
        raise StoreError(f"{source} is not a store key: wanted {2 * KEY_BYTES} hex digits; restore it from your copy")

    @property
    def name(self) -> str:
        """A public name, 32 hex digits, from which nothing about the key follows."""
        return hmac.digest(self._secret, b"s3t store key, name", "sha256")[:_NAME].hex()

    def cipher(self) -> AESGCM:
        """Return AES-256-GCM under this key."""
        return _cipher(self._secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreKey) and hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StoreKey({self.name[:8]}...)"

    def __reduce__(self) -> str:
        raise TypeError("a StoreKey is not pickled: its secret would leave the key file")

    # Where it is kept

    @classmethod
    def find(cls, store: str | Path) -> StoreKey:
        """Find the key that opens a store: in ``S3T_STORE_KEY``, else in the file ``NAME.key`` outside its folder.

        While a rotation is unfinished there are two files; the store says which of them counts.

        Raises:
            StoreError: none is there, or it is of another store; the message says what to do.
        """
        for _ in range(2):  # a rotation may end between two looks: the store names another key, a file another place
            with suppress(StoreError):
                return cls._find(store)
        return cls._find(store)

    @classmethod
    def _find(cls, store: str | Path) -> StoreKey:
        wanted = read_checked(Path(store) / "store.json")["store_key"]
        given = os.environ.get("S3T_STORE_KEY")
        files = [path for path in (outside(store, "key"), outside(store, "key.new")) if exists(path)]
        if not given and not files:
            raise _lost(Path(store), wanted)
        wrong = []
        for source in ["S3T_STORE_KEY"] if given else files:
            try:
                key = cls.from_hex(given, "S3T_STORE_KEY") if given else cls.load(Path(source))
            except StoreError as error:
                wrong.append(str(error))
                continue
            if key.name == wanted:
                return key
            wrong.append(f"{source} is the store key {key.name[:8]}... of another store")
        for path in files if given else ():
            right = False
            with suppress(StoreError):
                right = cls.load(path).name == wanted
            if right:
                raise StoreError(
                    f"{'; '.join(wrong)}; {path} is that of {store}, but S3T_STORE_KEY goes before it: unset it, or "
                    "give it the digits of this one"
                )
        raise StoreError(f"{'; '.join(wrong)}; {store} is opened by {wanted[:8]}...: put back your copy of that one")

    @classmethod
    def draw(cls, store: str | Path) -> StoreKey:
        """Give the key of a store to be made: that of ``S3T_STORE_KEY`` or of its key file, else a fresh one.

        Raises:
            StoreError: what is there is no key.
        """
        path = outside(store, "key")
        if given := os.environ.get("S3T_STORE_KEY"):
            return cls.from_hex(given, "S3T_STORE_KEY")
        return cls.load(path) if exists(path) else cls.new()

    def keep(self, path: Path) -> None:
        """Write the key to a file of its own, durably, for its owner only; one that holds it already is fine.

        Raises:
            StoreError: the file holds another key, or cannot be written.
        """
        StoreKey.sweep(path)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
        with system_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(self._secret.hex().encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                with suppress(FileExistsError):  # never another key's file: it may be all that opens a store
                    os.link(part, path)
            finally:
                part.unlink(missing_ok=True)
            sync_folder(path.parent)
        if StoreKey.load(path) != self:
            raise StoreError(f"{path} holds another store key; move it away, if no store needs it, and repeat")

    @staticmethod
    def sweep(path: Path) -> None:
        """Remove what a killed `keep` left beside a key's file: an unused key, or a second name of the one in use."""
        with system_errors("search", path.parent):
            found = list(path.parent.glob(f".{glob.escape(path.name)}.*{PART}"))
        for left in found:
            discard(left)

    @classmethod
    def load(cls, path: Path) -> StoreKey:
        """Read a key file; a warning tells when others may read it too."""
        data = read_bytes(path)
        with system_errors("read", path):
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                warnings.warn(f"{path} can be read by others than its owner: `chmod 600 {path}`", stacklevel=3)
        return cls.from_hex(data.decode("ascii", "replace"), str(path))


def _lost(store: Path, wanted: str) -> StoreError:
    return StoreError(
        f"the store key {wanted[:8]}... is missing: {outside(store, 'key')} is not there. Without it no record and no "
        f"weight in {store} can be read and nobody be found or deleted; nothing was changed. Put back your copy of the "
        "file (a moved or renamed store needs its file moved or renamed with it), name its folder in S3T_KEY_FOLDER, "
        "or give its 64 hex digits in S3T_STORE_KEY"
    )


# Bytes


def seal(name: str, data: bytes, key: StoreKey) -> bytes:
    """Encrypt content under a fresh key, wrapped by the store key.

    Args:
        name: of the file in its store, without suffix: "key", "nodes/<id>", "records/0-1".
    """
    own = secrets.token_bytes(KEY_BYTES)
    count = max(1, -(-len(data) // _SEGMENT))
    cipher, view = _cipher(own), memoryview(data)
    parts = [
        cipher.encrypt(_counter(i), view[i * _SEGMENT : (i + 1) * _SEGMENT], _bound(name, count)) for i in range(count)
    ]
    return b"".join([_slot(name, own, key), bytes(SLOT), *parts])


def unseal(name: str, data: bytes, key: StoreKey) -> bytes:
    """Decrypt what `seal` made under this name and store key.

    Raises:
        ValueError: it was changed or cut, belongs to another name, or is not for this key.
    """
    cipher, view = _cipher(_open_head(name, data, key)), memoryview(data)[HEAD:]
    step = _SEGMENT + _TAG
    count = max(1, -(-len(view) // step))
    return b"".join(
        _decrypt(cipher, _counter(i), view[i * step : (i + 1) * step], _bound(name, count)) for i in range(count)
    )


def _cipher(secret: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # 30 ms that most commands do not need

    return AESGCM(secret)


def _decrypt(cipher: AESGCM, nonce: bytes, data: bytes | memoryview, bound: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, data, bound)
    except InvalidTag:
        raise ValueError("its content does not match its seal") from None


def _counter(number: int) -> bytes:
    return number.to_bytes(_NONCE, "big")


def _bound(name: str, count: int) -> bytes:
    """Say what a segment is part of (the count makes the last one the last); a slot has no segments."""
    return struct.pack("<QQ", FORMAT, count) + name.encode()


def _slot(name: str, own: bytes, key: StoreKey) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    used = bytes.fromhex(key.name) + nonce + key.cipher().encrypt(nonce, own, _bound(name, 0))
    return used.ljust(SLOT, b"\0")


def _open_head(name: str, head: bytes, key: StoreKey) -> bytes:
    at = _at(head, key)
    nonce, wrapped = head[at + _NAME : at + _NAME + _NONCE], head[at + _NAME + _NONCE : at + SLOT]
    return _decrypt(key.cipher(), nonce, wrapped[: KEY_BYTES + _TAG], _bound(name, 0))


def _at(head: bytes, key: StoreKey) -> int:
    for at in (0, SLOT):
        if head[at : at + _NAME].hex() == key.name and len(head) >= HEAD:
            return at
    raise ValueError(f"it is not sealed for the store key {key.name[:8]}...")


# Slots of a file


def grant(path: Path, name: str, holder: StoreKey, new: StoreKey) -> None:
    """Let a second store key open a sealed file, durably, in the slot that `holder` does not use; repeating is fine.

    Raises:
        ValueError: `holder` does not open it.
        StoreError: it cannot be written; `holder` opens it all the same.
    """
    with system_errors("write", path), open(path, "r+b") as file:
        head = os.pread(file.fileno(), HEAD, 0)
        own = _open_head(name, head, holder)
        with suppress(ValueError):
            if _open_head(name, head, new) == own:
                os.fsync(file.fileno())
                return
        _put(file.fileno(), _slot(name, own, new), SLOT - _at(head, holder))


def revoke(path: Path, name: str, kept: StoreKey) -> None:
    """Zero the slot of a sealed file that `kept` does not use, durably; repeating is fine.

    Raises:
        ValueError: `kept` does not open it; it is as it was.
        StoreError: it cannot be written; `kept` opens it all the same.
    """
    with system_errors("write", path), open(path, "r+b") as file:
        head = os.pread(file.fileno(), HEAD, 0)
        _open_head(name, head, kept)
        _put(file.fileno(), bytes(SLOT), SLOT - _at(head, kept))


def _put(handle: int, slot: bytes, at: int) -> None:
    if os.pwrite(handle, slot, at) != SLOT:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    os.fsync(handle)
