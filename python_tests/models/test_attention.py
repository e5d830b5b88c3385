"""Attention against its formula in float64, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s3t_ext.lora.pinned import pinned
from s3t_ext.models.attention import attention

SHAPES = {  # n, h, h', s, t, d
    "texts": (3, 4, 4, 8, 8, 16),
    "shared keys": (2, 6, 2, 16, 16, 8),
    "one query after a cache": (3, 4, 2, 1, 9, 8),
    "odd": (1, 3, 3, 17, 17, 5),
    "one token": (2, 2, 1, 1, 1, 4),
    "none": (0, 2, 2, 8, 8, 4),
}


def drawn(shape, dtype=torch.float32) -> tuple[list[Tensor], Tensor]:
    """Draw q, k, v as layers give them, heads inside; and a mask, some keys of every record but the first hidden."""
    n, h, shared, s, t, d = shape
    torch.manual_seed(0)
    qkv = [
        torch.randn(n, rows, heads, d).to(dtype).transpose(1, 2) for rows, heads in ((s, h), (t, shared), (t, shared))
    ]
    hidden = torch.rand(n, 1, s, t) < 0.3
    hidden[..., 0] = False
    return qkv, torch.zeros(n, 1, s, t).masked_fill(hidden, torch.finfo(torch.float32).min)


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale + (0 if mask is None else mask.double())
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all seen"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_its_formula(shape, dtype, error, masked) -> None:
    qkv, mask = drawn(shape, dtype)
    mask = mask if masked else None
    ours = [x.detach().requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    y, want = attention(*ours, mask, 0.3), formula(*exact, mask, 0.3)
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), want, rtol=error, atol=error)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g.double())
    for x, x64 in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=4 * error, atol=4 * error)


@pytest.mark.parametrize("segments", [None, False, True], ids=["mask", "records", "records, causal"])
def test_a_gradient_has_its_gradient(segments) -> None:
    """A penalty on gradients, as some ways of training have: torch's own operations in double precision say what."""
    (q, k, v), mask = drawn((1, 4, 2, 9, 9, 8))
    starts = None if segments is None else torch.tensor([0, 4, 9])
    if segments is not None:
        same = torch.bucketize(torch.arange(9), starts[1:], right=True)
        seen = (same[:, None] == same) & (torch.ones(9, 9).tril().bool() | (not segments))
        mask = torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    found = []
    for dtype in (torch.float32, torch.float64):
        x = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        if dtype == torch.float64:
            y = formula(*x, mask, 0.3)
        else:
            y = attention(*x, mask if starts is None else None, 0.3, starts, bool(segments))
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), x)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("t", [8, 17, 40, 65, 197])
@pytest.mark.parametrize("d", [8, 16, 32, 64])
def test_a_record_has_the_same_bits_in_any_batch(t, d, dtype) -> None:
    qkv, mask = drawn((23, 4, 2, t, t, d), dtype)
    g = torch.randn(23, t, 4, d).to(dtype)

    def run(rows: slice) -> list[Tensor]:
        own = [x[rows].clone().requires_grad_() for x in qkv]
        with pinned():
            y = attention(*own, mask[rows], d**-0.5)
            y.backward(g[rows])
        return [y, *(x.grad for x in own)]

    whole = run(slice(0, 23))
    for rows in (slice(0, 1), slice(22, 23), slice(3, 5), slice(6, 13)):
        for part, there in zip(run(rows), whole, strict=True):
            assert torch.equal(part, there[rows])
