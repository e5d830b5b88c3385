"""The epoch word: a counter in a small mapped file, so that every process sees a deletion before it is acknowledged."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

from s3t_ext.ledger.errors import RESTORE, LedgerError, database_errors

SIZE = 8


class Fence:
    """A counter that only grows, shared by all processes that map the same file.

    `read` is one aligned 8-byte load, cheap enough to make at the release of every answer: an answer whose routing was
    read at epoch e may leave only while `read() == e` or after its nodes were found live again. A `check` goes
    before that `read`: where another file is at the path, others raise that one, and the mapped word stands still.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        with database_errors("open", self.path), open(self.path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size != SIZE:
                raise LedgerError(f"{self.path} has {found.st_size} bytes where an epoch has {SIZE}; {RESTORE}")
            self._file = found.st_dev, found.st_ino
            self._map = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
        # Native order, which is little-endian wherever this runs: a single load, where "<Q" would go byte by byte.
        self._word = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: str | Path) -> Fence:
        """Create the file with epoch 0, durably.

        Raises:
            LedgerError: it exists, or cannot be written.
        """
        path = Path(path)
        with database_errors("create", path), open(path, "xb", buffering=0) as file:
            file.write(bytes(SIZE))
            os.fsync(file.fileno())
        return cls(path)

    def read(self) -> int:
        """Return the present epoch."""
        return self._word[0]

    def check(self) -> None:
        """Check that the mapped file is the one at its path.

        Raises:
            LedgerError: there is none, or another one.
        """
        try:
            found = os.stat(self.path)
            same = (found.st_dev, found.st_ino) == self._file
        except OSError:
            same = False
        if not same:
            raise LedgerError(
                f"{self.path} is not the file that was opened: the store was moved or replaced under the service; "
                "open it again"
            )

    def raise_to(self, epoch: int) -> None:
        """Raise the counter to at least `epoch`, visible to other processes at once.

        Not synced: after a power cut no process remembers the counter, and the ledger's number of events, which it
        follows, is durable.
        """
        if self.read() >= epoch:
            return
        with database_errors("raise", self.path), open(self.path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # compare and store as one step among all processes
            with mmap.mmap(file.fileno(), SIZE) as writable, memoryview(writable) as view, view.cast("Q") as word:
                if word[0] < epoch:
                    word[0] = epoch

    def close(self) -> None:
        """Unmap the file; a second call is fine."""
        self._word.release()
        self._map.close()

    def __enter__(self) -> Fence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
