"""The anchor: where the ledger ends, in files of their own.

A hash chain proves every event but its own end: a log that lost its tail, or got another one, is still a chain. So the
end is written down, after the commit and before the acknowledgement::

    {"body": {"count": 5, "head": hash of event 5, "origin": hash of event 1, "requests": 2}, ...}

as canonical JSON: beside the ledger, and once more outside the store's folder, where no copy of the folder brings it
back to an earlier state. A ledger behind an anchor, or with another event at that place, is not the one that was
acknowledged. One that is ahead is: its writer ended between commit and anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s3t_ext.ledger.errors import RESTORE, LedgerError
from s3t_ext.ledger.log import End
from s3t_ext.store.files import StoreError, exists, read_checked, sync_folder, system_errors, write_checked


class Anchor:
    """One file that remembers the end of a log. Who moves it holds the log's write lock; reading needs none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> End | None:
        """Return the end that was written last, None where there is no such file.

        Raises:
            LedgerError: it cannot be read, or differs in any byte from what was written.
        """
        with _store_errors():
            if not exists(self.path):
                return None
            body = read_checked(self.path)
            try:
                return End.parse(body)
            except (KeyError, TypeError, ValueError):
                raise StoreError(f"{self.path} is no anchor") from None

    def end(self) -> End:
        """Return what `read` does; a missing file is an error.

        Raises:
            LedgerError: as `read`, or there is no such file.
        """
        end = self.read()
        if end is None:
            raise LedgerError(f"{self.path} is missing; {RESTORE}")
        return end

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
                write_checked(self.path, end.body(), part=part)


class Anchors:
    """The anchor beside the ledger, `inner`, and the one outside the store's folder, `outer`, where there is a store.

    The outer one always moves first: so what the inner one says, the outer one has said.
    """

    def __init__(self, inner: Path, outer: Path | None) -> None:
        self.inner, self.outer = Anchor(inner), None if outer is None else Anchor(outer)

    def read(self) -> list[tuple[Path, End]]:
        """Return the ends that must be in the log, with the files that say so.

        Raises:
            LedgerError: one of the files is missing or damaged.
        """
        inner = self.inner.end()  # first: what it counts the outer one counted before
        if self.outer is None:
            return [(self.inner.path, inner)]
        outer = self.outer.read()
        if outer is None:
            raise LedgerError(
                f"{self.outer.path} is missing, the anchor that no copy of the store brings back: put it there (a "
                f"store is moved together with it); {RESTORE}"
            )
        return [(self.inner.path, inner), (self.outer.path, outer)]

    def at(self, end: End) -> bool:
        """Return whether every anchor says `end`."""
        return all(found == end for _, found in self.read())

    def move(self, end: End) -> None:
        """Move both, durably; `Anchor.move` says how it fails."""
        if self.outer:
            self.outer.move(end)
        self.inner.move(end)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        todo = "" if isinstance(error.__cause__, OSError) else f"; {RESTORE}"
        raise LedgerError(f"{error}{todo}") from error
