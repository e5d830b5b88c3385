"""Attention whose bits are a function of each record alone, in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Mix values: ``softmax(scale * q k.T + mask) v`` for each head.

    Args:
        q: (n, h, s, d); ``k``, ``v``: (n, h', t, d) with h' a divisor of h: each serves h / h' heads of q in turn.
        mask: float32, added to the scores, broadcast to (n, 1, s, t); or None.

    Returns:
        (n, s, h, d) in the type of q, contiguous.

    Notes:
        On the CPU scores, softmax and sums are fp32 in every type: the bf16 backward pass of torch's fused attention
        takes 17 times as long as this one's (torch 2.13), and one thread's batched products of fp32 matrices do not
        depend on how many there are, which tests hold. Elsewhere it is torch's fused attention.
    """
    if q.device.type == "cpu":
        return _Attention.apply(q, k, v, mask, scale)
    mixed = F.scaled_dot_product_attention(
        q, k, v, None if mask is None else mask.to(q.dtype), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed.transpose(1, 2).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        n, h, s, d = q.shape
        shared, t = k.shape[1], k.shape[2]
        rows = h // shared * s  # queries of one head of k
        q3, k3, v3 = _flat(q, n * shared, rows), _flat(k, n * shared, t), _flat(v, n * shared, t)
        if mask is None:
            p = torch.bmm(q3, k3.mT).mul_(scale)  # (n h', rows, t)
        else:
            p = torch.empty(n, shared, h // shared, s, t)
            p.copy_(mask[:, :, None])
            p = p.view(n * shared, rows, t).baddbmm_(q3, k3.mT, alpha=scale)
        p = torch.softmax(p, -1)
        ctx.save_for_backward(q3, k3, v3, p)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape)
        mixed = torch.bmm(p, v3).view(n, h, s, d)
        return torch.empty(n, s, h, d, dtype=q.dtype).copy_(mixed.transpose(1, 2))  # (n, s, h, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q3, k3, v3, p = ctx.saved_tensors
        whole, shared = ctx.shapes
        g = _flat(grad.transpose(1, 2), len(p), p.shape[1])  # (n h', rows, d)
        dv = torch.bmm(p.mT, g)  # (n h', t, d)
        ds = torch._softmax_backward_data(torch.bmm(g, v3.mT), p, -1, torch.float32)  # (n h', rows, t)
        dq = torch.bmm(ds, k3).mul_(ctx.scale)  # (n h', rows, d)
        dk = torch.bmm(ds.mT, q3).mul_(ctx.scale)  # (n h', t, d)
        return *(_heads(x, shape, grad.dtype) for x, shape in ((dq, whole), (dk, shared), (dv, shared))), None, None


def _flat(x: Tensor, matrices: int, rows: int) -> Tensor:
    """Copy (n, h, s, d) of any strides to contiguous fp32 matrices (matrices, rows, d)."""
    return torch.empty(x.shape).copy_(x).view(matrices, rows, x.shape[-1])


def _heads(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Give (n, h, s, d) as a view of (n, s, h, d): the layers before it read their gradient without another copy."""
    n, h, s, d = shape
    return torch.empty(n, s, h, d, dtype=dtype).copy_(x.view(shape).transpose(1, 2)).transpose(1, 2)
