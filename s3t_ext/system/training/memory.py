"""The records that nodes in training share: held once, named by number, overwritten when they must go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3t_ext.models.batches import by_length
from s3t_ext.models.heads import IGNORED
from s3t_ext.store.records import SliceRecords
from s3t_ext.system.data.schema import PADDING, Schema
from s3t_ext.system.folder import Cell
from s3t_ext.system.network import Network
from s3t_ext.system.training.rows import FileRows, Rows, SealedFile, gathered


class Records:
    """The records of some slices, in parts of one width: numbers are one, texts one a padded length.

    A record's number is its place among all of them, slice after slice. No row is copied for a node: it has numbers.
    Slices are read one at a time. What stays in memory of a record whose row does not are its key and a few numbers.

    Args:
        read: gives the records of a (shard, slice); ``cells``: which; ``schema``: that they were read under.
        form: ``memory``, or ``file``: rows lie in a file, see ``SealedFile``, in ``folder``.

    Attributes:
        part, row: (N + 1,) the part that a record is in, in ascending order of length, and its row there; the last is
            for the number -1, which is no record and in no part.
        tokens: of each part, the rows that a record has in a layer, as far as known: 1 where inputs are numbers.
        counted: (N + 1,) labels of a record at which a loss is taken; none for the number -1.
        inputs, labels: of each part: rows (*shape), or (l,) token ids; and (...).
        names: (N,) int64, of the records, for dropout.
    """

    def __init__(
        self,
        read: Callable[[int, int], SliceRecords],
        cells: Iterable[Cell],
        schema: Schema,
        form: str = "memory",
        folder: str | None = None,
    ) -> None:
        self.schema, self.form = schema, form
        self.keys: dict[Cell, list[bytes]] = {}
        self._first: dict[Cell, int] = {}
        self._file = SealedFile(folder) if form == "file" else None
        parts: dict[int, tuple[Rows, Rows]] = {}  # by width
        widths: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        counted: list[np.ndarray] = []
        causal = schema.task == "causal"
        for cell in sorted(cells):
            records = read(*cell)
            self.keys[cell], self._first[cell] = records.keys, sum(map(len, widths))
            width, row = self._add(records, parts)
            widths.append(width)
            rows.append(row)
            counted.append((records.labels[:, 1:] != IGNORED).sum(1) if causal else np.ones(len(records), np.int64))
            del records  # before the next slice is read
        self.tokens = sorted(parts)
        self.inputs, self.labels = [parts[n][0] for n in self.tokens], [parts[n][1] for n in self.tokens]
        names = [int.from_bytes(key[:8], "little", signed=True) for keys in self.keys.values() for key in keys]
        self.names = torch.tensor(names, dtype=torch.int64)  # (N,)
        self.part = np.append(np.searchsorted(self.tokens, np.concatenate(widths)), -1).astype(np.int32)  # (N + 1,)
        self.row, self.counted = np.append(np.concatenate(rows), 0), np.append(np.concatenate(counted), 0)

    def _add(self, records: SliceRecords, parts: dict[int, tuple[Rows, Rows]]) -> tuple[np.ndarray, np.ndarray]:
        """Take a slice's rows into the parts; give the width of each, and its row there."""
        width, row = np.zeros((2, len(records)), np.int64)
        labels = torch.from_numpy(records.labels)
        for index, x in by_length(torch.from_numpy(records.inputs)):
            numbers = index.numpy()
            length = x.shape[1] if self.schema.is_text else 1
            pair = x, self._cut(labels[index], x)
            if length not in parts:
                parts[length] = self._rows(pair[0]), self._rows(pair[1])
            width[numbers] = length
            for part, tensor in zip(parts[length], pair, strict=True):
                first = part.extend(len(tensor))
                part.put(first, tensor)
            row[numbers] = first + np.arange(len(numbers))
        return width, row

    def _rows(self, like: Tensor) -> Rows:
        return FileRows(like.shape[1:], like.dtype, self._file) if self._file else Rows(like.shape[1:], like.dtype)

    def _cut(self, labels: Tensor, x: Tensor) -> Tensor:
        """Give labels of tokens as many columns as the token ids x have."""
        return labels[:, : x.shape[1]] if self.schema.task == "causal" else labels

    def measure(self, network: Network) -> None:
        """Find the rows that a record of each part has in a layer of the network."""
        last = len(network.base.block_list()) - 1
        self.tokens = [math.prod(network.state_shape(x.blank_row(), last)[:-1]) for x in self.inputs]

    def __len__(self) -> int:
        return len(self.part) - 1

    def numbers(self, cell: Cell) -> np.ndarray:
        """Give the numbers of a slice's records, in the order of their keys."""
        return self._first[cell] + np.arange(len(self.keys[cell]))

    def batch(self, parts: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Fetch inputs, scaled, and labels of some rows of some parts, as wide as the longest of them."""
        x = gathered(self.inputs, parts, rows, PADDING)
        labels = gathered(self.labels, parts, rows, IGNORED)
        return (x.float() * self.schema.scale if x.dtype == torch.uint8 else x), labels

    def overwrite(self, cells: Iterable[Cell]) -> None:
        """Leave nothing of some slices' records in memory; numbers of other slices stay as they are."""
        for cell in cells:
            numbers = self.numbers(cell)
            for part in np.unique(self.part[numbers]):
                rows = self.row[numbers[self.part[numbers] == part]]
                self.inputs[part].blank(rows)
                self.labels[part].blank(rows)
            self.names[torch.from_numpy(numbers)] = 0

    def close(self) -> None:
        """Leave nothing of any record, in memory or on disk."""
        for part in (*self.inputs, *self.labels):
            part.close()
        self.names.zero_()

    @property
    def bytes(self) -> int:
        """What their rows take in memory."""
        return sum(part.bytes for part in (*self.inputs, *self.labels))

    def notes(self) -> dict[str, Any]:
        """Tell what is held."""
        return {"records": len(self), "form": self.form}
