"""Batches whose order is a function of a key and the records' own keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


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
