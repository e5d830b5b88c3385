"""A ledger's copy that nobody serves from: looked at, brought forward by receipts, and put in the ledger's place.

What is lost with the end of a ledger are its last events. The deletions among them stand whole in signed receipts. They
are appended again, under their request ids and with the same receipts, and then an event that names the end which was
lost and takes a number above it, so that the numbers, which epochs are made of, only grow.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from s3t_ext.ledger.anchor import Anchor, Anchors
from s3t_ext.ledger.database import Database, now
from s3t_ext.ledger.errors import LedgerError, database_errors
from s3t_ext.ledger.fence import SIZE, Fence
from s3t_ext.ledger.holding import PRIVATE
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.log import End, Request
from s3t_ext.ledger.receipts import event_body
from s3t_ext.store.files import atomic_write, read_bytes, remove

_SANE = 1 << 53  # a counter above it is a flipped bit


class Copy:
    """A ledger's file, with its write-ahead log, copied into a new folder, checked, and open.

    Raises:
        LedgerError: it cannot be read, or contradicts itself.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        with database_errors("copy", source):
            folder.mkdir()
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

    def replay(self, receipts: Iterable[Mapping[str, Any]], lost: Sequence[End], epoch: int) -> None:
        """Append the deletions of receipts, then the event that makes up for the lost ends.

        Args:
            receipts: with their signatures, checked, of requests that are not here.
            lost: ends that are not here.
            epoch: the new number is above it and above all ends.
        """
        database, replayed = self._database, []
        for receipt in sorted(receipts, key=lambda receipt: receipt["ledger"]["seq"]):
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
        return {cell for subject in subjects for cell in self._database.rows(query, (subject, PRIVATE))}

    def close(self) -> None:
        """Close it; the folder may go."""
        self._database.close()

    def install(self, path: Path) -> None:
        """Put it, whole, in the place of the ledger `path`, which nobody has open."""
        self.close()
        for suffix in ("-wal", "-shm"):  # first: they would be taken for the new file's own
            remove(f"{path}{suffix}")
        atomic_write(path, read_bytes(self.path))


class _NoAnchors(Anchors):
    """What a copy has: nothing is acknowledged from it."""

    def read(self) -> list[tuple[Path, End]]:
        return []

    def at(self, end: End) -> bool:
        return True

    def move(self, end: End) -> None:
        pass


def settle(path: Path, outer: Path, end: End) -> None:
    """Make the anchors and the epoch of an installed ledger say where it ends."""
    if last_epoch(path) is None:
        atomic_write(path.with_name("epoch"), bytes(SIZE))
    anchors = Anchors(path.with_name("anchor"), outer)
    for anchor in (path.with_name("anchor"), outer):
        if read_anchor(anchor) is None:
            anchor.unlink(missing_ok=True)  # a damaged one is not moved
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


def alone(path: Path) -> None:
    """Empty the write-ahead log of a ledger that nobody else has open into its file.

    Raises:
        LedgerError: a service or another process has it open.
    """
    if not path.exists():
        return
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)) as db:
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN EXCLUSIVE")
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise LedgerError(f"{path} is in use by a service or another process; stop it and repeat") from None
