"""The trunk: what the frozen blocks below every adapter give for a record, computed once and kept while it may be."""

from __future__ import annotations

import math
import mmap
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from s3t_ext.system.folder import Cell
from s3t_ext.system.network import Network
from s3t_ext.system.training.memory import Records, blank

ROWS = 4096  # of tokens in one forward pass that fills the cache


class Trunk:
    """States that enter block ``block`` for the records of a job, kept in memory or in an encrypted file.

    The states of a record are the same in every epoch, node and shard, bit for bit, and do not depend on whether they
    are kept. They go with the record: see ``overwrite``.

    Args:
        records: of the job; ``block``: see ``Network.trunk``.
        used: numbers of the records that will be asked for.

    Attributes:
        bytes: what the states take; nothing does before ``keep``.
    """

    def __init__(self, records: Records, network: Network, block: int, used: np.ndarray) -> None:
        self.records, self.block, self.form = records, block, ""
        self._dtype, self._device = network.dtype, network.device
        self._place = np.full(len(records) + 1, -1)  # (N + 1,) of a record among the kept ones of its part
        self._rows: list[np.ndarray] = []  # of each part, the rows that are kept
        self._by_row: list[np.ndarray] = []  # of each part, the place of each row
        self._shapes: list[tuple[int, ...]] = []
        for part, inputs in enumerate(records.inputs):
            numbers = used[records.part[used] == part]
            rows, places = records.row[numbers], np.full(len(inputs), -1)
            self._place[numbers] = places[rows] = np.arange(len(numbers))
            self._rows.append(rows)
            self._by_row.append(places)
            self._shapes.append((len(numbers), *network.state_shape(inputs, block)))
        self.bytes = sum(math.prod(shape) for shape in self._shapes) * network.dtype.itemsize

    def keep(self, form: str, folder: str | None = None) -> None:
        """Make room.

        Args:
            form: ``memory`` or ``file``: a mapped file that has no name from the first, of rows encrypted by a key that
                is in this process's memory alone.
            folder: where the file lies; None: with the system's temporary files.
        """
        self.form = form
        self._kept: _Memory | _File
        if form == "file":
            self._kept = _File(self._shapes, self._dtype, folder)
        else:
            self._kept = _Memory(self._shapes, self._dtype, self._device)

    def notes(self) -> dict[str, Any]:
        """Tell what is kept."""
        return {"blocks": self.block, "records": sum(map(len, self._rows)), "form": self.form, "bytes": self.bytes}

    def work(self) -> list[tuple[int, int, int]]:
        """Cut what is to be computed into (part, first, last) for ``fill``; in any order, on any threads."""
        found = []
        for part, rows in enumerate(self._rows):
            step = max(1, ROWS // self._kept.tokens(part))
            found += [(part, i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
        return found

    @torch.no_grad()
    def fill(self, network: Network, part: int, first: int, last: int) -> None:
        """Compute the states of some records."""
        rows = self._rows[part][first:last]
        x, _ = self.records.batch(np.full(len(rows), part), rows)
        self._kept.put(part, first, network.below(x.to(self._device), self.block))

    def states(self, parts: np.ndarray, rows: np.ndarray) -> Tensor:
        """Fetch the states (n, ...) of some rows of some parts, filled up with 0 to the widest."""
        found = np.unique(parts).tolist()
        pieces = [self._kept.get(part, self._by_row[part][rows[parts == part]]).to(self._device) for part in found]
        if len(pieces) == 1:
            return pieces[0]
        out = pieces[-1].new_zeros(len(rows), *pieces[-1].shape[1:])
        for part, piece in zip(found, pieces, strict=True):
            out[torch.from_numpy(parts == part).to(self._device), : piece.shape[1]] = piece
        return out

    def overwrite(self, cells: Iterable[Cell] | None = None) -> None:
        """Leave no state of some slices' records; None: of any, and the file is closed."""
        if cells is None:
            self._kept.close()
            return
        for cell in cells:
            numbers = self.records.numbers(cell)
            numbers = numbers[self._place[numbers] >= 0]
            for part in np.unique(self.records.part[numbers]):
                self._kept.blank(part, self._place[numbers[self.records.part[numbers] == part]])


class _Memory:
    """States as tensors, where the network is."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self._states = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]

    def tokens(self, part: int) -> int:
        return math.prod(self._states[part].shape[1:-1])

    def put(self, part: int, first: int, states: Tensor) -> None:
        self._states[part][first : first + len(states)] = states

    def get(self, part: int, places: np.ndarray) -> Tensor:
        states = self._states[part]
        return states[torch.from_numpy(places).to(states.device)]

    def blank(self, part: int, places: np.ndarray) -> None:
        blank(self._states[part], torch.from_numpy(places).to(self._states[part].device))

    def close(self) -> None:
        for states in self._states:
            blank(states)


class _File:
    """States as rows of a mapped file without a name, each encrypted by AES in counter mode at its own place."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, folder: str | None) -> None:
        self._dtype, self._shapes = dtype, [shape[1:] for shape in shapes]
        self._bytes = [math.prod(shape[1:]) * dtype.itemsize for shape in shapes]  # of a row
        strides = [-(-size // 16) * 16 for size in self._bytes]  # whole blocks of the cipher
        self._stride, self._start, end = strides, [], 0
        for shape, stride in zip(shapes, strides, strict=True):
            self._start.append(end)
            end += shape[0] * stride
        self._key = algorithms.AES(secrets.token_bytes(32))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(end, 1))
            self._map = mmap.mmap(file.fileno(), max(end, 1))

    def tokens(self, part: int) -> int:
        return math.prod(self._shapes[part][:-1])

    def _at(self, part: int, place: int) -> tuple[int, Cipher]:
        """Give where a row lies, and its cipher: the counter is the number of a block in the file."""
        at = self._start[part] + place * self._stride[part]
        return at, Cipher(self._key, modes.CTR((at // 16).to_bytes(16, "big")))

    def put(self, part: int, first: int, states: Tensor) -> None:
        size = self._bytes[part]
        data = states.cpu().contiguous().view(torch.uint8).reshape(len(states), size).numpy()
        for number, row in enumerate(data):
            at, cipher = self._at(part, first + number)
            self._map[at : at + size] = cipher.encryptor().update(row.tobytes())

    def get(self, part: int, places: np.ndarray) -> Tensor:
        size = self._bytes[part]
        data = np.empty((len(places), size), np.uint8)
        for number, place in enumerate(places.tolist()):
            at, cipher = self._at(part, place)
            data[number] = np.frombuffer(cipher.decryptor().update(self._map[at : at + size]), np.uint8)
        return torch.from_numpy(data).view(self._dtype).view(len(places), *self._shapes[part])

    def blank(self, part: int, places: np.ndarray) -> None:
        for place in places.tolist():
            at = self._start[part] + place * self._stride[part]
            self._map[at : at + self._stride[part]] = bytes(self._stride[part])

    def close(self) -> None:
        self._key = algorithms.AES(bytes(32))
        self._map[:] = bytes(len(self._map))
        self._map.close()
