"""The ledger's file: one SQLite database whose every read and write is checked, durable and seen by other processes."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s3t_ext.ledger.errors import LedgerError, damaged, database_errors
from s3t_ext.ledger.fence import Fence
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import ChainError, State, checked, link
from s3t_ext.store.files import FORMAT, sync_folder

# `holdings` has no separate index: the rows that the digest covers are the very B-tree that a look-up walks, so that a
# flipped byte cannot make a held subject "not held" unseen.
_SCHEMA = (
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL)",
    "CREATE TABLE receipts (seq INTEGER PRIMARY KEY REFERENCES events, body BLOB NOT NULL)",
    "CREATE TABLE holdings (subject TEXT NOT NULL, part TEXT NOT NULL, shard INTEGER NOT NULL, slice INTEGER NOT NULL,"
    " PRIMARY KEY (subject, part, shard, slice)) WITHOUT ROWID",
)


class Database:
    """One open ledger file with its epoch word and the state that its events add up to.

    The state is read forward before every answer and write, so that instances in several processes, and threads on one
    instance, agree. After a failed call an instance writes nothing more: what reached the disk is known again only
    when it is opened anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fence = Fence(path.with_name("epoch"))
        self._lock = threading.RLock()
        self._state = State()
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
    def create(path: Path, meta: Mapping[str, Any]) -> None:
        """Create the file with its first event, and the epoch file beside it; on failure neither stays."""
        body = {"format": FORMAT, "meta": dict(meta), "time": now()}
        canonical_json(body)
        if path.exists():
            raise LedgerError(f"{path} exists; open it, or choose another folder")
        Fence.create(path.with_name("epoch")).close()
        try:
            with database_errors("create", path):
                with closing(_connect(path, create=True)) as db:
                    db.execute("BEGIN IMMEDIATE")
                    for statement in _SCHEMA:
                        db.execute(statement)
                    _insert_event(db, State(), "created", body)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                    db.execute("COMMIT")
                sync_folder(path.parent)
        except BaseException:
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm", "epoch"):
                with suppress(OSError):
                    path.with_name(name).unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Close file and epoch; a second call is fine."""
        with self._lock:
            self._db.close()
            self.fence.close()

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

    def append(self, kind: str, body: Mapping[str, Any]) -> None:
        """Append an event, inside a transaction. The state follows when it is read back after the commit."""
        with self._errors("write"):
            _insert_event(self._db, self._state, kind, body)

    @contextmanager
    def transaction(self) -> Iterator[State]:
        """Run the block as one write on the newest state: all of it durable and the epoch raised, or none of it."""
        with self._lock:
            if self._failed:
                raise LedgerError(
                    f"an earlier read or write of {self.path} failed, so nothing more is acknowledged; "
                    "mend its cause and open the ledger again"
                )
            with self._errors("write"):
                self._db.execute("BEGIN IMMEDIATE")
            try:
                self._advance()
                yield self._state
                with self._errors("write"):
                    self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._advance()
            with self._errors("write"):
                self.fence.raise_to(self._state.seq)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            with database_errors(action, self.path):
                yield
        except LedgerError as error:
            # A busy database has refused cleanly; anything else leaves open what is on the disk.
            self._failed = self._failed or "locked" not in str(error.__cause__)
            raise

    def _advance(self) -> None:
        state = self._state
        rows = self.rows("SELECT seq, kind, body, hash FROM events WHERE seq >= ? ORDER BY seq", (state.seq,))
        try:
            if state.seq and (not rows or rows.pop(0)[3] != state.head):
                raise ChainError(f"event {state.seq} changed while the ledger was open")
            for event in checked(rows, state.seq, state.head):
                state.add(event)
        except ChainError as error:
            self._failed = True
            raise damaged(self.path, str(error)) from None

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
        # The epoch anchors the end of the chain: a lost tail shows as a ledger behind what it has acknowledged.
        if self._state.seq < acknowledged:
            raise damaged(self.path, f"it ends at event {self._state.seq}, its epoch file says {acknowledged}")
        self.fence.raise_to(self._state.seq)


def _connect(path: Path, create: bool = False) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    db = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
            db.execute(f"PRAGMA {pragma}")
    except BaseException:
        db.close()
        raise
    return db


def _insert_event(db: sqlite3.Connection, state: State, kind: str, body: Mapping[str, Any]) -> None:
    data = canonical_json(dict(body))
    row = (state.seq + 1, kind, data, link(state.head, kind, data))
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", row)


def holdings_sha256(rows: Iterable[Sequence[Any]]) -> str:
    """Return SHA-256 over the rows of the index of subjects in their order, types included."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row!r}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def now() -> str:
    """Return the present time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
