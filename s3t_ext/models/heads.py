"""Classification heads that no record can leak through."""

from __future__ import annotations

import torch
from torch import Tensor

from s3t_ext.lora.rng import uniform


def orthonormal(key: bytes, classes: int, features: int) -> Tensor:
    """Draw a frozen head (classes, features) with orthonormal rows; logits are ``head @ features``.

    It is stored and hashed as part of a node's identity, since the bits of a QR factorisation differ between machines.

    Raises:
        ValueError: more classes than features.
    """
    if classes > features:
        raise ValueError(f"classes: expected at most as many as the model's features ({features}), got {classes}")
    q, r = torch.linalg.qr(uniform(key, (features, classes), 1.0).double())
    return (q * r.diagonal().sign()).t().float().contiguous()  # (classes, features)
