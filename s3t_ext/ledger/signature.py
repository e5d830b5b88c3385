"""Signed receipts: whoever holds one and the store's `public.json` can check it, without the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3t_ext.ledger.identity import KEY_BYTES, Key, canonical_json
from s3t_ext.ledger.log import GENESIS, link
from s3t_ext.store.files import check_format, read_bytes


class SigningKey(Key):
    """A secret of 32 bytes that signs receipts, drawn once per store.

    Notes:
        Ed25519, RFC 8032: a signature is a function of key and content. `cryptography` is loaded on first use.
    """

    __slots__ = ()

    @property
    def public(self) -> str:
        """The public half, 64 hex digits."""
        return self._private().public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> str:
        """Return the signature of `data`, 128 hex digits."""
        return self._private().sign(data).hex()

    def _private(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._secret)


def sign(receipt: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """Return the receipt with its `signature`, over the canonical JSON of everything else."""
    return {**receipt, "signature": key.sign(canonical_json(dict(receipt)))}


def fault(receipt: Mapping[str, Any], public: Mapping[str, Any]) -> str | None:
    """Say in one line why a receipt is not to be believed; None: it is what the store of `public` signed.

    Args:
        receipt: as `sign` made it, keys in any order.
        public: the store's `public.json`, as `read_public` gives it.
    """
    signature, ledger = receipt.get("signature"), receipt.get("ledger")
    if "signature" not in receipt:
        return "it is not signed: the signature was taken off"
    origin = link(GENESIS, "created", canonical_json(dict(public))).hex()
    if not isinstance(ledger, dict) or ledger.get("origin") != origin:
        return "it names another store than the public manifest"
    rest = canonical_json({name: value for name, value in receipt.items() if name != "signature"})
    if not _signed(rest, signature, bytes.fromhex(public["meta"]["public_key"])):
        return "its signature does not match: the receipt was changed, or signed by another key"
    return None


def _signed(data: bytes, signature: object, public: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(signature, str) or not _is_hex(signature, 64):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), data)
    except InvalidSignature:
        return False
    return True


def read_receipt(path: str | Path) -> dict[str, Any]:
    """Read a receipt from a file, signed or not.

    Raises:
        ValueError: it is not one JSON object.
        StoreError: it cannot be read.
    """
    return _object(Path(path))


def read_public(path: str | Path) -> dict[str, Any]:
    """Read a store's `public.json`.

    Raises:
        ValueError: it is no such document, or names no public key.
        StoreError: it cannot be read, or is of another format.
    """
    public = _object(Path(path))
    check_format(public.get("format"), path)
    meta = public.get("meta")
    key = meta.get("public_key") if isinstance(meta, dict) else None
    if not isinstance(key, str) or not _is_hex(key, KEY_BYTES):
        raise ValueError(f"{path}: expected the public.json of a store, found no public key")
    return public


def _is_hex(text: str, size: int) -> bool:
    return len(text) == 2 * size and set(text) <= set("0123456789abcdef")


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path), object_pairs_hook=_once)
        canonical_json(found)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected one JSON object, found a damaged or another file") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected one JSON object, found {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice: readers disagree on which of the two counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found
