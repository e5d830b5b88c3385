"""The ledger: who is where and what was deleted, in one SQLite file, durable before anything is acknowledged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s3t_ext.ledger.anchor import Anchors
from s3t_ext.ledger.database import Database, now
from s3t_ext.ledger.errors import damaged
from s3t_ext.ledger.generation import Generation, listed
from s3t_ext.ledger.holding import PRIVATE, Holding, check_subject, holdings_sha256, to_row
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import Cell, End, Request, deletion
from s3t_ext.ledger.reading import Reading
from s3t_ext.ledger.receipts import Applied


class Ledger(Reading):
    """One open ledger: its state is the sum of its events, read forward before every answer and write.

    Instances in several processes, and threads on one instance, may work at the same time. After a failed write an
    instance acknowledges nothing more until the ledger is opened anew.
    """

    def __init__(self, path: str | Path, outer: str | Path | None = None) -> None:
        self.path = Path(path)
        anchors = Anchors(self.path.with_name("anchor"), None if outer is None else Path(outer))
        self._database = Database(self.path, anchors)

    @classmethod
    def create(cls, path: str | Path, meta: Mapping[str, Any], outer: str | Path | None = None) -> Ledger:
        """Create the ledger, with its files `epoch` and `anchor` in the same folder.

        Args:
            path: the file; its folder must exist.
            meta: plain JSON, fixed for ever in the first event; `deadline_days` in it gives each request a deadline.
            outer: as `open`.

        Raises:
            LedgerError: one of the files exists, or cannot be written.
        """
        Database.create(Path(path), meta, None if outer is None else Path(outer))
        return cls(path, outer)

    @classmethod
    def open(cls, path: str | Path, outer: str | Path | None = None) -> Ledger:
        """Open an existing ledger and check it: pages, schema, hash chain, index of holdings, and its end.

        Args:
            outer: a second anchor, where no copy of the ledger's folder holds it.

        Raises:
            LedgerError: it is missing, unreadable, of another format, or damaged.
        """
        return cls(path, outer)

    def close(self) -> None:
        """Close the file; a second call is fine."""
        self._database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is held

    def ingest(self, slices: Mapping[Cell, str], holdings: Iterable[Holding]) -> None:
        """Enter the slices' digests and every subject's places, in one transaction.

        Args:
            slices: digest of each (shard, slice), empty slices too.
            holdings: one for each subject and place; a record with several subjects gives one to each.

        Raises:
            ValueError: the ledger has been ingested; a holding names no such place; a deleted subject comes back.
            LedgerError: it cannot be written.
        """
        rows = sorted({to_row(holding, slices) for holding in holdings})
        with self._database.transaction() as state:
            if state.holdings_sha256 is not None:
                raise ValueError(f"{self.path} has been ingested: new records open new slices, in a new generation")
            back = next((row[0] for row in rows if row[1] == PRIVATE and row[0] in state.deleted), None)
            if back is not None:
                raise ValueError(f"holdings: subject {back} was deleted: drop its records, or re-admit it first")
            self._database.insert("holdings", rows)
            self._database.append(
                "ingested", {"slices": listed(slices), "holdings_sha256": holdings_sha256(rows), "time": now()}
            )

    def grow(
        self,
        slices: Mapping[Cell, str],
        holdings: Iterable[Holding],
        readmitted: Iterable[str] = (),
        since: int | None = None,
    ) -> frozenset[str]:
        """Enter the slices and subjects of a new generation of shards, in one transaction.

        Args:
            slices: digest of each (shard, slice) of the new shards, which follow those that there are.
            holdings: private ones, one for each subject and place.
            readmitted: deleted subjects (hashes) who are held again from now on; a new request counts for them.
            since: number of the event after which they may not have asked again; None: this moment's.

        Returns:
            Those of the subjects who were deleted meanwhile: then nothing was entered. Empty: it is done.

        Raises:
            ValueError: nothing has been ingested; the shards are not new; a re-admitted subject was not deleted, or a
                request of theirs is not erased.
            LedgerError: it cannot be written.
        """
        rows = sorted({to_row(holding, slices) for holding in holdings})
        names, back = {row[0] for row in rows}, set(readmitted)
        with self._database.transaction() as state:
            Generation.after(state.generations, slices, state.seq + 1, ())
            for name in sorted(back):
                if name not in state.deleted:
                    raise ValueError(f"readmitted: subject {name} was not deleted")
                if since is not None and state.deleted_at[name] > since:
                    raise ValueError(f"readmitted: subject {name} asked again to be forgotten: nothing was entered")
                if any(name in request.subjects and request.state == "applied" for request in state.requests.values()):
                    raise ValueError(f"readmitted: subject {name} has a request that is not erased yet")
            if not state.generations:
                raise ValueError(f"{self.path} has not been ingested: the first generation is missing")
            gone = frozenset(names & (state.deleted - back))
            if not gone:
                self._database.insert("holdings", rows)
                held = self._database.rows("SELECT * FROM holdings ORDER BY subject, part, shard, slice")
                body = {"slices": listed(slices), "readmitted": sorted(back), "holdings_sha256": holdings_sha256(held)}
                self._database.append("grown", {**body, "time": now()})
        return gone

    def heal(self, slices: Mapping[Cell, str], pending: Iterable[int] = ()) -> frozenset[str] | None:
        """Make dirty slices clean: from now on their digest is that of their records less all deleted ones.

        Args:
            slices: new digest of each dirty (shard, slice) to heal, of what was left after all requests were erased;
                whoever calls holds the lock without which nothing is erased.
            pending: events of requests that are not erased and of which nothing was left in these slices and among the
                nodes all the same, when the digests were taken: their records in another slice cannot be read.

        Returns:
            The deleted subjects (hashes) that are not in these slices any more, named in the event; None: nothing was
            done, for another request that is not erased has come in, and its records may be in a digest.

        Raises:
            ValueError: a slice is not dirty.
            LedgerError: it cannot be written.
        """
        with self._database.transaction() as state:
            unerased = state.unerased()
            if unerased - set(pending):
                return None
            if clean := sorted(slices.keys() - (state.dirty & state.digests.keys())):
                raise ValueError(f"slices: wanted dirty ones, got {clean}")
            dropped = [
                (subject, *cell)
                for cell in sorted(slices)
                for subject in self.placed(cell)
                if state.gone_at(subject, cell[0]) > state.healed_at.get(cell, 0)
            ]
            body = {"slices": listed(slices), "dropped": dropped, "time": now()}
            self._database.append("healed", {**body, "pending": sorted(unerased)} if unerased else body)
        return frozenset(row[0] for row in dropped)

    def give_up(self, slices: Mapping[Cell, str], nodes: Iterable[str]) -> None:
        """Record that an operator gave up slices whose records nobody can read: all of them count as deleted from it.

        Args:
            slices: how the file of each was found; ``nodes``: ids of those that saw one of them, which die by this.

        Raises:
            ValueError: one is no slice, or was given up before.
            LedgerError: it cannot be written.
        """
        with self._database.transaction() as state:
            if wrong := sorted(slices.keys() - (state.digests.keys() - state.given_up.keys())):
                raise ValueError(f"slices: wanted some that were not given up, got {wrong}")
            asked = {name for r in state.requests.values() if r.state == "applied" for name in r.subjects}
            rows = [
                [*cell, file, sum(name in asked or state.in_it(name, cell[0]) for name in self.placed(cell))]
                for cell, file in sorted(slices.items())
            ]
            self._database.append("given up", {"slices": rows, "nodes": sorted(nodes), "time": now()})

    def trained(self, nodes: Iterable[str]) -> None:
        """Record that nodes (ids) were published, so that the epoch moves and services look; each is told of once."""
        with self._database.transaction() as state:
            if new := sorted(set(nodes) - state.told):
                self._database.append("trained", {"nodes": new, "time": now()})

    # What was deleted

    def delete(
        self,
        request_id: str,
        subjects: Sequence[str],
        receipt: Callable[[Applied], Mapping[str, Any]],
        received: str | None = None,
    ) -> dict[str, Any]:
        """Delete subjects: mark their slices dirty and store the receipt, durably, then raise epoch and anchors.

        Args:
            request_id: the caller's name of the request; a known one changes nothing and returns its stored receipt.
            subjects: hashes of the subjects, 64 hex digits each, in any order.
            receipt: makes the receipt from what the request does, within the transaction; what it raises undoes all.
            received: when the request came in, as `now` gives it; None: now.

        Returns:
            The receipt, as plain JSON types. Once it is returned, every process that reads the epoch sees the deletion.

        Raises:
            ValueError: a known request id with other subjects, no subject, or a malformed one.
            LedgerError: it cannot be written; nothing is acknowledged, and the same request may be sent again.
        """
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id: wanted some text, got {request_id!r}")
        wanted = tuple(sorted({check_subject(subject) for subject in subjects}))
        if not wanted:
            raise ValueError("subjects: wanted at least one, got none")
        received = received or now()
        with self._database.transaction() as state:
            known = state.requests.get(request_id)
            if known is None:
                applied = self._applied(state, request_id, wanted, received)
                data = canonical_json(dict(receipt(applied)))
                body = deletion(request_id, wanted, applied.newly_dirty, data, received, applied.deadline, applied.time)
                self._database.append("deleted", body)
                self._database.insert("receipts", [(applied.seq, data)])
            elif known.subjects != wanted:
                raise ValueError(f"request_id: {request_id!r} was used for other subjects; choose a new one")
        return self._stored(state.requests[request_id])

    def receipt(self, request_id: str) -> dict[str, Any] | None:
        """Return the stored receipt of a request, None for an unknown one.

        Raises:
            LedgerError: it is missing or differs from what was stored.
        """
        with self._database.transaction() as state:  # it acknowledges: what it tells of is anchored before it leaves
            known = state.requests.get(request_id)
        return None if known is None else self._stored(known)

    def _stored(self, request: Request) -> dict[str, Any]:
        rows = self._database.rows("SELECT body FROM receipts WHERE seq = ?", (request.seq,))
        data = rows[0][0] if rows else None
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != request.receipt_sha256:
            raise damaged(self.path, f"the receipt of request {request.request_id!r} does not match its event")
        stored: dict[str, Any] = json.loads(data)
        return stored

    def mark_erased(self, seqs: Iterable[int], unseen: Mapping[Cell, str] | None = None) -> None:
        """Record that what the requests of these events made dead is gone from the store; repeating is fine.

        Then the write-ahead log is emptied into the database file, unless another process is at it.

        Args:
            unseen: given-up slices with their records, and how the file of each was found.

        Raises:
            ValueError: an event that is no request, or one that is not applied.
        """
        given_up = [[*cell, file] for cell, file in sorted((unseen or {}).items())]
        self._step("erased", seqs, **({"unseen": given_up} if given_up else {}))
        self._database.checkpoint()

    def certify(self, seqs: Iterable[int], evidence: Mapping[str, Any]) -> None:
        """Record that what is served was compared with a system that never had these requests' records.

        Args:
            evidence: what was compared, and how; plain JSON.

        Raises:
            ValueError: an event that is no request, or one that is not erased.
        """
        self._step("certified", seqs, evidence=dict(evidence))

    def _step(self, name: str, seqs: Iterable[int], **more: Any) -> None:
        wanted = set(seqs)
        with self._database.transaction() as state:
            if not wanted <= state.request_at.keys():
                raise ValueError(f"seqs: no request has the event {sorted(wanted - state.request_at.keys())}")
            requests = [state.requests[state.request_at[seq]] for seq in sorted(wanted)]
            left = [request.step(name).seq for request in requests if request.state != name]
            if left:
                self._database.append(name, {"requests": left, **more, "time": now()})

    # What left the store

    def export(self, export: str, kind: str, nodes: Iterable[str], cells: Iterable[Cell]) -> None:
        """Register a copy that leaves the store, before it does: receipts name those that hold a subject's slices.

        Args:
            export: its name; ``kind``: what it is.
            nodes: identities of the nodes in it; ``cells``: the slices that they saw, or whose records are in it.
        """
        listed = {"nodes": sorted(nodes), "cells": sorted(map(list, cells))}
        with self._database.transaction():
            self._database.append("exported", {"export": export, "kind": kind, **listed, "time": now()})

    def backup(self, path: Path) -> End:
        """Write a copy of the whole ledger at one moment, while others go on; durable, one file.

        Returns:
            Where the copy ends.
        """
        return self._database.backup(path)
