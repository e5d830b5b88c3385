"""Keyed names: of subjects, records, slices and nodes. Every hash input is framed, so that no two inputs collide."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from s3t_ext.store.files import canonical_json as canonical_json

KEY_BYTES = 32
SALT_BYTES = 16


def framed(*parts: bytes) -> bytes:
    """Join byte strings unambiguously: each with its length before it as 8 little-endian bytes."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


_K = TypeVar("_K", bound="Key")


class Key:
    """A secret of 32 bytes. It is drawn once per store and never again: every placement hangs on it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes) or len(secret) != KEY_BYTES:
            raise ValueError(f"secret: wanted {KEY_BYTES} bytes, got {type(secret).__name__} of another size")
        self._secret = secret

    @classmethod
    def new(cls: type[_K]) -> _K:
        """Draw a key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_hex(cls: type[_K], text: str) -> _K:
        """Read a key from 64 hex digits."""
        try:
            return cls(bytes.fromhex(text))
        except (ValueError, TypeError):
            raise ValueError(f"key: wanted {2 * KEY_BYTES} hex digits") from None  # never show what was given

    def hex(self) -> str:
        """Return the secret as hex digits, for the store's key file alone."""
        return self._secret.hex()

    @property
    def name(self) -> str:
        """A public name of the key, from which nothing about it follows."""
        return self.derive("name").mac().hex()

    def derive(self, label: str) -> Key:
        """Derive an independent key: HMAC(key, "derive", label)."""
        return Key(self.mac(b"derive", label.encode()))

    def mac(self, *parts: bytes) -> bytes:
        """Compute HMAC-SHA256 over the framed parts, 32 bytes."""
        return hmac.digest(self._secret, framed(*parts), "sha256")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Key(...)"

    def __reduce__(self) -> str:
        raise TypeError("a Key is not pickled: its secret would leave the key file")


SUBJECT_RULES = ("nfkc-casefold", "exact")


def normalise_subject(subject: str, rule: str = "nfkc-casefold") -> str:
    """Bring a subject into the declared form under which it is placed, found and deleted.

    Args:
        subject: a user's name, address or number, as the table has it.
        rule: `nfkc-casefold`: Unicode compatibility caseless form, surrounding space off, inner space to single blanks;
            `exact`: canonical composition (NFC) only.

    Returns:
        The normal form; normalising it again changes nothing.

    Raises:
        ValueError: unknown rule; nothing left; a code point that this Python's Unicode tables do not know, whose form
            another version might see differently, so that a deletion would miss what it should find.

    Notes:
        Unicode, section 3.13, definition D146.
    """
    if not isinstance(subject, str):
        raise ValueError(f"subject: wanted text, got {type(subject).__name__}")
    for character in subject:
        if unicodedata.category(character) in ("Cn", "Cs"):
            raise ValueError(
                f"subject: U+{ord(character):04X} is no character in Unicode {unicodedata.unidata_version}: "
                "correct the table, or use a newer Python"
            )
    if rule == "exact":
        form = unicodedata.normalize("NFC", subject)
    elif rule == "nfkc-casefold":
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", subject).casefold()).casefold()
        form = " ".join(unicodedata.normalize("NFKC", folded).split())
    else:
        raise ValueError(f"rule: wanted one of {', '.join(SUBJECT_RULES)}, got {rule!r}")
    if not form:
        raise ValueError("subject: wanted some text, got an empty one")
    return form


def subject_hash(key: Key, subject: str) -> str:
    """Return the ledger's name of a normalised subject, HMAC(key/subject, subject), 64 hex digits."""
    return key.derive("subject").mac(subject.encode()).hex()


def record_key(key: Key, subjects: Sequence[str], record: bytes, count: int) -> bytes:
    """Return the key of a record's random streams, 32 bytes: never a row number, nor anything of other records.

        HMAC(key/record, number of subjects, subjects, record, count)

    Args:
        key: the run key.
        subjects: the record's normalised subjects, its owner first.
        record: its content, canonically encoded.
        count: 0 for the first of equal records, 1 for the second, ...
    """
    names = [subject.encode() for subject in subjects]
    return key.derive("record").mac(struct.pack("<Q", len(names)), *names, record, struct.pack("<Q", count))


def commitment(salt: bytes, record: bytes) -> bytes:
    """Return SHA-256 over the framed salt and record, 32 bytes; without the salt it confirms no guess.

    Raises:
        ValueError: the salt is shorter than 16 bytes.
    """
    if len(salt) < SALT_BYTES:
        raise ValueError(f"salt: wanted at least {SALT_BYTES} random bytes, got {len(salt)}")
    return hashlib.sha256(framed(salt, record)).digest()


def slice_digest(commitments: Iterable[bytes]) -> str:
    """Return the digest of a slice's content, 64 hex digits: SHA-256 over the sorted, framed commitments."""
    ordered = sorted(commitments)
    return hashlib.sha256(struct.pack("<Q", len(ordered)) + framed(*ordered)).hexdigest()


def node_identity(fields: Mapping[str, Any]) -> str:
    """Return a node's identity, 64 hex digits: SHA-256 over the canonical JSON of what defines its result."""
    return hashlib.sha256(canonical_json(dict(fields))).hexdigest()
