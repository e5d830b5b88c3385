"""The records that nodes in training share: held once, named by number, overwritten when they must go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from s3t_ext.models.batches import by_length
from s3t_ext.models.heads import IGNORED
from s3t_ext.store.records import SliceRecords
from s3t_ext.system.data.schema import PADDING, Schema
from s3t_ext.system.folder import Cell
from s3t_ext.system.network import Network


class Records:
    """The records of some slices, in parts of one width: numbers are one, texts one a padded length.

    A record's number is its place among all of them, slice after slice. No row is copied for a node: it has numbers.

    Args:
        read: gives the records of a (shard, slice); ``cells``: which; ``schema``: that they were read under.

    Attributes:
        part, row: (N + 1,) the part that a record is in, in ascending order of length, and its row there; the last is
            for the number -1, which is no record and in no part.
        tokens: of each part, the rows that a record has in a layer, as far as known: 1 where inputs are numbers.
        counted: (N + 1,) labels of a record at which a loss is taken; none for the number -1.
        inputs, labels: of each part: (k, *shape), or (k, l) token ids; and (k, ...).
        names: (N,) int64, of the records, for dropout.
    """

    def __init__(self, read: Callable[[int, int], SliceRecords], cells: Iterable[Cell], schema: Schema) -> None:
        self.schema = schema
        self.keys: dict[Cell, list[bytes]] = {}
        self._first: dict[Cell, int] = {}
        held: list[SliceRecords] = []
        start = 0
        for cell in sorted(cells):
            records = read(*cell)
            self.keys[cell], self._first[cell] = records.keys, start
            held.append(records)
            start += len(records)
        inputs, labels = _joined([r.inputs for r in held]), _joined([r.labels for r in held])
        names = [int.from_bytes(key[:8], "little", signed=True) for keys in self.keys.values() for key in keys]
        del held
        self.names = torch.tensor(names, dtype=torch.int64)  # (N,)
        self.part, self.row = np.zeros(start + 1, np.int32), np.arange(start + 1)  # (N + 1,) each
        self.part[-1] = -1
        self.inputs, self.labels, self.tokens = [inputs], [labels], [1]
        self.counted = np.ones(start + 1, np.int64)
        self.counted[-1] = 0
        if schema.task == "causal":
            self.counted[:-1] = (labels[:, 1:] != IGNORED).sum(1).numpy()
        if schema.is_text:
            parts = by_length(inputs)
            self.inputs, self.labels = [x for _, x in parts], [self._cut(labels[rows], x) for rows, x in parts]
            self.tokens = [x.shape[1] for x in self.inputs]
            for number, (rows, _) in enumerate(parts):
                self.part[rows.numpy()], self.row[rows.numpy()] = number, np.arange(len(rows))

    def _cut(self, labels: Tensor, x: Tensor) -> Tensor:
        """Give labels of tokens as many columns as the token ids x have."""
        return labels[:, : x.shape[1]] if self.schema.task == "causal" else labels

    def measure(self, network: Network) -> None:
        """Find the rows that a record of each part has in a layer of the network."""
        last = len(network.base.block_list()) - 1
        self.tokens = [math.prod(network.state_shape(x, last)[:-1]) for x in self.inputs]

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
                rows = torch.from_numpy(self.row[numbers[self.part[numbers] == part]])
                blank(self.inputs[part], rows)
                blank(self.labels[part], rows)
            self.names[torch.from_numpy(numbers)] = 0

    @property
    def bytes(self) -> int:
        """What the records take in memory."""
        return sum(t.nbytes for t in (*self.inputs, *self.labels))


def gathered(tensors: Sequence[Tensor], parts: np.ndarray, rows: np.ndarray, fill: float) -> Tensor:
    """Gather rows (n, l, ...) out of tensors (k, l', ...) of several widths l', filled up to the greatest.

    Args:
        parts, rows: (n,) which tensor, and which row of it.
    """
    found = np.unique(parts)
    if len(found) == 1:
        return tensors[found[0]][torch.from_numpy(rows).to(tensors[found[0]].device)]
    widest = tensors[found[-1]]  # parts are in ascending order of length
    out = widest.new_full((len(rows), *widest.shape[1:]), fill)
    for part in found:
        mine = np.flatnonzero(parts == part)
        taken = tensors[part][torch.from_numpy(rows[mine]).to(widest.device)]
        at = torch.from_numpy(mine).to(widest.device)
        if taken.dim() == 1:
            out[at] = taken
        else:
            out[at, : taken.shape[1]] = taken
    return out


def blank(tensor: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """Overwrite rows: floats by NaN, whole numbers by 0."""
    tensor[rows] = torch.nan if tensor.is_floating_point() else 0


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    """Join the rows of several slices."""
    return torch.from_numpy(np.concatenate(parts))  # (N, ...)
