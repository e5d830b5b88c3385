"""A ledger's copy that nobody serves from: looked at, brought forward by receipts, and put in the ledger's place.

What is lost with the end of a ledger are its last events. The deletions among them stand whole in signed receipts. They
are appended again, under their request ids and with the same receipts, and then an event that names the end which was
lost and takes a number above it, so that the numbers, which epochs are made of, only grow.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from s3t_ext.ledger.anchor import Anchor, Anchors
from s3t_ext.ledger.database import Database, now
from s3t_ext.ledger.errors import LedgerError, database_errors
from s3t_ext.ledger.fence import SIZE, Fence
from s3t_ext.ledger.holding import PRIVATE
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import End, Request
from s3t_ext.ledger.receipts import event_body, head_after
from s3t_ext.ledger.signature import fault, read_receipt
from s3t_ext.store.files import atomic_write, read_bytes, remove

_SANE = 1 << 53  # a counter above it is a flipped bit


class Copy:
    """A ledger's file, with its write-ahead log, copied into a new folder, checked, and open.

    Args:
        source: the file; ``folder``: does not exist yet.
        locked: what `alone` gave for this file.

    Raises:
        LedgerError: it cannot be read, or contradicts itself.
    """

    def __init__(self, source: Path, folder: Path, locked: sqlite3.Connection | None = None) -> None:
        self.path = folder / "ledger.sqlite"
        with database_errors("copy", source):
            folder.mkdir()
            if locked:  # closing the file, opened by other means, would let its lock go
                with closing(sqlite3.connect(self.path)) as target:
                    locked.backup(target)
            else:
                shutil.copyfile(source, self.path)
                with suppress(FileNotFoundError):
                    shutil.copyfile(f"{source}-wal", f"{self.path}-wal")
        Fence.create(folder / "epoch").close()
        self._database = Database(self.path, _NoAnchors(folder / "anchor", None))

    @property
    def end(self) -> End:
        """Where it ends."""
        with self._database.reading() as state:
            return state.end()

    @property
    def requests(self) -> dict[str, Request]:
        """Its requests by id."""
        with self._database.reading() as state:
            return dict(state.requests)

    @property
    def declaration(self) -> bytes:
        """Its first event, canonical JSON."""
        return self._database.rows("SELECT body FROM events WHERE seq = 1")[0][0]

    def holds(self, end: End) -> bool:
        """Return whether all that was there at this end is here."""
        return self._database.holds(end)

    def missing(self, end: End, receipts: Iterable[Mapping[str, Any]]) -> int:
        """Count the requests that `end` knows and that neither are here nor have a receipt.

        Only receipts of events between here and there count. Where these were requests alone, their receipts are links
        of the chain, and must lead from `end` back to here.

        Raises:
            LedgerError: they do not.
        """
        here = self.end
        between = [receipt for receipt in receipts if here.count < receipt["ledger"]["seq"] <= end.count]
        requests = end.requests - here.requests
        missing = requests - len({receipt["ledger"]["seq"] for receipt in between})
        if missing <= 0 < requests == end.count - here.count:
            before, head = {head_after(receipt): receipt["ledger"]["previous"] for receipt in between}, end.head.hex()
            for _ in range(requests):
                head = before.get(head, "")
            if head != here.head.hex():
                raise LedgerError(
                    f"the receipts of entries {here.count + 1} to {end.count} are not all of the ledger that the "
                    "anchor tells of, but of one that was given up before: give those that were handed out last"
                )
        return missing

    def replay(self, receipts: Iterable[Mapping[str, Any]], lost: Sequence[End], epoch: int) -> None:
        """Append the deletions of receipts, then the event that makes up for the lost ends.

        Args:
            receipts: with their signatures, checked, of requests that are not here.
            lost: ends that are not here.
            epoch: the new number is above it, all ends and the receipts' own numbers.
        """
        database, replayed = self._database, []
        receipts = sorted(receipts, key=lambda receipt: receipt["ledger"]["seq"])
        epoch = max([epoch, *(receipt["ledger"]["seq"] for receipt in receipts)])
        for receipt in receipts:
            body, data = event_body(receipt), canonical_json(dict(receipt))
            # All slices that hold the subjects: what an earlier request made dirty need not stand in this receipt.
            body["dirty"] = sorted({tuple(cell) for cell in body["dirty"]} | self._cells(body["subjects"]))
            with database.transaction() as state:
                database.append("deleted", body)
                database.insert("receipts", [(state.seq + 1, data)])
            replayed.append(body["request_id"])
        with database.transaction() as state:
            number = max([state.seq, epoch, *(end.count for end in lost)]) + 1
            body = {
                "after": state.seq,
                "number": number,
                "lost": [end.body() for end in lost],
                "replayed": replayed,
                "time": now(),
            }
            database.append("restored", body, number)

    def _cells(self, subjects: Iterable[str]) -> set[tuple[int, int]]:
        query = "SELECT shard, slice FROM holdings WHERE subject = ? AND part = ?"
        with self._database.reading() as state:
            held = {name: self._database.rows(query, (name, PRIVATE)) for name in subjects}
            return {cell for name, cells in held.items() for cell in cells if state.in_it(name, cell[0])}

    def close(self) -> None:
        """Close it; the folder may go."""
        self._database.close()

    def install(self, path: Path, locked: sqlite3.Connection | None = None) -> None:
        """Put it, whole, in the place of the ledger `path`, and close it.

        Args:
            locked: what `alone` gave for this path. Through it the content is replaced and the file stays: who waits
                to open it has its name looked up already.
        """
        self.close()
        if locked:
            with database_errors("write", path), closing(sqlite3.connect(self.path)) as source:
                source.backup(locked)
            return
        for suffix in ("-wal", "-shm"):  # first: they would be taken for the new file's own
            remove(f"{path}{suffix}")
        atomic_write(path, read_bytes(self.path))


def unknown_receipts(copy: Copy, places: Iterable[Path]) -> list[Mapping[str, Any]]:
    """Read the receipts of requests that a ledger lacks, each checked by its store's public key.

    Args:
        places: files, or folders of them.

    Raises:
        ValueError: one is not of this store, or another one than the ledger's own of the same request.
    """
    public, known = json.loads(copy.declaration), copy.requests
    unknown: dict[str, Mapping[str, Any]] = {}
    for place in places:
        for file in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            receipt = read_receipt(file)
            reason = fault(receipt, public)
            if reason:
                raise ValueError(f"--receipts: {file} is not a receipt of this store: {reason}")
            request_id, sha256 = receipt["request_id"], hashlib.sha256(canonical_json(receipt)).hexdigest()
            if request_id not in known:
                unknown[request_id] = receipt
            elif known[request_id].receipt_sha256 != sha256:
                raise ValueError(f"--receipts: {file} is another receipt of {request_id!r} than the ledger's")
    return list(unknown.values())


class _NoAnchors(Anchors):
    """What a copy has: nothing is acknowledged from it."""

    def read(self) -> list[tuple[Path, End]]:
        return []

    def at(self, end: End) -> bool:
        return True

    def move(self, end: End) -> None:
        pass


def settle(path: Path, outer: Path, end: End) -> None:
    """Make the anchors and the epoch of an installed ledger say where it ends.

    Raises:
        LedgerError: an anchor says more, for a request came in meanwhile.
    """
    if last_epoch(path) is None:
        atomic_write(path.with_name("epoch"), bytes(SIZE))
    anchors = Anchors(path.with_name("anchor"), outer)
    for anchor in (path.with_name("anchor"), outer):
        known = read_anchor(anchor)
        if known is None:
            anchor.unlink(missing_ok=True)  # a damaged one is not moved
        elif known.count > end.count:
            raise LedgerError(f"{anchor} says {known.count}, the ledger ends at {end.count}: repeat the restore")
    anchors.move(end)


def last_epoch(path: Path) -> int | None:
    """Read the epoch beside a ledger; None: it is missing or damaged."""
    with suppress(LedgerError), Fence(path.with_name("epoch")) as fence:
        return fence.read() if fence.read() < _SANE else None
    return None


def read_anchor(path: Path) -> End | None:
    """Read an anchor; None: it is missing or damaged."""
    with suppress(LedgerError):
        return Anchor(path).read()
    return None


@contextmanager
def alone(path: Path) -> Iterator[sqlite3.Connection | None]:
    """Keep everybody else from a ledger for the block: who opens it waits, and finds what is there after it.

    Yields:
        The connection that holds the lock; None: there is no ledger, or one that is too damaged to be opened.

    Raises:
        LedgerError: a service or another process has it open.
    """
    if path.exists():
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)) as db:
            if _lock(db, path):
                yield db
                return
    yield None


def _lock(db: sqlite3.Connection, path: Path) -> bool:
    try:
        for statement in ("locking_mode = EXCLUSIVE", "synchronous = FULL"):
            db.execute(f"PRAGMA {statement}")
        db.execute("BEGIN EXCLUSIVE")
        db.execute("COMMIT")  # the lock stays
        return bool(db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise LedgerError(f"{path} is in use by a service or another process; stop it and repeat") from None
        return False
