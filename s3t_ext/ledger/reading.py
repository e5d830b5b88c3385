"""What a ledger says: every answer is read from the state that its events add up to, as far as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from s3t_ext.ledger.database import Database, now
from s3t_ext.ledger.fence import Fence
from s3t_ext.ledger.generation import Generation
from s3t_ext.ledger.holding import PRIVATE, Holding, check_subject, from_row
from s3t_ext.ledger.log import Cell, Export, GivenUp, Request, State
from s3t_ext.ledger.receipts import Applied


class Reading:
    """The part of a ledger that writes nothing."""

    _database: Database

    @property
    def fence(self) -> Fence:
        """The epoch word, for the release check of what is served from this ledger."""
        return self._database.fence

    @property
    def meta(self) -> dict[str, Any]:
        """What `create` was given."""
        with self._database.reading() as state:
            return dict(state.meta)

    @property
    def declaration(self) -> bytes:
        """The first event as it was hashed, canonical JSON: format, meta and time; nothing in it is secret."""
        return self._database.rows("SELECT body FROM events WHERE seq = 1")[0][0]

    @property
    def seq(self) -> int:
        """Number of the last event: the epoch that routing read from this ledger belongs to."""
        with self._database.reading() as state:
            return state.seq

    @property
    def ingested(self) -> bool:
        """Whether records have been entered."""
        with self._database.reading() as state:
            return state.holdings_sha256 is not None

    @property
    def generations(self) -> tuple[Generation, ...]:
        """The generations of shards, in order; none before the first records."""
        with self._database.reading() as state:
            return tuple(state.generations)

    @property
    def shards(self) -> int:
        """Number of shards over all generations, as of the last look at the ledger."""
        return self._database.shards

    def slices(self) -> dict[Cell, str | None]:
        """Return the current digest of every slice; None: dirty, no digest of it is current."""
        with self._database.reading() as state:
            return state.slices()

    def dirty(self) -> frozenset[Cell]:
        """Return the slices that hold a deleted record, or were given up, and have not been healed."""
        with self._database.reading() as state:
            return frozenset(state.dirty & state.digests.keys())

    def given_up(self) -> dict[Cell, GivenUp]:
        """Return the slices that were given up and have not come back to be healed."""
        with self._database.reading() as state:
            return dict(state.given_up)

    def deleted(self) -> frozenset[str]:
        """Return every subject ever requested, held or not, less the re-admitted: none of them may be ingested."""
        with self._database.reading() as state:
            return frozenset(state.deleted)

    def healed(self) -> int:
        """Return the number of the last event that made slices clean, 0 where there is none."""
        with self._database.reading() as state:
            return max(state.healed_at.values(), default=0)

    def gone(self, shard: int) -> frozenset[str]:
        """Return the subjects none of whose records may be in a shard: deleted before it was opened, or since."""
        with self._database.reading() as state:
            generation = state.generation(shard)
            return generation.barred.union(name for name, at in state.deleted_at.items() if at > generation.born)

    def hit(self, subjects: Iterable[str]) -> set[Cell]:
        """Return the slices that hold private records of these subjects (hashes): those that no request emptied."""
        with self._database.reading() as state:
            return {place.cell for place in self._still(state, subjects) if place.cell is not None}

    def _still(self, state: State, subjects: Iterable[str]) -> list[Holding]:
        places = [place for subject in subjects for place in self.find(subject)]
        return [place for place in places if place.shard is None or state.in_it(place.subject, place.shard)]

    def _applied(self, state: State, request_id: str, subjects: tuple[str, ...], received: str) -> Applied:
        holdings = {subject: tuple(self.find(subject)) for subject in subjects}
        held = {place.cell for places in holdings.values() for place in places if place.cell is not None}
        still = self._still(state, subjects)
        hit = {place.cell for place in still if place.cell is not None}
        before = state.slices()
        return Applied(
            seq=state.seq + 1,
            origin=state.origin.hex(),
            previous=state.head.hex(),
            request_id=request_id,
            subjects=subjects,
            holdings=holdings,
            already=frozenset(place for places in holdings.values() for place in places) - set(still),
            newly_dirty=frozenset(hit - state.dirty),
            dirty=frozenset(state.dirty | hit),
            before=before,
            after={cell: None if cell in hit else digest for cell, digest in before.items()},
            exports=tuple(export for export in state.exports if export.cells & held),
            received=received,
            deadline=state.deadline(received),
            time=now(),
        )

    def find(self, subject: str) -> list[Holding]:
        """Return the places of a subject (its hash), sorted; none: it is not held."""
        check_subject(subject)
        query = "SELECT part, shard, slice FROM holdings WHERE subject = ? ORDER BY part, shard, slice"
        return [from_row(subject, *row) for row in self._database.rows(query, (subject,))]

    def placed(self, cell: Cell) -> list[str]:
        """Return the subjects of whom a slice holds, or held, private records."""
        query = "SELECT subject FROM holdings WHERE part = ? AND shard = ? AND slice = ? ORDER BY subject"
        return [row[0] for row in self._database.rows(query, (PRIVATE, *cell))]

    def requests(self) -> list[Request]:
        """Return all requests in the order in which they were applied."""
        with self._database.reading() as state:
            return list(state.requests.values())

    def unerased(self) -> list[Request]:
        """Return the requests that are applied and whose dead weights and records are still to be erased."""
        return [request for request in self.requests() if request.state == "applied"]

    def exports(self) -> list[Export]:
        """Return all exports in the order in which they were registered."""
        with self._database.reading() as state:
            return list(state.exports)
