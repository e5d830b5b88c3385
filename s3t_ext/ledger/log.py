"""The event log: append-only rows in a hash chain, and the state that they add up to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from s3t_ext.ledger.generation import Cell as Cell
from s3t_ext.ledger.generation import Generation, digests
from s3t_ext.ledger.identity import framed
from s3t_ext.ledger.request import STATES as STATES
from s3t_ext.ledger.request import Request as Request

GENESIS = bytes(32)


class ChainError(Exception):
    """The rows do not form the chain that was written; the message says where it breaks."""


class Event(NamedTuple):
    """A row of the log: hash = SHA-256(framed(hash of the row before, kind, body))."""

    seq: int
    kind: str
    body: dict[str, Any]
    hash: bytes


@dataclass(frozen=True)
class Export:
    """A copy that left the store: its name, what it is ("backup", ...), its nodes, the slices they or it hold, when."""

    export: str
    kind: str
    nodes: tuple[str, ...]
    cells: frozenset[Cell]
    time: str


@dataclass(frozen=True)
class GivenUp:
    """A slice whose records nobody could read, and that an operator gave up: all of them count as deleted from it.

    Args:
        time: when; ``file``: how it was found then, missing or damaged; ``subjects``: how many had records in it;
            ``nodes``: ids of those that had seen it, which died by this.
    """

    time: str
    file: str
    subjects: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """The end of a log: number and hash of its last event, how many requests it holds, hash of its first event."""

    count: int
    head: bytes
    requests: int
    origin: bytes

    def body(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {"count": self.count, "head": self.head.hex(), "requests": self.requests, "origin": self.origin.hex()}

    @classmethod
    def parse(cls, body: Any) -> End:
        """Read what `body` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        head, origin = bytes.fromhex(body["head"]), bytes.fromhex(body["origin"])
        return cls(int(body["count"]), head, int(body["requests"]), origin)


@dataclass
class State:
    """What the events so far add up to; the log alone is the truth, and this is never written back."""

    seq: int = 0
    head: bytes = GENESIS
    origin: bytes = GENESIS
    """Hash of the first event."""
    meta: dict[str, Any] = field(default_factory=dict)
    generations: list[Generation] = field(default_factory=list)
    digests: dict[Cell, str] = field(default_factory=dict)
    holdings_sha256: str | None = None
    dirty: set[Cell] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    """Who may not be ingested."""
    deleted_at: dict[str, int] = field(default_factory=dict)
    """Number of the last request of each subject that was ever deleted."""
    healed_at: dict[Cell, int] = field(default_factory=dict)
    given_up: dict[Cell, GivenUp] = field(default_factory=dict)
    """Dirty slices until they are back and healed."""
    told: set[str] = field(default_factory=set)
    """Nodes that services were told of."""
    requests: dict[str, Request] = field(default_factory=dict)
    request_at: dict[int, str] = field(default_factory=dict)
    exports: list[Export] = field(default_factory=list)
    lost: dict[int, bytes] = field(default_factory=dict)
    """Number and hash of the ends that were lost and made up for from receipts: an anchor may still name them."""

    def end(self) -> End:
        """Return where the log ends."""
        return End(self.seq, self.head, len(self.requests), self.origin)

    def slices(self) -> dict[Cell, str | None]:
        """Return the current digest of every slice, None for a dirty one."""
        return {cell: None if cell in self.dirty else digest for cell, digest in self.digests.items()}

    def unerased(self) -> set[int]:
        """Return the numbers of the requests that are applied and not erased."""
        return {request.seq for request in self.requests.values() if request.state == "applied"}

    def generation(self, shard: int) -> Generation:
        """Return the generation of a shard."""
        return next(generation for generation in self.generations if generation.holds(shard))

    def gone_at(self, subject: str, shard: int) -> int:
        """Return the number of the first request of a subject since a shard was opened; 0 where there was none."""
        born = self.generation(shard).born
        if self.deleted_at.get(subject, 0) <= born:
            return 0
        return min(r.seq for r in self.requests.values() if r.seq > born and subject in r.subjects)

    def in_it(self, subject: str, shard: int) -> bool:
        """Return whether a subject placed in a shard is in it still: not deleted since the shard was opened."""
        return self.deleted_at.get(subject, 0) < self.generation(shard).born

    def deadline(self, received: str) -> str | None:
        """Return the time by which a request is to be erased, from `deadline_days` of what was declared, if it was."""
        days = self.meta.get("deadline_days")
        if days is None:
            return None
        return (datetime.fromisoformat(received) + timedelta(days=days)).isoformat(timespec="milliseconds")

    def add(self, event: Event) -> None:
        """Advance by the next event.

        Raises:
            ChainError: its kind is not known here, or it does not follow from those before.
        """
        known = _EVENTS.get(event.kind)
        if known is None:
            raise ChainError(f"event {event.seq} is of the unknown kind {event.kind!r}, perhaps of a newer version")
        try:
            known(self, event)
        except (KeyError, ValueError, TypeError) as error:
            raise ChainError(f"event {event.seq}, {event.kind!r}, does not follow from those before: {error}") from None
        self.seq, self.head = event.seq, event.hash

    def _created(self, event: Event) -> None:
        self.meta, self.origin = event.body["meta"], event.hash

    def _ingested(self, event: Event) -> None:
        if bool(self.generations) != (event.kind == "grown"):
            raise ValueError(f"there are {len(self.generations)} generations")
        new = digests(event.body["slices"])
        self.deleted -= set(event.body.get("readmitted", ()))
        self.generations.append(Generation.after(self.generations, new, event.seq, self.deleted))
        self.digests |= new
        self.dirty -= new.keys()  # requests of a generation of the same number that was lost
        self.holdings_sha256 = event.body["holdings_sha256"]

    def _healed(self, event: Event) -> None:
        healed = digests(event.body["slices"])
        if not healed.keys() <= self.dirty & self.digests.keys():
            raise ValueError(f"slices {sorted(healed.keys() - self.dirty)} are not dirty")
        if self.unerased() - set(event.body.get("pending", ())):
            raise ValueError("a request is not erased yet")
        self.dirty -= healed.keys()
        self.digests |= healed
        self.healed_at |= dict.fromkeys(healed, event.seq)
        self.given_up = {cell: given for cell, given in self.given_up.items() if cell not in healed}
        self.requests |= {
            name: replace(request, unseen=tuple(u for u in request.unseen if u[:2] not in healed))
            for name, request in self.requests.items()
            if request.unseen
        }
        self.told.clear()  # a digest may be back, and with it the ids of nodes that are trained again

    def _trained(self, event: Event) -> None:
        if not all(isinstance(node, str) for node in event.body["nodes"]):
            raise ValueError("wanted ids of nodes")
        self.told |= set(event.body["nodes"])

    def _deleted(self, event: Event) -> None:
        body = event.body
        request_id = body["request_id"]
        if request_id in self.requests:
            raise ValueError(f"request {request_id!r} is {self.requests[request_id].state} already")
        request = Request(
            event.seq, request_id, "received", body["received"], body["deadline"], body["time"],
            tuple(body["subjects"]), body["receipt_sha256"],
        )  # fmt: skip
        self.dirty |= {(shard, slice_) for shard, slice_ in body["dirty"]}
        self.deleted |= set(body["subjects"])
        self.deleted_at |= dict.fromkeys(body["subjects"], event.seq)
        self.requests[request_id] = request.step("applied")
        self.request_at[event.seq] = request_id

    def _stepped(self, event: Event) -> None:
        for seq in event.body["requests"]:
            request = self.requests[self.request_at[seq]].step(event.kind)
            unseen = tuple((shard, slice_, file) for shard, slice_, file in event.body.get("unseen", request.unseen))
            self.requests[request.request_id] = replace(request, evidence=event.body.get("evidence"), unseen=unseen)

    def _given_up(self, event: Event) -> None:
        nodes, time = tuple(event.body["nodes"]), event.body["time"]
        new = {(shard, slice_): GivenUp(time, file, n, nodes) for shard, slice_, file, n in event.body["slices"]}
        if wrong := sorted(new.keys() - (self.digests.keys() - self.given_up.keys())):
            raise ValueError(f"{wrong} are no slices, or were given up before")
        self.given_up |= new
        self.dirty |= new.keys()

    def _exported(self, event: Event) -> None:
        body = event.body
        cells = frozenset((shard, slice_) for shard, slice_ in body["cells"])
        self.exports.append(Export(body["export"], body["kind"], tuple(body["nodes"]), cells, body["time"]))

    def _restored(self, event: Event) -> None:
        body = event.body
        if (body["after"], body["number"]) != (self.seq, event.seq):
            raise ValueError(f"it was written as event {body['number']} after event {body['after']}")
        for end in map(End.parse, body["lost"]):
            if end.count >= event.seq or end.requests > len(self.requests):
                raise ValueError(f"of {end.requests} requests there were, {len(self.requests)} are there")
            self.lost[end.count] = end.head


_EVENTS = {
    "created": State._created,
    "ingested": State._ingested,
    "grown": State._ingested,
    "healed": State._healed,
    "trained": State._trained,
    "deleted": State._deleted,
    "erased": State._stepped,
    "certified": State._stepped,
    "given up": State._given_up,
    "exported": State._exported,
    "restored": State._restored,
}


def deletion(
    request_id: str,
    subjects: Iterable[str],
    dirty: Iterable[Sequence[int]],
    receipt: bytes,
    received: str,
    deadline: str | None,
    time: str,
) -> dict[str, Any]:
    """Return the body of a `deleted` event: all of it stands in the receipt, so whoever holds one can recompute it."""
    return {
        "request_id": request_id,
        "subjects": sorted(set(subjects)),
        "dirty": sorted(map(list, dirty)),
        "receipt_sha256": hashlib.sha256(receipt).hexdigest(),
        "received": received,
        "deadline": deadline,
        "time": time,
    }


def checked(rows: Iterable[tuple[Any, ...]], seq: int, head: bytes) -> Iterator[Event]:
    """Yield the events that follow the event `seq` with hash `head`.

    Raises:
        ChainError: a row is missing or differs from what was written.
    """
    for found, kind, data, digest in rows:
        seq += 1
        if found != seq and not (kind == "restored" and found > seq):  # whose body names the gap before it
            raise ChainError(f"event {seq} is missing")
        seq = found
        if not isinstance(kind, str) or not isinstance(data, bytes) or digest != link(head, kind, data):
            raise ChainError(f"event {seq} does not match the hash chain")
        head = digest
        yield Event(seq, kind, json.loads(data), digest)


def link(previous: bytes, kind: str, data: bytes) -> bytes:
    """Return the hash of an event from the one before it."""
    return hashlib.sha256(framed(previous, kind.encode("utf-8", "surrogatepass"), data)).digest()
