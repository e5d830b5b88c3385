"""Deletion: durable record, acknowledgement, then erasure. Loads no torch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3t_ext.ledger import Applied, ShardChange
from s3t_ext.ledger.database import now
from s3t_ext.ledger.identity import subject_hash
from s3t_ext.ledger.receipts import build as build_receipt
from s3t_ext.store.files import Locked, exclusive
from s3t_ext.system.folder import Cell, StoreFolder


def delete(
    path: Path | str, subjects: Sequence[str], request_id: str | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Forget people: everything trained on their records stops serving, durably, before this returns.

    The receipt is the acknowledgement. Erasure of dead nodes and of the records follows at once, or, while another
    process writes to the store, by that process or the next call.

    Args:
        path: of the store; ``subjects``: as in the table.
        request_id: makes the request idempotent: the same id gives the same receipt. None: a fresh one.
        dry_run: change nothing; tell the depths that the request would leave.

    Returns:
        The receipt (see ``s3t_ext.ledger.receipts``), or for ``dry_run`` the depths before and after.

    Raises:
        ValueError: no subject, an empty one, or a known request id with other subjects.
        StoreError, LedgerError: nothing was acknowledged; the message says what to do.
    """
    with StoreFolder(path) as folder:
        if dry_run:
            return _preview(folder, subjects)
        receipt = delete_from(folder, subjects, request_id)
        erase_pending(folder)
        return receipt


def cells(folder: StoreFolder, subjects: Sequence[str]) -> set[Cell]:
    """Find the slices that hold private records of these subjects."""
    held = (h for name in subjects for h in folder.ledger.find(folder.hashed(name)))
    return {(h.shard, h.slice) for h in held if h.shard is not None and h.slice is not None}


def delete_from(folder: StoreFolder, subjects: Sequence[str], request_id: str | None) -> dict[str, Any]:
    """Record a request durably and return its receipt; erase nothing yet."""
    if not subjects:
        raise ValueError("subjects: expected at least one, got none")
    received = now()
    hashes = [folder.hashed(s) for s in subjects]
    return folder.ledger.delete(
        request_id or secrets.token_hex(16), hashes, lambda applied: _receipt(folder, applied, received)
    )


def _receipt(folder: StoreFolder, applied: Applied, received: str) -> dict[str, Any]:
    planned = folder.identities(applied.before)
    before, after = folder.trained(applied.before), folder.trained(applied.after)
    best = folder.best(before), folder.best(after)
    shards = [
        ShardChange(
            shard,
            # Trained or not: a node that another process publishes at this moment is erased by this list too.
            dead=[
                name for node, name in planned.items() if node[0] == shard and not folder.alive(*node, applied.after)
            ],
            kept=[
                {"node": name, "slices": [applied.after[shard, k] for k in node[1]]}
                for node, name in after.items()
                if node[0] == shard
            ],
            depth_before=len(best[0][shard]),
            depth_after=len(best[1][shard]),
        )
        for shard in sorted({shard for shard, _ in applied.newly_dirty})
    ]
    return build_receipt(applied, received, shards)


def _preview(folder: StoreFolder, subjects: Sequence[str]) -> dict[str, Any]:
    slices = folder.ledger.slices()
    after = {**slices, **dict.fromkeys(cells(folder, subjects))}
    depths = [[len(p) for p in folder.best(folder.trained(state))] for state in (slices, after)]
    return {"dry_run": True, "depths_before": depths[0], "depths_after": depths[1]}


def erase_pending(folder: StoreFolder) -> int:
    """Erase what acknowledged requests left; return the number of requests.

    While another process writes to the store nothing is done: that process erases before it ends.
    """
    try:
        with exclusive(folder.path):
            return erase(folder)
    except Locked:
        return 0


def erase(folder: StoreFolder) -> int:
    """Erase, under the writer's lock, the dead nodes and the records of acknowledged requests; return their number."""
    pending = folder.ledger.unerased()
    gone = folder.ledger.deleted() if pending else frozenset()
    for request in pending:
        receipt = folder.ledger.receipt(request.request_id) or {"shards": []}
        for shard in receipt["shards"]:
            for name in shard["dead"]:
                folder.nodes.erase(name)
        for subject in request.subjects:
            for holding in folder.ledger.find(subject):
                if holding.shard is not None and holding.slice is not None:
                    _erase_records(folder, (holding.shard, holding.slice), gone)
    folder.ledger.mark_erased(request.seq for request in pending)
    return len(pending)


def _erase_records(folder: StoreFolder, cell: Cell, gone: frozenset[str]) -> None:
    names = {name for record in folder.records.get(*cell).subjects for name in record}
    folder.records.erase_subjects(*cell, [n for n in names if subject_hash(folder.key, n) in gone])


def status(path: Path | str) -> dict[str, Any]:
    """Tell a store's state: depth of each shard, dirty slices, requests, nodes trained and missing."""
    with StoreFolder(path) as folder:
        slices = folder.ledger.slices()
        trained, live = folder.trained(slices), folder.identities(slices)
        depths = [len(p) for p in folder.best(trained)]
        requests = folder.ledger.requests()
        return {
            "store": str(path),
            "shards": folder.config.shards,
            "slices": folder.config.slices,
            "strategy": folder.config.strategy,
            "placement": folder.config.placement,
            "depths": depths,
            "dead_shards": [s for s, d in enumerate(depths) if not d],
            "dirty": sorted(map(list, folder.ledger.dirty())),
            "nodes": {
                "planned": folder.tree.stages * folder.config.shards,
                "live": len(live),
                "trained": len(trained),
                "missing": len(live) - len(trained),
            },
            "requests": len(requests),
            "pending_erasure": len(folder.ledger.unerased()),
        }
