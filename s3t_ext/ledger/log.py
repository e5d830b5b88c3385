"""The event log: append-only rows in a hash chain, and the state that they add up to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from s3t_ext.ledger.identity import framed

GENESIS = bytes(32)
Cell = tuple[int, int]
"""(shard, slice), both 0-based."""


class ChainError(Exception):
    """The rows do not form the chain that was written; the message says where it breaks."""


class Event(NamedTuple):
    """A row of the log: hash = SHA-256(framed(hash of the row before, kind, body))."""

    seq: int
    kind: str
    body: dict[str, Any]
    hash: bytes


@dataclass(frozen=True)
class Request:
    """A deletion request: `applied` has masked its subjects, `erased` has removed the dead weights and records too."""

    seq: int
    request_id: str
    state: str
    time: str
    subjects: tuple[str, ...]
    receipt_sha256: str


@dataclass
class State:
    """What the events so far add up to; the log alone is the truth, and this is never written back."""

    seq: int = 0
    head: bytes = GENESIS
    origin: bytes = GENESIS
    """Hash of the first event."""
    meta: dict[str, Any] = field(default_factory=dict)
    anchored: bool = False
    """There is an anchor, so that a missing one is damage; logs of earlier versions begin without."""
    digests: dict[Cell, str] = field(default_factory=dict)
    holdings_sha256: str | None = None
    dirty: set[Cell] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    requests: dict[str, Request] = field(default_factory=dict)
    request_at: dict[int, str] = field(default_factory=dict)

    def slices(self) -> dict[Cell, str | None]:
        """Return the current digest of every slice, None for a dirty one."""
        return {cell: None if cell in self.dirty else digest for cell, digest in self.digests.items()}

    def add(self, event: Event) -> None:
        """Advance by the next event.

        Raises:
            ChainError: its kind is not known here.
        """
        body = event.body
        if event.kind == "created":
            self.meta, self.origin = body["meta"], event.hash
            self.anchored = body.get("anchored", False)
        elif event.kind == "ingested":
            self.digests = {(shard, slice_): digest for shard, slice_, digest in body["slices"]}
            self.holdings_sha256 = body["holdings_sha256"]
        elif event.kind == "deleted":
            self.dirty |= {(shard, slice_) for shard, slice_ in body["dirty"]}
            self.deleted |= set(body["subjects"])
            request_id, subjects = body["request_id"], tuple(body["subjects"])
            self.requests[request_id] = Request(
                event.seq, request_id, "applied", body["time"], subjects, body["receipt_sha256"]
            )
            self.request_at[event.seq] = request_id
        elif event.kind == "erased":
            for seq in body["requests"]:
                request_id = self.request_at[seq]
                self.requests[request_id] = replace(self.requests[request_id], state="erased")
        else:
            raise ChainError(f"event {event.seq} is of the unknown kind {event.kind!r}, perhaps of a newer version")
        self.seq, self.head = event.seq, event.hash


def deletion(
    request_id: str, subjects: Iterable[str], dirty: Iterable[Sequence[int]], receipt: bytes, time: str
) -> dict[str, Any]:
    """Return the body of a `deleted` event: all of it stands in the receipt, so whoever holds one can recompute it."""
    return {
        "request_id": request_id,
        "subjects": sorted(set(subjects)),
        "dirty": sorted(map(list, dirty)),
        "receipt_sha256": hashlib.sha256(receipt).hexdigest(),
        "time": time,
    }


def checked(rows: Iterable[tuple[Any, ...]], seq: int, head: bytes) -> Iterator[Event]:
    """Yield the events that follow the event `seq` with hash `head`.

    Raises:
        ChainError: a row is missing or differs from what was written.
    """
    for found, kind, data, digest in rows:
        seq += 1
        if found != seq:
            raise ChainError(f"event {seq} is missing")
        if not isinstance(kind, str) or not isinstance(data, bytes) or digest != link(head, kind, data):
            raise ChainError(f"event {seq} does not match the hash chain")
        head = digest
        yield Event(seq, kind, json.loads(data), digest)


def link(previous: bytes, kind: str, data: bytes) -> bytes:
    """Return the hash of an event from the one before it."""
    return hashlib.sha256(framed(previous, kind.encode("utf-8", "surrogatepass"), data)).digest()
