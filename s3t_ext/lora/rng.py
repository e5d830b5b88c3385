"""Counter-based streams: what a key names is drawn the same on every machine, in any order, by any process."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def stream(key: bytes) -> np.random.Philox:
    """Open the Philox 4x64 stream (Salmon et al., SC 2011) that a key of at least 16 bytes names."""
    if len(key) < 16:
        raise ValueError(f"key: expected at least 16 bytes, got {len(key)}")
    return np.random.Philox(key=int.from_bytes(key[:16], "little"))


def uniform(key: bytes, shape: tuple[int, ...], bound: float) -> Tensor:
    """Draw fp32 values uniformly from 2^24 equally spaced points of the open interval (-bound, bound).

    ``value = (2 i + 1 - 2^24) * 2^-24 * bound`` with i a 24-bit integer of the stream: one rounding, so the same bits
    everywhere.
    """
    raw = stream(key).random_raw(math.prod(shape))
    centred = 2 * (raw >> np.uint64(40)).astype(np.int64) + 1 - 2**24
    values = centred.astype(np.float64) * (2.0**-24 * float(np.float32(bound)))
    return torch.from_numpy(values.astype(np.float32)).view(shape)
