"""Batches: an order that is a function of keys, and padding that is a function of each record alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STEP = 8  # a padded length is a multiple of it: vectors of elementwise kernels then end where rows end


def padded_length(length: int, limit: int | None = None) -> int:
    """Give the length that a text of ``length`` tokens is padded to: the next multiple of 8, at most ``limit``."""
    padded = max(-(-length // STEP), 1) * STEP
    return padded if limit is None else min(padded, limit)


def by_length(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a batch into parts that run one forward pass each: texts of one padded length, short ones first.

    Args:
        x: (n, *shape) numbers, which are one part; or (n, limit) int32 or int64 token ids, padded with -1 at the end.

    Returns:
        For each part the rows (k,) int64, ascending, and ``x[rows]`` (k, *shape), of texts the first columns only.

    Notes:
        A record's padded length depends on no other record; so do its bits.
    """
    if x.dtype not in (torch.int32, torch.int64):
        return [(torch.arange(len(x)), x)]
    lengths = (x >= 0).sum(1).tolist()  # n
    padded = torch.tensor([padded_length(length, x.shape[1]) for length in lengths], dtype=torch.int64)  # (n,)
    parts = [(length, (padded == length).nonzero().flatten()) for length in padded.unique().tolist()]
    return [(rows, x[rows, :length]) for length, rows in parts]


def batch_order(key: bytes, records: Sequence[bytes], rows: int) -> np.ndarray:
    """Order records for training: epoch after epoch, each sorted by a keyed hash, cut after ``rows``.

    Args:
        key: names the stream; ``records``: the records' keys, in any order.
        rows: how many indices to give; batch s of size B is ``[s * B, (s + 1) * B)``.

    Returns:
        (rows,) int64 indices into ``records``; empty if there are none.

    Notes:
        The order of two records never depends on a third, on their position, or on how many there are.
    """
    if not records:
        return np.empty(0, np.int64)
    epochs = []
    for epoch in range(-(-rows // len(records))):
        salt = hashlib.sha256(key + epoch.to_bytes(8, "little")).digest()
        ranks = [hashlib.blake2b(record, key=salt).digest() for record in records]
        epochs.append(np.array(sorted(range(len(ranks)), key=ranks.__getitem__), np.int64))
    return np.concatenate(epochs)[:rows]
