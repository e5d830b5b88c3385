"""Cases of the native attention kernel. As a program it prints a hash of the results of all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from s3t_ext.lora.kernels import native

CASES = {  # n, h, h', s, t, d: which path it takes
    "one tile": (3, 4, 4, 8, 8, 16),
    "heads share keys": (2, 6, 2, 40, 40, 24),
    "two blocks of queries": (1, 2, 1, 100, 100, 33),
    "an image: one key more than a whole number of vectors": (2, 2, 2, 65, 65, 16),
    "heads of whole vectors": (2, 2, 2, 20, 20, 64),
    "one query, three blocks of the sum over keys": (2, 2, 2, 1, 530, 8),
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


LENGTHS = (3, 100, 1, 33)


def ragged(dtype: torch.dtype, causal: bool = True, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Give y and the gradients of q, k and v for records of different lengths, of which each has its own numbers."""
    parts: list[list[Tensor]] = []
    for length in lengths:
        g = torch.Generator().manual_seed(length)
        parts.append([torch.randn(1, length, h, 24, generator=g).to(dtype) for h in (6, 2, 2, 6)])
    q, k, v, grad = (torch.cat(xs, 1).transpose(1, 2) for xs in zip(*parts, strict=True))  # (1, h, T, d)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    y, stats = native.attention(q, k, v, None, 0.3, starts, causal)
    return [y, *native.attention_backward(q, k, v, None, 0.3, stats, grad, starts, causal), q, k, v, grad]


if __name__ == "__main__":
    digest = hashlib.sha256()
    for dtype in TYPES:
        for t in (t for results in (*(run(case, dtype) for case in CASES), ragged(dtype)) for t in results):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
