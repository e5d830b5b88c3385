"""Receipts: what a deletion did and what is promised, as plain JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from s3t_ext.ledger.holding import Holding
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import Cell, Export, deletion, link

FORMAT = 2

PROMISE = (
    "From now on no released answer, served weight or cached activation depends on the content of the deleted "
    "records. Bit for bit, for what was trained in exact mode and compared under the recorded provenance, what is "
    "served is what would be served had these records never been in the data set, with the same keys, plan, schema "
    "and configuration and the same slices invalid. A record acts only through which slice its subject's keyed hash "
    "names, and when. This is not a model retrained on all the rest: the clean rest of an invalid slice is left out "
    "until it is retrained."
)

DELETED = "deleted"
NOT_HELD = "not held"
NOT_COVERED = "held in a declared part, not covered"
ALREADY = "already deleted"


@dataclass(frozen=True)
class Applied:
    """What one request did, for the function that writes its receipt."""

    seq: int
    origin: str
    """Hash of the ledger's first event, 64 hex digits."""
    previous: str
    """Hash of the event before, 64 hex digits."""
    request_id: str
    subjects: tuple[str, ...]
    holdings: dict[str, tuple[Holding, ...]]
    already: frozenset[Holding]
    """Those of `holdings` that an earlier request emptied."""
    newly_dirty: frozenset[Cell]
    dirty: frozenset[Cell]
    before: dict[Cell, str | None]
    after: dict[Cell, str | None]
    exports: tuple[Export, ...]
    """Those that hold a slice of one of `subjects`."""
    received: str
    deadline: str | None
    time: str


@dataclass(frozen=True)
class ShardChange:
    """What a request did to one shard.

    Args:
        shard: its index.
        dead: identities of the planned nodes that died.
        kept: for each live, trained node `{"node": its identity, "slices": the digests on its path, "weights":
            their hash, "provenance": SHA-256 of its canonical JSON}`; the last two None where they cannot be read.
        depth_before, depth_after: depth of the best live node, 0 when none is left.
        untrained: those of `dead` that were not in the store when it was applied: nothing was switched off with them.
    """

    shard: int
    dead: list[str]
    kept: list[dict[str, Any]]
    depth_before: int
    depth_after: int
    untrained: list[str] = field(default_factory=list)


def build(applied: Applied, shards: Sequence[ShardChange]) -> dict[str, Any]:
    """Build the receipt of a request.

    Args:
        applied: what the ledger hands to the `receipt` function of `Ledger.delete`.
        shards: the shards whose slices it made dirty.

    Returns:
        Plain JSON types, still to be signed: format, request_id, request_hash, ledger (its first event, this event's
        number, the chain before it, the slices it made dirty; `head_after` gives the chain after it), received,
        applied, deadline, subjects (one row for each place, or one that says `not held`), shards, exports (copies that
        left the store with a slice of the subjects), promise.
    """
    request = {"request_id": applied.request_id, "subjects": list(applied.subjects)}
    return {
        "format": FORMAT,
        "request_id": applied.request_id,
        "request_hash": hashlib.sha256(canonical_json(request)).hexdigest(),
        "ledger": {
            "origin": applied.origin,
            "seq": applied.seq,
            "previous": applied.previous,
            "dirty": sorted(map(list, applied.newly_dirty)),
        },
        "received": applied.received,
        "applied": applied.time,
        "deadline": applied.deadline,
        "subjects": [
            row for name in applied.subjects for row in subject_rows(name, applied.holdings[name], applied.already)
        ],
        "shards": [asdict(shard) for shard in shards],
        "exports": [{"export": e.export, "kind": e.kind, "time": e.time} for e in applied.exports],
        "promise": PROMISE,
    }


def event_body(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the event that the receipt acknowledges: all of it stands in the receipt."""
    return deletion(
        receipt["request_id"],
        [row["subject"] for row in receipt["subjects"]],
        receipt["ledger"]["dirty"],
        canonical_json(dict(receipt)),
        receipt["received"],
        receipt["deadline"],
        receipt["applied"],
    )


def head_after(receipt: Mapping[str, Any]) -> str:
    """Return the hash of the receipt's own event, 64 hex digits: the head of the chain once it was written.

    The event holds the receipt's hash, so the receipt cannot hold the event's.
    """
    body = canonical_json(event_body(receipt))
    return link(bytes.fromhex(receipt["ledger"]["previous"]), "deleted", body).hex()


def subject_rows(subject: str, places: Sequence[Holding], already: Collection[Holding]) -> list[dict[str, Any]]:
    """Tell what a request does to each place of a subject (hash), or that there is none.

    Args:
        already: those that an earlier request emptied.
    """
    if not places:
        return [{"subject": subject, "status": NOT_HELD, "part": None, "shard": None, "slice": None}]
    return [
        {
            "subject": subject,
            "status": NOT_COVERED if place.shard is None else ALREADY if place in already else DELETED,
            "part": place.part,
            "shard": place.shard,
            "slice": place.slice,
        }
        for place in places
    ]
