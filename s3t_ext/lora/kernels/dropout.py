"""Dropout of adapters as a function of keys: the same mask on every backend, in any tiling, for any batch.

Element (row t, column d, slot p) of group g gets the word ``philox(counter, key)[d % 4]`` of Philox 4x32 with 10 rounds
(Salmon et al., SC 2011), counter = (d // 4, p, low and high half of rows[t]), key = (low and high half of seeds[g]). It
is kept where the word is not below ``threshold``. Neither the pool's indices nor the row's place in the batch enter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Dropout(NamedTuple):
    """What a primitive needs to know of dropout; the factor 1 / (1 - p) is in the scale of the adapters already."""

    p: float
    seeds: Tensor  # (G,) int64
    rows: Tensor  # (T,) int64: a key of each row that travels with it
    first: int  # adapters below it are frozen: nothing of theirs is dropped

    @property
    def threshold(self) -> int:
        """An element is kept where its 32-bit word is not below this."""
        return min(round(self.p * 2**32), _WORD)


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product, in int64 without overflow."""
    low, high = (word & 0xFFFF) * constant, (word >> 16) * constant
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _WORD


def philox(seed: Tensor, row: Tensor, quad: Tensor, slot: Tensor) -> list[Tensor]:
    """Give the four 32-bit words (as int64) of columns 4 * quad .. 4 * quad + 3; arguments broadcast."""
    c = [quad, slot, row & _WORD, (row >> 32) & _WORD]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], c[0]), _product(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & _WORD for k, w in zip(key, _WEYL)]
    return list(torch.broadcast_tensors(*c))


def keep(drop: Dropout, by_row: Tensor, group: Tensor, columns: int) -> Tensor:
    """Say which elements are kept.

    Args:
        by_row: (T, P), the adapter of each row's slots; ``group``: (T,), the group of each row.
        columns: D.

    Returns:
        (T, P, D) bool; true throughout for adapters below ``drop.first``.
    """
    device = by_row.device
    quads = torch.arange(-(-columns // 4), device=device)  # (D / 4,)
    slots = torch.arange(by_row.shape[1], device=device)  # (P,)
    words = philox(drop.seeds[group][:, None, None], drop.rows[:, None, None], quads, slots[:, None])
    flat = torch.stack(words, -1).flatten(2)[..., :columns]  # (T, P, D)
    return (flat >= drop.threshold) | (by_row < drop.first)[..., None]
