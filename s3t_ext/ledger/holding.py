"""Who is where: one row for each subject and place, under one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s3t_ext.ledger.log import Cell

PRIVATE = "private"
_NOWHERE = -1  # shard and slice of a holding in a declared part


@dataclass(frozen=True)
class Holding:
    """A place where records of a subject are: a private slice, or a declared part ("public", "evaluation", ...)."""

    subject: str
    shard: int | None
    slice: int | None
    part: str = PRIVATE

    @property
    def cell(self) -> Cell | None:
        """(shard, slice), None in a declared part."""
        return None if self.shard is None or self.slice is None else (self.shard, self.slice)


def check_subject(subject: str) -> str:
    """Return a subject's hash, refused where it is none."""
    if not isinstance(subject, str) or len(subject) != 64 or not set(subject) <= set("0123456789abcdef"):
        raise ValueError(f"subject: wanted a hash of 64 hex digits, got {subject!r}")
    return subject


def to_row(holding: Holding, slices: Mapping[Cell, str]) -> tuple[str, str, int, int]:
    """Return the holding as the table has it: (subject, part, shard, slice)."""
    subject = check_subject(holding.subject)
    if holding.part == PRIVATE:
        if holding.cell is None or holding.cell not in slices:
            raise ValueError(f"holdings: wanted a private holding in one of the slices, got {holding}")
        return subject, PRIVATE, *holding.cell
    if not holding.part or holding.shard is not None or holding.slice is not None:
        raise ValueError(f"holdings: wanted a named declared part without shard and slice, got {holding}")
    return subject, holding.part, _NOWHERE, _NOWHERE


def from_row(subject: str, part: str, shard: int, slice_: int) -> Holding:
    """Return the holding of a row of the table."""
    return Holding(subject, shard, slice_) if part == PRIVATE else Holding(subject, None, None, part)


def holdings_sha256(rows: Iterable[Sequence[Any]]) -> str:
    """Return SHA-256 over the rows of the index of subjects in their order, types included."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row!r}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
