"""The primitives in plain torch, on any device: the truth that every other backend is held against.

Each function accumulates in fp64, one term at a time in ascending order, through elementwise operations only. A row's
(or an adapter's) bits therefore depend on nothing but its own terms, and the product of two fp32 values is exact in
fp64, so a fused multiply-add gives the same bits as a multiplication and an addition. It is slow by design. Shapes: T
rows, D and O features, r rank, N + M adapters, G groups, P slots.

Dead slots are selected away, never multiplied by zero; nothing is read back to the host, so the functions run under a
CUDA graph too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout, keep

LANES = 32  # columns of a packed panel, the same for every instruction set


def _route(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int) -> tuple[Tensor, Tensor]:
    """Give each row its slots: (index of the adapter, 0 where dead) and (is it alive)."""
    by_row = ids[_group(ids, offsets, rows)]  # (T, P)
    alive = (by_row >= 0) & (by_row < adapters)
    return torch.where(alive, by_row, 0).to(torch.int64), alive


def _group(ids: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """Find the group of each row."""
    row = torch.arange(rows, device=ids.device)
    if offsets is None:
        return torch.zeros_like(row)  # (T,)
    return torch.bucketize(row, offsets[1:].to(torch.int64), right=True)  # (T,)


def _kept(drop: Dropout | None, ids: Tensor, offsets: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """Give the mask (T, P, columns) of dropout, or None for no dropout."""
    if drop is None:
        return None
    group = _group(ids, offsets, rows)
    return keep(drop, ids[group], group, columns)


def _pool(w: Tensor, w1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Join the frozen and the trainable pool, each value rounded once to the type of the rows."""
    parts = [w] if w1 is None else [w, w1]
    pool = torch.cat([p.to(dtype).to(torch.float64) for p in parts])  # (N + M, r, D)
    return pool if len(pool) else pool.new_zeros(1, *pool.shape[1:])


def shrink(
    u: Tensor,
    w: Tensor,
    w1: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    scale: float,
    drop: Dropout | None = None,
) -> Tensor:
    """Project rows onto their adapters: s[t,p,j] = scale[n] * sum_d w[n,j,d] u[t,d]; exactly 0 in a dead slot."""
    index, alive = _route(ids, offsets, len(u), len(w) + (0 if w1 is None else len(w1)))
    pool = _pool(w, w1, u.dtype)
    rows = u.to(torch.float64)
    acc = rows.new_zeros(len(u), ids.shape[1], w.shape[1])  # (T, P, r)
    kept = _kept(drop, ids, offsets, len(u), u.shape[1])
    for d in range(u.shape[1]):
        column = rows[:, d, None, None]
        acc.addcmul_(column if kept is None else torch.where(kept[:, :, d, None], column, 0), pool[:, :, d][index])
    if u.dtype != torch.float64:
        acc = acc.float()  # the sum is an fp32 sum before it is scaled
    if scales is None:
        acc = acc * scale
    elif len(scales):
        acc = acc * scales[index][..., None]
    return torch.where(alive[..., None], acc, 0).to(u.dtype)


def _expanded(
    s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, drop: Dropout | None
) -> Tensor:
    """Sum of the live slots in fp64, slots and ranks ascending."""
    index, alive = _route(ids, offsets, len(s), len(w) + (0 if w1 is None else len(w1)))
    pool = _pool(w, w1, s.dtype)
    terms = s.to(torch.float64)
    acc = terms.new_zeros(len(s), w.shape[2])  # (T, D)
    kept = _kept(drop, ids, offsets, len(s), w.shape[2])
    for p in range(ids.shape[1]):
        chosen = alive[:, p, None] if kept is None else alive[:, p, None] & kept[:, p]
        for j in range(w.shape[1]):
            acc.add_(torch.where(chosen, terms[:, p, j, None] * pool[:, j][index[:, p]], 0))
    return acc


def expand_(
    y: Tensor,
    s: Tensor,
    w: Tensor,
    w1: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    drop: Dropout | None = None,
) -> None:
    """Add the adapters' part in place: y[t] += sum_p sum_j s[t,p,j] w[n,j], rounded once."""
    y.copy_((y.to(torch.float64) + _expanded(s, w, w1, ids, offsets, drop)).to(y.dtype))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    w: Tensor,
    w1: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    out_features: int,
    transposed: bool,
    drop: Dropout | None = None,
) -> Tensor:
    """Base product and adapters in one sum, rounded once: y = x W^T + sum_p s_p w_n + bias, or x W if transposed."""
    plain = unpack(weight, out_features, w.shape[2] if transposed else x.shape[1])
    base = (plain.t() if transposed else plain).to(torch.float64)  # (outputs, inputs)
    rows = x.to(torch.float64)
    acc = rows.new_zeros(len(x), len(base))  # (T, O)
    for k in range(x.shape[1]):
        acc.addcmul_(rows[:, k, None], base[:, k])
    acc.add_(_expanded(s, w, w1, ids, offsets, drop))
    if bias is not None:
        acc.add_(bias.to(torch.float64))
    return acc.to(x.dtype)


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    a1: Tensor | None,
    b: Tensor,
    b1: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    scale: float,
    out_features: int,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the whole forward of a layer: s = shrink(x, a), then y = linear(x, weight, bias, s, b)."""
    s = shrink(x, a, a1, ids, offsets, scales, scale, drop)  # (T, P, r)
    return linear(x, weight, bias, s, b, b1, ids, offsets, out_features, False), s


def outer(
    s: Tensor,
    u: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    first: int,
    count: int,
    dtype: torch.dtype,
    drop: Dropout | None = None,
) -> Tensor:
    """Sum outer products by adapter: dw[n - first] = sum over n's rows, ascending, of s[t,p]^T u[t]."""
    index, alive = _route(ids - first, offsets, len(u), count)
    index = torch.where(alive, index, count)  # dead slots fall into one row more, which is dropped
    dw = u.new_zeros(count + 1, s.shape[2], u.shape[1], dtype=torch.float64)  # (count + 1, r, D)
    kept = _kept(drop, ids, offsets, len(u), u.shape[1])
    for p in range(ids.shape[1]):
        rows = u if kept is None else torch.where(kept[:, p], u, 0)
        for t in range(len(u)):
            dw.index_add_(0, index[t, p, None], (s[t, p].double()[:, None] * rows[t].double())[None])
    return dw[:count].to(dtype)


def pack(weight: Tensor) -> Tensor:
    """Lay a weight (O, K) out in panels of 32 outputs, zero-padded: (ceil(O / 32), K, 32), in bf16 by pairs of k."""
    out_features, in_features = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    panels = weight.new_zeros(-(-out_features // LANES) * LANES, -(-in_features // pair) * pair)
    panels[:out_features, :in_features] = weight
    panels = panels.view(-1, LANES, panels.shape[1]).transpose(1, 2).contiguous()  # (ceil(O / 32), K, 32)
    if pair == 1:
        return panels
    return panels.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()  # (ceil(O / 32), ceil(K / 2), 32, 2)


def unpack(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """Give back the plain (O, K) weight of panels; a plain weight is returned as it is."""
    if weight.dim() == 2:
        return weight
    if weight.dim() == 4:
        weight = weight.transpose(2, 3).flatten(1, 2)  # (ceil(O / 32), K, 32)
    return weight.transpose(1, 2).flatten(0, 1)[:out_features, :in_features]  # (O, K)
