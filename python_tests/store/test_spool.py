"""Parts outside of memory: read back as they were, sealed, and errors that say what to do."""

import errno
import os

import pytest

from s3t_ext.store.files import StoreError
from s3t_ext.store.spool import Spool


class Disk:
    """A file that takes a few bytes at a time, and no more than `room`."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= 100
        return self.file.write(data[:100])

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_parts_come_back_in_any_order_and_more_than_once(tmp_path):
    with Spool(tmp_path) as spool:
        spool._file = Disk(spool._file, 1 << 20)
        given = [bytes([i]) * (i * 700) for i in range(5)]
        parts = [spool.add(data) for data in given]
        for i in (3, 0, 4, 3, 1, 2):
            assert spool.read(parts[i]) == given[i]
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_damaged_part_are_told(tmp_path):
    with Spool(tmp_path) as spool:
        part = spool.add(b"content" * 100)
        other = spool.add(b"content" * 100)
        with pytest.raises(StoreError, match=r"a part of the table in .* is damaged"):
            spool.read(part._replace(start=other.start))
        os.pwrite(spool._file.fileno(), b"x", part.start + part.size - 1)
        with pytest.raises(StoreError, match="check the disk"):
            spool.read(part)
        spool._file = Disk(spool._file, 500)
        with pytest.raises(StoreError, match=r"cannot write in .*: No space left on device; free some space"):
            spool.add(b"content" * 1000)
        assert spool.read(other) == b"content" * 100
    with pytest.raises(StoreError, match=r"cannot make a file in .*nowhere"):
        Spool(tmp_path / "nowhere")
