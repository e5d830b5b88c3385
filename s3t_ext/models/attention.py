"""Attention whose bits are a function of each record alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.lora.kernels import TYPES, native


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Mix values: ``softmax(scale * q k.T + mask) v`` for each head.

    Args:
        q: (n, h, s, d); ``k``, ``v``: (n, h', t, d) with h' a divisor of h: each serves h / h' heads of q in turn.
        mask: float32, added to the scores, broadcast to (n, 1, s, t); or None.
        starts: (records + 1,) int64: n is 1 then, and the rows of q, k and v are the tokens of all records, one after
            the other, record i from starts[i] on; ``causal``: none sees what comes after it. Where ``attends`` only.

    Returns:
        (n, s, h, d) in the type of q, contiguous.

    Notes:
        On the CPU by the package's own kernel, all in fp32: torch's fused attention depends on the number of threads,
        and its bf16 backward pass takes 60 times as long (torch 2.13). Elsewhere it is torch's.
    """
    if attends(q) and k.shape[2]:
        return _Attention.apply(q, k, v, mask, scale, starts, causal)
    mask = None if mask is None else mask.to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).contiguous()


def attends(x: Tensor) -> bool:
    """Tell whether the package's own kernel is there for tensors like this."""
    return native.ATTENDS and x.device.type == "cpu" and x.dtype in TYPES


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, starts: Any, causal: bool
    ) -> Tensor:
        if mask is not None:
            mask = _lined(mask.expand(-1, -1, -1, k.shape[2])).expand(len(q), 1, q.shape[2], k.shape[2])
        y, stats = native.attention(_lined(q), _lined(k), _lined(v), mask, scale, starts, causal)
        ctx.save_for_backward(q, k, v, mask, stats, starts)
        ctx.scale, ctx.causal = scale, causal
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, stats, starts = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will ask for the gradient of this gradient
            return *_by_formula(ctx, grad), None, None, None, None
        g = _lined(grad).transpose(1, 2)  # (n, h, s, d)
        lined = _lined(q), _lined(k), _lined(v)
        grads = native.attention_backward(*lined, mask, ctx.scale, stats, g, starts, ctx.causal)
        return *grads, None, None, None, None


def _by_formula(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Give the gradients of q, k and v as torch's own operations, which can be differentiated again."""
    q, k, v, mask, _, starts = ctx.saved_tensors
    shared = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]  # (n, h, t, d)
    scores = q @ shared[0].mT * ctx.scale + (0 if mask is None else mask)  # (n, h, s, t)
    if starts is not None:
        places = torch.arange(q.shape[2], device=q.device)  # (T,)
        owner = torch.bucketize(places, starts[1:], right=True)
        seen = (owner[:, None] == owner) & ((places[:, None] >= places) | (not ctx.causal))  # (T, T)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    y = (scores.softmax(-1) @ shared[1]).transpose(1, 2)  # (n, s, h, d)
    wanted = [x for x, needed in zip((q, k, v), ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _lined(x: Tensor) -> Tensor:
    """Give a tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
