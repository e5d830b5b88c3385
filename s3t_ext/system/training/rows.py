"""Rows that training holds, of records or of states: in memory, or in an encrypted file where they are too many."""

from __future__ import annotations

import math
import os
import secrets
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

BLOCK = 16  # bytes of the cipher
PIECE = 1 << 20  # bytes that are written at once


class Rows:
    """Rows of one shape as a tensor, on the device of the network or of nothing.

    Args:
        shape, dtype: of a row.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.tensor, self.count = torch.empty(0, *shape, dtype=dtype, device=device), 0

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return tuple(self.tensor.shape[1:])

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        return self.count * math.prod(self.shape) * self.tensor.itemsize

    def blank_row(self) -> Tensor:
        """Give a row (1, ...) of zeros like these."""
        return self.tensor.new_zeros(1, *self.shape)

    def extend(self, count: int) -> int:
        """Make room for more rows; give the place of the first."""
        first, self.count = self.count, self.count + count
        if self.count > len(self.tensor):
            old = self.tensor
            self.tensor = old.new_empty(max(self.count, 2 * first if first else 0), *self.shape)
            self.tensor[:first] = old[:first]
            blank(old)
        return first

    def put(self, first: int, rows: Tensor) -> None:
        """Write rows where there is room for them, each place once."""
        self.tensor[first : first + len(rows)] = rows

    def get(self, places: np.ndarray) -> Tensor:
        """Fetch rows (n, ...)."""
        return self.tensor[torch.from_numpy(places).to(self.tensor.device)]

    def blank(self, places: np.ndarray) -> None:
        """Overwrite rows."""
        blank(self.tensor, torch.from_numpy(places).to(self.tensor.device))

    def close(self) -> None:
        """Overwrite all rows."""
        blank(self.tensor)


class SealedFile:
    """A file that has no name from the first, of bytes encrypted by a key that is in this process's memory alone.

    AES in counter mode: the counter is the number of a block in the file, and no place is written twice.

    Args:
        folder: where it lies; None: with the system's temporary files.
    """

    def __init__(self, folder: str | None) -> None:
        self._key, self._end = algorithms.AES(secrets.token_bytes(32)), 0
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def extend(self, size: int) -> int:
        """Make room for some bytes, a multiple of ``BLOCK``; give where they begin."""
        start, self._end = self._end, self._end + size
        os.truncate(self._file.fileno(), self._end)
        return start

    def cipher(self, at: int) -> Cipher:
        """Give the cipher of what begins at a place."""
        return Cipher(self._key, modes.CTR((at // BLOCK).to_bytes(BLOCK, "big")))

    def write(self, at: int, data: bytes) -> None:
        """Write bytes as they are."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def read(self, at: int, size: int) -> bytes:
        """Read bytes as they are."""
        return os.pread(self._file.fileno(), size, at)

    def close(self) -> None:
        """Overwrite the file, and the key; closing it once more is fine."""
        if self._file.closed:
            return
        self._key = algorithms.AES(bytes(32))
        for at in range(0, self._end, PIECE):
            self.write(at, bytes(min(PIECE, self._end - at)))
        self._file.close()


class FileRows(Rows):
    """Rows of one shape in an encrypted file, which others may share."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, file: SealedFile) -> None:
        super().__init__(shape, dtype)
        self._file, self._size = file, math.prod(shape) * dtype.itemsize
        self._stride = -(-self._size // BLOCK) * BLOCK
        self._at = np.zeros(0, np.int64)  # (n,) where each row begins

    @property
    def bytes(self) -> int:
        return 0

    def extend(self, count: int) -> int:
        first, start = self.count, self._file.extend(count * self._stride)
        self._at = np.concatenate([self._at, start + self._stride * np.arange(count)])
        self.count += count
        return first

    def put(self, first: int, rows: Tensor) -> None:
        for part in rows.split(max(1, PIECE // self._stride)):
            data = np.zeros((len(part), self._stride), np.uint8)
            data[:, : self._size] = part.cpu().contiguous().view(torch.uint8).reshape(len(part), self._size).numpy()
            at = int(self._at[first])  # room that came at once is in one piece
            self._file.write(at, self._file.cipher(at).encryptor().update(data.tobytes()))
            first += len(part)

    def get(self, places: np.ndarray) -> Tensor:
        data = np.empty((len(places), self._size), np.uint8)
        for number, at in enumerate(self._at[places].tolist()):
            plain = self._file.cipher(at).decryptor().update(self._file.read(at, self._size))
            data[number] = np.frombuffer(plain, np.uint8)
        return torch.from_numpy(data).view(self.tensor.dtype).view(len(places), *self.shape)

    def blank(self, places: np.ndarray) -> None:
        for at in self._at[places].tolist():
            self._file.write(at, bytes(self._stride))

    def close(self) -> None:
        self._file.close()


def gathered(parts: Sequence[Rows], of: np.ndarray, places: np.ndarray, fill: float) -> Tensor:
    """Gather rows (n, l, ...) of several widths l', in ascending order, filled up to the greatest that comes.

    Args:
        of, places: (n,) which part, and which row of it.
    """
    found = np.unique(of).tolist()
    pieces = [parts[part].get(places[of == part]) for part in found]
    widest = pieces[-1]
    if len(found) == 1:
        return widest
    out = widest.new_full((len(of), *widest.shape[1:]), fill)
    for part, piece in zip(found, pieces, strict=True):
        at = torch.from_numpy(np.flatnonzero(of == part)).to(out.device)
        if piece.dim() == 1:
            out[at] = piece
        else:
            out[at, : piece.shape[1]] = piece
    return out


def blank(tensor: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """Overwrite rows: floats by NaN, whole numbers by 0."""
    tensor[rows] = torch.nan if tensor.is_floating_point() else 0
