"""The trunk: what the frozen blocks below every adapter give for a record, computed once and kept while it may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3t_ext.system.folder import Cell
from s3t_ext.system.network import Network
from s3t_ext.system.training.memory import Records
from s3t_ext.system.training.rows import FileRows, Rows, SealedFile, gathered

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
            self._shapes.append((len(numbers), *network.state_shape(inputs.blank_row(), block)))
        self.bytes = sum(math.prod(shape) for shape in self._shapes) * network.dtype.itemsize

    def keep(self, form: str, folder: str | None = None) -> None:
        """Make room.

        Args:
            form: ``memory`` or ``file``, see ``SealedFile``.
            folder: where the file lies; None: with the system's temporary files.
        """
        self.form = form
        file = SealedFile(folder) if form == "file" else None
        self._kept: list[Rows] = []
        for count, *shape in self._shapes:
            rows = FileRows(shape, self._dtype, file) if file else Rows(shape, self._dtype, self._device)
            rows.extend(count)
            self._kept.append(rows)

    def notes(self) -> dict[str, Any]:
        """Tell what is kept."""
        return {"blocks": self.block, "records": sum(map(len, self._rows)), "form": self.form, "bytes": self.bytes}

    def work(self) -> list[tuple[int, int, int]]:
        """Cut what is to be computed into (part, first, last) for ``fill``; in any order, on any threads."""
        found = []
        for part, rows in enumerate(self._rows):
            step = max(1, ROWS // math.prod(self._shapes[part][1:-1]))
            found += [(part, i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
        return found

    @torch.no_grad()
    def fill(self, network: Network, part: int, first: int, last: int) -> None:
        """Compute the states of some records."""
        rows = self._rows[part][first:last]
        x, _ = self.records.batch(np.full(len(rows), part), rows)
        self._kept[part].put(first, network.below(x.to(self._device), self.block))

    def states(self, parts: np.ndarray, rows: np.ndarray) -> Tensor:
        """Fetch the states (n, ...) of some rows of some parts, filled up with 0 to the widest."""
        places = np.zeros(len(parts), np.int64)  # (n,)
        for part in np.unique(parts):
            places[parts == part] = self._by_row[part][rows[parts == part]]
        return gathered(self._kept, parts, places, 0).to(self._device)

    def overwrite(self, cells: Iterable[Cell] | None = None) -> None:
        """Leave no state of some slices' records; None: of any, and the file is closed."""
        if cells is None:
            for rows in self._kept:
                rows.close()
            return
        for cell in cells:
            numbers = self.records.numbers(cell)
            numbers = numbers[self._place[numbers] >= 0]
            for part in np.unique(self.records.part[numbers]):
                self._kept[part].blank(self._place[numbers[self.records.part[numbers] == part]])
