"""Parts of a table on their way into a store: in a file without a name, sealed by a key in this process's memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from s3t_ext.store.crypt import StoreKey, seal, unseal
from s3t_ext.store.files import StoreError, system_errors


class Part(NamedTuple):
    """Where a part lies."""

    number: int
    start: int
    size: int


class Spool:
    """Hold parts outside of memory, to be read back once or more until it is closed.

    The file is unlinked when it is made and its key is written nowhere: what a kill leaves is free, unreadable blocks.

    Args:
        folder: on whose disk.

    Raises:
        StoreError: the disk is full, or the folder is read-only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._key, self._count = folder, StoreKey.new(), 0
        with system_errors("make a file in", folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def add(self, data: bytes) -> Part:
        """Write a part, and give what it is read back by."""
        part = Part(self._count, self._file.seek(0, 2), 0)
        sealed = memoryview(seal(f"part {part.number}", data, self._key))
        self._count += 1
        with system_errors("write in", self._folder):
            left = sealed
            while left:
                left = left[self._file.write(left) :]
        return part._replace(size=len(sealed))

    def read(self, part: Part) -> bytes:
        """Read a part back."""
        with system_errors("read in", self._folder):
            self._file.seek(part.start)
            data = self._file.read(part.size)
        try:
            return unseal(f"part {part.number}", data, self._key)
        except ValueError as error:
            raise StoreError(f"a part of the table in {self._folder} is damaged: {error}; check the disk") from None

    def close(self) -> None:
        """Give the file's blocks back."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
