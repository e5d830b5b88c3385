"""The anchor: number and hash of the ledger's last event, in a file of its own.

A hash chain proves every event but its own end: a log that lost its tail, or got another one, is still a chain. So the
end is written down beside it, after the commit and before the acknowledgement::

    {"body": {"count": 3, "head": "<64 hex digits>"}, "format": 1, "sha256": ...}       as canonical JSON

A ledger behind its anchor, or with another event at that place, is not the one that was acknowledged. One that is ahead
is: its writer ended between commit and anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s3t_ext.ledger.errors import RESTORE, LedgerError
from s3t_ext.store.files import StoreError, read_checked, sync_folder, system_errors, write_checked


@dataclass(frozen=True)
class End:
    """The end of a log: how many events it has, and the hash of the last one."""

    count: int
    head: bytes


class Anchor:
    """The file that remembers the end of a log. Who moves it holds the log's write lock; reading needs none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> End | None:
        """Return the end that was written last, None where there is no such file.

        Raises:
            LedgerError: it cannot be read, or differs in any byte from what was written.
        """
        if not self.path.exists():
            return None
        with _store_errors():
            body = read_checked(self.path)
            try:
                return End(int(body["count"]), bytes.fromhex(body["head"]))
            except (KeyError, TypeError, ValueError):
                raise StoreError(f"{self.path} is no anchor") from None

    def move(self, end: End) -> None:
        """Replace the file, durably, by one that says `end`.

        Raises:
            LedgerError: it cannot be written; it says the old end, or the new one that may not survive a power cut.
        """
        with _store_errors():
            if self.read() == end:
                with system_errors("write", self.path):
                    sync_folder(self.path.parent)  # whoever put it there may have failed at this very step
            else:
                # The ledger's lock guards this, not the store's: a name that the store's sweep passes by.
                part = self.path.with_name(f"{self.path.name}.new")
                write_checked(self.path, {"count": end.count, "head": end.head.hex()}, part=part)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        todo = "" if isinstance(error.__cause__, OSError) else f"; {RESTORE}"
        raise LedgerError(f"{error}{todo}") from error
