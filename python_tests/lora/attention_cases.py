"""Cases of the native attention kernel. As a program it prints a hash of the results of all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from s3t_ext.lora.kernels import native

CASES = {  # n, h, h', s, t, d: which path it takes
    "one tile": (3, 4, 4, 8, 8, 16),
    "a panel and a part; heads share keys": (2, 6, 2, 40, 40, 24),
    "two blocks of queries": (1, 2, 1, 70, 70, 33),
    "one query, past sixteen panels of keys": (2, 2, 2, 1, 530, 8),
    "two blocks of the sum over d": (1, 1, 1, 9, 7, 300),
    "all ones": (1, 1, 1, 1, 1, 1),
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(case: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Draw q, k, v as views with heads inside, a mask, and a gradient of y."""
    n, h, shared, s, t, d = CASES[case]
    g = torch.Generator().manual_seed(0)
    lots = ((s, h), (t, shared), (t, shared), (s, h))
    *qkv, grad = (torch.randn(n, rows, heads, d, generator=g).to(dtype).transpose(1, 2) for rows, heads in lots)
    hidden = torch.rand(n, 1, s, t, generator=g) < 0.3
    hidden[..., 0] = False
    return qkv, torch.zeros(n, 1, s, t).masked_fill_(hidden, torch.finfo(torch.float32).min), grad


def run(case: str, dtype: torch.dtype) -> list[Tensor]:
    """Give y and the gradients of q, k and v."""
    qkv, mask, grad = drawn(case, dtype)
    y, stats = native.attention(*qkv, mask, 0.3)
    return [y, *native.attention_backward(*qkv, mask, 0.3, stats, grad)]


if __name__ == "__main__":
    digest = hashlib.sha256()
    for case in CASES:
        for dtype in TYPES:
            for t in run(case, dtype):
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
