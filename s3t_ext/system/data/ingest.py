"""Lay a table out by subject: (shard, slice) by keyed hash, slice by slice, without holding it all in memory."""

from __future__ import annotations

import secrets
import struct
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from s3t_ext.ledger.identity import SALT_BYTES, Key, framed, record_key, subject_hash
from s3t_ext.ledger.log import Cell
from s3t_ext.ledger.partition import place
from s3t_ext.store.records import SliceRecords, join, pack, unpack
from s3t_ext.store.spool import Part, Spool
from s3t_ext.system.data.tables import Table

BUFFER = 1 << 23  # bytes of records that are held in memory before they are spooled


def record_bytes(inputs: np.ndarray, label: np.ndarray | int) -> bytes:
    """Give the canonical bytes of one record's content: input and label, each with its type and shape, framed."""
    parts = []
    for array in (np.asarray(inputs), np.asarray(label)):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        parts += [array.dtype.str.encode(), struct.pack(f"<{array.ndim}Q", *array.shape), array.tobytes()]
    return framed(*parts)


@dataclass(frozen=True)
class Layout:
    """A table laid out.

    Args:
        slices: the records of each (shard, slice), put together when they are asked for, one slice at a time.
        counts: records by (shard, slice); ``dropped``: records of deleted subjects, which were left out.
    """

    slices: Mapping[Cell, SliceRecords]
    counts: dict[Cell, int]
    dropped: int

    def keys(self) -> frozenset[bytes]:
        """Give the keys of all records."""
        return frozenset(key for records in self.slices.values() for key in records.keys)

    def check(self) -> None:
        """Refuse a shard without records, and warn of slices without any, which add depth and no knowledge.

        Raises:
            ValueError: names the shards.
        """
        empty = [cell for cell, count in self.counts.items() if not count]
        shards = sorted({shard for shard, _ in self.counts})
        bare = [shard for shard in shards if all((shard, k) in empty for s, k in self.counts if s == shard)]
        if bare:
            raise ValueError(
                f"shards: expected records in each, got none in {bare}: declare fewer, or give more records"
            )
        if empty:
            named = ", ".join(f"{shard}-{slice_}" for shard, slice_ in empty)
            warnings.warn(
                f"without a record (shard-slice), since no subject fell there: {named}. A node that begins with one "
                "answers as the base does, a stage on one trains again on the slices before it: both cost time, and "
                "count as depth. Declare fewer slices or shards, or have more subjects",
                stacklevel=3,
            )


def lay_out(
    table: Table | Iterable[Table],
    key: Key,
    shards: int,
    slices: int,
    deleted: Set[str] = frozenset(),
    spool: Spool | None = None,
    generation: int = 0,
    first: int = 0,
) -> Layout:
    """Place every record by the keyed hash of its owner; drop those of subjects in the ledger.

    Args:
        table: whole, or in chunks that are read once.
        spool: where records wait for their slice; None: in memory.
        generation, first: which generation of shards they open, and its lowest shard.

    Returns:
        Within a slice records are in the order of their keys, so the order of the table leaves no trace.
    """
    cells = _Cells(key, [(first + shard, slice_) for shard in range(shards) for slice_ in range(slices)], spool)
    dropped = 0
    for chunk in [table] if isinstance(table, Table) else table:
        rows: dict[Cell, list[int]] = defaultdict(list)
        for i, names in enumerate(chunk.subjects):
            if deleted and any(subject_hash(key, name) in deleted for name in names):
                dropped += 1
            else:
                shard, slice_ = place(key, names[0], shards, slices, generation)
                rows[first + shard, slice_].append(i)
        cells.add(chunk, rows)
    return Layout(cells, cells.counts, dropped)


class _Cells(Mapping[Cell, SliceRecords]):
    """The records of each cell: pieces in memory, and, above a size, parts in a spool."""

    def __init__(self, key: Key, cells: Sequence[Cell], spool: Spool | None) -> None:
        self.key, self.spool, self.counts = key, spool, dict.fromkeys(cells, 0)
        self._pieces: dict[Cell, list[SliceRecords]] = {cell: [] for cell in cells}
        self._parts: dict[Cell, list[Part]] = {cell: [] for cell in cells}
        self._bytes = 0
        self._none: list[SliceRecords] = []  # no record, with the types and shapes of all

    def add(self, table: Table, rows: Mapping[Cell, list[int]]) -> None:
        """Take rows of a chunk into their cells."""
        self._none = [SliceRecords(table.inputs[:0], table.labels[:0], [], [], [])]
        for cell, members in rows.items():
            first = self.counts[cell]
            piece = SliceRecords(
                table.inputs[members],
                table.labels[members],
                [list(table.subjects[i]) for i in members],
                [(first + i).to_bytes(8, "little") for i in range(len(members))],  # their keys: when all are there
                [secrets.token_bytes(SALT_BYTES) for _ in members],
            )
            self.counts[cell] += len(members)
            self._pieces[cell].append(piece)
            self._bytes += piece.inputs.nbytes + piece.labels.nbytes
        if self.spool and self._bytes > BUFFER:
            for cell, pieces in self._pieces.items():
                self._parts[cell] += [self.spool.add(pack(join(pieces)))] if pieces else []
                pieces.clear()
            self._bytes = 0

    def __getitem__(self, cell: Cell) -> SliceRecords:
        parts = [unpack(self.spool.read(part)) for part in self._parts[cell]] if self.spool else []
        records = join([*self._none, *parts, *self._pieces[cell]])
        del parts
        keys: list[bytes] = []
        equals: Counter[bytes] = Counter()
        for names, x, y in zip(records.subjects, records.inputs, records.labels, strict=True):
            content = record_bytes(x, y)
            first = record_key(self.key, names, content, 0)
            keys.append(record_key(self.key, names, content, equals[first]) if equals[first] else first)
            equals[first] += 1
        order = sorted(range(len(keys)), key=keys.__getitem__)
        return replace(records, keys=keys).take(order)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)
