"""The ledger's file: one SQLite database whose every read and write is checked, durable and seen by other processes."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s3t_ext.ledger.anchor import Anchors
from s3t_ext.ledger.errors import LedgerError, damaged, database_errors
from s3t_ext.ledger.fence import Fence
from s3t_ext.ledger.holding import holdings_sha256
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import ChainError, End, State, checked, link
from s3t_ext.store.files import FORMAT

_WAIT_MS = 30_000
# `holdings` has no separate index: the rows that the digest covers are the very B-tree that a look-up walks, so that a
# flipped byte cannot make a held subject "not held" unseen.
_SCHEMA = (
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL)",
    "CREATE TABLE receipts (seq INTEGER PRIMARY KEY REFERENCES events, body BLOB NOT NULL)",
    "CREATE TABLE holdings (subject TEXT NOT NULL, part TEXT NOT NULL, shard INTEGER NOT NULL, slice INTEGER NOT NULL,"
    " PRIMARY KEY (subject, part, shard, slice)) WITHOUT ROWID",
)


class Database:
    """One open ledger file with its epoch word, its anchors and the state that its events add up to.

    The state is read forward before every answer and write, so that instances in several processes, and threads on one
    instance, agree. After a failed call an instance writes nothing more: what reached the disk is known again only
    when it is opened anew.
    """

    def __init__(self, path: Path, anchors: Anchors) -> None:
        self.path = path
        self.fence, self.anchors = Fence(path.with_name("epoch")), anchors
        self._lock = threading.RLock()
        self._state = State()
        self._published: End | None = None
        self._failed = False
        try:
            with database_errors("open", path):
                self._db = _connect(path)
            try:
                self._check()
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self.fence.close()
            raise

    @staticmethod
    def create(path: Path, meta: Mapping[str, Any], outer: Path | None = None) -> None:
        """Create the file with its first event, epoch and anchors; on failure none stays."""
        body = {"format": FORMAT, "meta": dict(meta), "time": now()}
        canonical_json(body)
        if path.exists():
            raise LedgerError(f"{path} exists; open it, or choose another folder")
        if outer is not None and outer.exists():
            raise LedgerError(f"{outer} is the anchor of another ledger; move it away")
        Fence.create(path.with_name("epoch")).close()
        try:
            with database_errors("create", path), closing(_connect(path, create=True)) as db:
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    db.execute(statement)
                head = _insert_event(db, State(), "created", body)
                db.execute(f"PRAGMA user_version = {FORMAT}")
                db.execute("COMMIT")
            # The last one makes the other names in the folder durable with its own.
            Anchors(path.with_name("anchor"), outer).move(End(1, head, 0, head))
        except BaseException:
            made = [path.with_name(n) for n in (path.name, f"{path.name}-wal", f"{path.name}-shm", "epoch", "anchor")]
            for file in [*made, *([outer] if outer else [])]:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Close file and epoch, with an empty write-ahead log where nobody else is at it; a second call is fine."""
        with self._lock:
            with suppress(sqlite3.Error, LedgerError):
                self.checkpoint()
            self._db.close()
            self.fence.close()

    @property
    def shards(self) -> int:
        """Number of shards as of the last look; nothing is read."""
        return sum(generation.shards for generation in self._state.generations)

    @contextmanager
    def reading(self) -> Iterator[State]:
        """Hold the newest state still for the block."""
        with self._lock:
            self._advance()
            yield self._state

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self._lock, self._errors("read"):
            return self._db.execute(query, values).fetchall()

    def insert(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows, inside a transaction."""
        with self._errors("write"):
            for row in rows:
                self._db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)

    def append(self, kind: str, body: Mapping[str, Any], seq: int | None = None) -> None:
        """Append an event, inside a transaction. The state follows when it is read back after the commit.

        Args:
            seq: its number, where numbers are passed over; None: the next one.
        """
        with self._errors("write"):
            _insert_event(self._db, self._state, kind, body, seq)

    @contextmanager
    def transaction(self) -> Iterator[State]:
        """Run the block as one write on the newest state: all of it durable, with epoch and anchor, or none of it.

        Where only epoch or anchor fails, it stands in the log but must not be acknowledged: repeat it once reopened.
        """
        with self._lock:
            if self._failed:
                raise LedgerError(
                    f"an earlier read or write of {self.path} failed, so nothing more is acknowledged; "
                    "mend its cause and open the ledger again"
                )
            with self._write_lock():
                yield self._state
            self._publish()

    def checkpoint(self, wait: bool = False) -> None:
        """Carry the write-ahead log into the database file, durably, and truncate it.

        Args:
            wait: for other processes that are at work; else it is left to who comes last.

        Raises:
            LedgerError: it cannot be written, or others are at work for longer than the time to wait.
        """
        with self._lock, self._errors("write"):
            if not self._failed:
                self._db.execute(f"PRAGMA busy_timeout = {_WAIT_MS if wait else 0}")
                try:
                    busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                finally:
                    self._db.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
                if busy and wait:
                    raise sqlite3.OperationalError("database is locked")  # what the pragma says in a column

    def backup(self, path: Path) -> End:
        """Write a copy of this moment to a new file, durably; return where it ends."""
        with self._lock, database_errors("write", path), closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # a single file
            (seq, head), (origin,), (requests,) = (
                copy.execute(query).fetchone()
                for query in (
                    "SELECT seq, hash FROM events ORDER BY seq DESC",
                    "SELECT hash FROM events WHERE seq = 1",
                    "SELECT count(*) FROM events WHERE kind = 'deleted'",
                )
            )
        with database_errors("write", path), open(path, "rb") as file:
            os.fsync(file.fileno())
        return End(seq, head, requests, origin)

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        with self._errors("write"):
            self._db.execute("BEGIN IMMEDIATE")
        try:
            self._advance()
            yield
            with self._errors("write"):
                self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _publish(self) -> None:
        # What is committed takes effect elsewhere even if it cannot be anchored here, so the epoch goes first. Under
        # the lock, since of two processes the slower one would move the anchor back.
        with self._write_lock(), self._errors("write"):
            end = self._state.end()
            if end != self._published:  # by this instance, so that it knows that no step of it failed
                self.fence.raise_to(end.count)
                self.anchors.move(end)
                self._published = end

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            with database_errors(action, self.path):
                yield
        except LedgerError as error:
            # A busy database has refused cleanly; anything else leaves open what is on the disk.
            busy = isinstance(error.__cause__, sqlite3.Error) and "locked" in str(error.__cause__)
            self._failed = self._failed or not busy
            raise

    def _advance(self) -> None:
        state = self._state
        with self._errors("read"):
            ends = self.anchors.read()  # before the events: another process may add both while we read
        rows = self.rows("SELECT seq, kind, body, hash FROM events WHERE seq >= ? ORDER BY seq", (state.seq,))
        try:
            if state.seq and (not rows or rows.pop(0)[3] != state.head):
                raise ChainError(f"event {state.seq} changed while the ledger was open")
            for event in checked(rows, state.seq, state.head):
                state.add(event)
            self._compare(ends)
        except ChainError as error:
            self._failed = True
            raise damaged(self.path, str(error)) from None

    def _compare(self, ends: Iterable[tuple[Path, End]]) -> None:
        for path, end in ends:
            if end.origin != self._state.origin:
                raise ChainError(f"{path} is the anchor of another ledger")
            if end.count > self._state.seq:
                raise ChainError(f"it ends at event {self._state.seq}, {path} says {end.count}")
            if not self.holds(end):
                raise ChainError(f"event {end.count} is not the one in {path}")

    def holds(self, end: End) -> bool:
        """Return whether the log that ended like this is the beginning of this one, or was made up for in it."""
        state = self._state
        if end == state.end() or state.lost.get(end.count) == end.head:
            return end.origin == state.origin
        found = self.rows("SELECT hash FROM events WHERE seq = ?", (end.count,))
        return end.origin == state.origin and found == [(end.head,)]

    def _check(self) -> None:
        acknowledged = self.fence.read()  # before the events: another process may add both while we read
        version = self.rows("PRAGMA user_version")[0][0]
        if version not in (0, FORMAT):
            raise LedgerError(
                f"{self.path} has format {version}, this version of s3t_ext reads format {FORMAT}: "
                "use the version that wrote it (or restore the file, if it is damaged)"
            )
        tables = {row[0] for row in self.rows("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        if version == 0 or tables != set(_SCHEMA):
            raise LedgerError(
                f"{self.path} is not a ledger, or is damaged; check the path, or restore it from a backup"
            )
        verdict = self.rows("PRAGMA quick_check(1)")[0][0]
        if verdict != "ok":
            raise damaged(self.path, verdict.replace("\n", " "))
        self._advance()
        with self._errors("read"):
            holdings = self._db.execute("SELECT * FROM holdings ORDER BY subject, part, shard, slice")
            if (self._state.holdings_sha256 or holdings_sha256([])) != holdings_sha256(holdings):
                raise damaged(self.path, "the index of subjects does not match its digest")
        if self._state.seq < acknowledged:
            raise damaged(self.path, f"it ends at event {self._state.seq}, its epoch file says {acknowledged}")
        with self._errors("read"):
            behind = not self.anchors.at(self._state.end()) or self.fence.read() < self._state.seq
        if behind:
            # Its writer ended before the acknowledgement, perhaps since it could not sync the log: what we read may be
            # nowhere but in the system's cache. In the database file, synced, it is there to stay.
            self.checkpoint(wait=True)
            self._publish()


def _connect(path: Path, create: bool = False) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    db = sqlite3.connect(uri, uri=True, timeout=_WAIT_MS / 1000, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
            db.execute(f"PRAGMA {pragma}")
    except BaseException:
        db.close()
        raise
    return db


def _insert_event(
    db: sqlite3.Connection, state: State, kind: str, body: Mapping[str, Any], seq: int | None = None
) -> bytes:
    data = canonical_json(dict(body))
    digest = link(state.head, kind, data)
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (seq or state.seq + 1, kind, data, digest))
    return digest


def now() -> str:
    """Return the present time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
