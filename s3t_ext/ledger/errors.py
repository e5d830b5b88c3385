"""The one exception of the ledger, and what to tell the operator about a failed database call."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s3t_ext.store.files import advice

RESTORE = "nothing is served: bring back the newest state by `s3t restore`"


class LedgerError(Exception):
    """The ledger cannot be read or written; the message says in one line what is wrong and what to do."""


# By message, since error codes came with Python 3.11. The wording is SQLite's own (sqlite3ErrStr) and stable.
_ADVICE = {
    "disk is full": "free some space and repeat",
    "readonly": "make the folder writable for this user, or use another one",
    "locked": "another process is writing; wait for it or stop it",
    "not a database": "check the path, or restore the file from a backup",
    "malformed": "restore the file from a backup",
    "unable to open": "check the path and that the folder is writable",
}


def damaged(path: Path, found: str) -> LedgerError:
    """Make the error for content that contradicts itself."""
    return LedgerError(f"{path} is damaged: {found}; {RESTORE}")


@contextmanager
def database_errors(action: str, path: Path) -> Iterator[None]:
    """Turn failures of the database or the file system inside the block into a `LedgerError`."""
    try:
        yield
    except sqlite3.Error as error:
        todo = next((text for part, text in _ADVICE.items() if part in str(error)), "check the disk and the file")
        raise LedgerError(f"cannot {action} {path}: {error}; {todo}") from error
    except UnicodeDecodeError:  # how sqlite3 reports damaged text, its own error messages included
        raise damaged(path, "its text is not UTF-8") from None
    except OSError as error:
        raise LedgerError(f"cannot {action} {path}: {error.strerror or error}; {advice(error)}") from error
