"""Generations: the shards that one table opened. New records never enter trained slices, they open new shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s3t_ext.ledger.identity import Key
from s3t_ext.ledger.partition import place

Cell = tuple[int, int]
"""(shard, slice), both 0-based, over all generations."""


@dataclass(frozen=True)
class Generation:
    """The shards ``first`` to ``first + shards - 1``, which one event opened.

    Args:
        number: 0 for what a store was made with, then 1, 2, ...; part of the placement key.
        first: its lowest shard; ``shards``: how many.
        born: number of the event that opened it.
        barred: subjects that had been deleted by then, and were not re-admitted: none of its records names them.
    """

    number: int
    first: int
    shards: int
    born: int
    barred: frozenset[str]

    @classmethod
    def after(cls, before: Sequence[Generation], cells: Iterable[Cell], born: int, barred: Iterable[str]) -> Generation:
        """Open the next generation, of the shards in `cells`.

        Raises:
            ValueError: the shards do not follow those that there are.
        """
        first = sum(generation.shards for generation in before)
        shards = {shard for shard, _ in cells}
        if shards != set(range(first, first + len(shards))) or not shards:
            raise ValueError(f"slices: wanted new shards from {first} on, got {sorted(shards)}")
        return cls(len(before), first, len(shards), born, frozenset(barred))

    def place(self, key: Key, subject: str, slices: int) -> Cell:
        """Return the (shard, slice) of a subject's records in it."""
        shard, slice_ = place(key, subject, self.shards, slices, self.number)
        return self.first + shard, slice_

    def holds(self, shard: int) -> bool:
        """Return whether a shard is one of its."""
        return self.first <= shard < self.first + self.shards


def listed(slices: Mapping[Cell, str]) -> list[list[Any]]:
    """Return slices and digests as an event's body has them."""
    return [[shard, slice_, digest] for (shard, slice_), digest in sorted(slices.items())]


def digests(rows: Iterable[Sequence[Any]]) -> dict[Cell, str]:
    """Read what `listed` gave."""
    return {(shard, slice_): digest for shard, slice_, digest in rows}
