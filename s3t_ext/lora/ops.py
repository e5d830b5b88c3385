"""The public ops ``masked_lora`` and ``masked_lora_linear``: one check each, schema, fake and autograd.

Both are formulas over a few primitives (``kernels.IMPLS``), which are ops themselves::

    forward:  s  = shrink(x, a);   y  = base(x)  + expand(s, b)
    backward: ds = shrink(dy, b);  dx = dy @ W   + expand(ds, a);   da = outer(ds, x);  db = outer(s, dy)

Dropout selects elements of x for each slot: in shrink(x, a), in outer(ds, x) and in what expand(ds, a) adds to dx.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.lora.check import check, wrong
from s3t_ext.lora.kernels import IMPLS, backend_for
from s3t_ext.lora.kernels.paths import MODES, path_for
from s3t_ext.lora.kernels.reference import unpack
from s3t_ext.lora.primitives import DROP, LIB, SCALE, TABLE


class Packed(NamedTuple):
    """A frozen weight (O, K) in panels of 32 outputs, as ``pack`` returned it. Its owner overwrites it when it dies."""

    panels: Tensor  # (ceil(O / 32), K, 32)
    out_features: int
    turned: Tensor | None = None  # the panels (ceil(K / 32), O, 32) of the transposed weight, for the gradient of x


def pack(weight: Tensor, *, backward: bool = False) -> Packed:
    """Lay a frozen weight out for the CPU kernels, once, so that no call does it again.

    Args:
        weight: (O, K), fp32, fp16 or bf16, contiguous.
        backward: lay out the transposed weight too, which makes the gradient of x as fast as the forward pass; without
            it that gradient reads the panels across.

    Returns:
        Packed: same type and device; outputs and gradients are equal, bit for bit, to those of the plain weight in mode
        ``exact``, with ``backward`` and without.

    Raises:
        ValueError: ``weight`` is not a contiguous matrix.
        NotImplementedError: it is not on the CPU, or of a type that no backend serves.

    Notes:
        Memory: as much as ``weight``, with ``backward`` twice as much (O and K rounded up to 32). Nothing refers to
        ``weight`` afterwards: its owner may drop it.
    """
    if weight.dim() != 2 or not weight.is_contiguous():
        raise wrong("weight", "a contiguous matrix (O, K)", weight)
    if weight.device.type != "cpu":
        raise NotImplementedError(f"weight: panels are for the CPU; on {weight.device} pass the plain weight")
    lay_out = IMPLS["pack"][backend_for("pack", weight.device, weight.dtype)]
    weight = weight.detach()
    return Packed(lay_out(weight), weight.shape[0], lay_out(weight.t().contiguous()) if backward else None)


def masked_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    train: tuple[Tensor, Tensor] | None = None,
    dropout: tuple[float, Tensor, Tensor] | None = None,
    backend: str = "",
) -> Tensor:
    """Sum the live adapters of every row's group.

    ``y[t] = sum_p scale[n] * (x[t] @ a[n].T) @ b[n]``, with ``n = adapter_ids[group(t), p]`` and ``n >= 0``.

    Args:
        x: (T, K), fp32, fp16 or bf16 (fp64 with ``backend="reference"``); last dimension contiguous.
        a: (N, r, K), as x or fp32, contiguous; ``b``: (N, r, O) likewise (PEFT's ``lora_B.weight`` transposed).
        adapter_ids: (G, P) int32 on the device of x, any strides; -1 masks a slot; the same id twice adds twice.
        offsets: (G + 1,) int32; group g owns rows offsets[g] to offsets[g+1] - 1; None: one group of all rows.
        scale: a number, or (N,) fp32 ((N + M,) with ``train``); no gradient.
        train: a second pool (a1 (M, r, K), b1 (M, r, O)) that ids N..N+M-1 name; with it only a1 and b1 get gradients.
        dropout: (p, seed (G,) int64, rows (T,) int64) on the device of x: of the x that a trainable adapter reads (all
            adapters without ``train``) each element is dropped with probability p, the rest scaled by 1 / (1 - p). The
            mask is a function of (seed of the group, key of the row, column, slot) alone, see ``kernels.dropout``; give
            every layer and step seeds of its own.
        backend: one of ``kernels.IMPLS[op]``; empty: the fastest that serves the device and the type.

    Returns:
        (T, O), type of x. Gradients of pools are dense, in the pool's type, zero for adapters that no group names.

    Raises:
        ValueError: an argument's shape, type or value is wrong; the message names it. Ids out of range and offsets
            that do not ascend from 0 to T are found on the CPU only; on a device such an id reads nothing.
        NotImplementedError: type or device that no backend serves.

    Notes:
        fp32 sums in blocks of 256 terms in ascending order; x @ a.T is rounded once to x's type, y once more. The bits
        of a row depend on its own group's adapters and on the row alone: not on T, G, other rows or threads. A masked
        adapter is not read. Source: kernels.md, S3T (arXiv 2406.16257) section 3.
    """
    _tensors(x=x, a=a, b=b, adapter_ids=adapter_ids, offsets=offsets)
    a1, b1 = _pools(train)
    seeds, rows, p = _dropout(dropout)
    scales, number = _scale(scale, p, a, a1)
    dtype = _autocast_type(x)
    return torch.ops.s3t.masked_lora(
        _cast(x, dtype),
        _cast_pool(a, dtype),
        _cast_pool(b, dtype),
        adapter_ids,
        offsets,
        scales,
        number,
        _cast_pool(a1, dtype),
        _cast_pool(b1, dtype),
        seeds,
        rows,
        p,
        backend,
    )


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    train: tuple[Tensor, Tensor] | None = None,
    dropout: tuple[float, Tensor, Tensor] | None = None,
    mode: str = "fast",
    backend: str = "",
) -> Tensor:
    """Apply a frozen linear layer and the live adapters of every row's group in one pass.

    ``y[t] = W x[t] + bias + sum_p scale[n] * (x[t] @ a[n].T) @ b[n]``; see ``masked_lora`` for the other arguments.

    Args:
        weight: (O, K), type of x, frozen: plain and contiguous, or as ``pack`` returned it (on the CPU; fastest, and in
            the plain weight's stead, not beside it). Where x gets a gradient: ``pack(weight, backward=True)``.
        bias: (O,), type of x, frozen; or None.
        mode: ``"exact"``: one accumulator for base and adapters, every output bit independent of T, G, other rows and
            threads (training and verification use it). ``"fast"``: what ``kernels.paths`` knows to be fastest, and that
            promise covers the adapters' part only; ``"fused"`` and ``"split"`` force one of its two ways.

    Returns:
        (T, O), type of x.

    Raises:
        ValueError, NotImplementedError: as ``masked_lora``; also a weight or bias that requires gradients.
    """
    _tensors(x=x, bias=bias, a=a, b=b, adapter_ids=adapter_ids, offsets=offsets)
    if not isinstance(mode, str):
        raise wrong("mode", f"one of {MODES}", repr(mode))
    if not isinstance(weight, (Tensor, Packed)):
        raise wrong("weight", "a tensor (O, K), or what pack() returned", type(weight))
    a1, b1 = _pools(train)
    seeds, rows, p = _dropout(dropout)
    scales, number = _scale(scale, p, a, a1)
    packed = weight if isinstance(weight, Packed) else Packed(weight, weight.shape[0] if weight.dim() else 0)
    panels, out_features, turned = packed
    for name, tensor in (("weight", panels), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise wrong(name, "a frozen tensor", f"one that requires gradients; call {name}.requires_grad_(False)")
    dtype = _autocast_type(x)
    if panels.dim() != 2 and dtype not in (None, panels.dtype):  # panels are laid out for their own type
        panels, turned = unpack(panels, out_features).contiguous(), None
    return torch.ops.s3t.masked_lora_linear(
        _cast(x, dtype),
        _cast(panels, dtype),
        turned,
        None if bias is None else _cast(bias, dtype),
        _cast_pool(a, dtype),
        _cast_pool(b, dtype),
        adapter_ids,
        offsets,
        scales,
        number,
        _cast_pool(a1, dtype),
        _cast_pool(b1, dtype),
        seeds,
        rows,
        p,
        mode,
        out_features,
        backend,
    )


def _tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (value is not None or name not in ("offsets", "bias")):
            raise wrong(name, "a tensor", type(value))


def _pools(train: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if train is None:
        return None, None
    pair = isinstance(train, (tuple, list)) and len(train) == 2 and all(isinstance(t, Tensor) for t in train)
    if not pair:
        raise wrong("train", "a pair (a1, b1) of tensors", type(train))
    return train[0], train[1]


def _dropout(dropout: tuple[float, Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, float]:
    if dropout is None:
        return None, None, 0.0
    triple = isinstance(dropout, (tuple, list)) and len(dropout) == 3
    if not triple or not isinstance(dropout[0], (int, float)) or not all(isinstance(t, Tensor) for t in dropout[1:]):
        raise wrong("dropout", "(p, seed (G,) int64, rows (T,) int64)", type(dropout))
    p, seeds, rows = dropout
    if not 0 <= p < 1:
        raise wrong("dropout[0]", "a probability 0 <= p < 1", p)
    return (seeds, rows, float(p)) if p else (None, None, 0.0)


def _scale(scale: float | Tensor, p: float, a: Tensor, a1: Tensor | None) -> tuple[Tensor | None, float]:
    """Split a scale in (tensor, number); the trainable adapters' take up the factor 1 / (1 - p) of dropout."""
    factor = 1 / (1 - p)
    if not isinstance(scale, (Tensor, int, float)):
        raise wrong("scale", "a number or a tensor", type(scale))
    if not isinstance(scale, Tensor):
        if not p or a1 is None or not a.dim() or not a1.dim():
            return None, float(scale) * factor
        scale = a.new_full((len(a) + len(a1),), float(scale), dtype=torch.float32)  # (N + M,)
    if scale.requires_grad and torch.is_grad_enabled():
        raise wrong("scale", "a tensor without gradient", "one that requires it")
    if p and scale.dim() == 1:
        first = 0 if a1 is None else len(a)
        scale = torch.cat([scale[:first], scale[first:] * factor])  # (N + M,)
    return scale, 1.0


def _autocast_type(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t if dtype is None else t.to(dtype)


def _cast_pool(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Cast a pool under autocast unless it is fp32: the kernels round that once on reading, gradients stay fp32."""
    return t if t is None or dtype is None or t.dtype == torch.float32 else t.to(dtype)


# --- as torch ops ----------------------------------------------------------------------------------------------------

LIB.define(
    f"masked_lora(Tensor x, Tensor a, Tensor b, {TABLE}, {SCALE}, Tensor? a1, Tensor? b1, {DROP},"
    " str backend) -> Tensor"
)
LIB.define(
    f"masked_lora_linear(Tensor x, Tensor weight, Tensor? turned, Tensor? bias, Tensor a, Tensor b, {TABLE}, {SCALE},"
    f" Tensor? a1, Tensor? b1, {DROP}, str mode, int out_features, str backend) -> Tensor"
)


class _Args(NamedTuple):
    """The arguments of either op; ``weight`` None: the adapters' sum alone."""

    x: Tensor
    weight: Tensor | None
    turned: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    ids: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    scale: float
    a1: Tensor | None
    b1: Tensor | None
    seeds: Tensor | None
    rows: Tensor | None
    p: float
    mode: str
    out_features: int
    backend: str


def _check(args: _Args) -> int:
    # fmt: off
    x, weight, turned, bias, a, b, ids, offsets, scales, _, a1, b1, seeds, rows, _, mode, out_features, _ = args
    # fmt: on
    return check(x, weight, turned, bias, a, b, ids, offsets, scales, a1, b1, seeds, rows, mode, out_features)


def _forward(args: _Args) -> tuple[Tensor, Tensor]:
    """Compute (y, s)."""
    # fmt: off
    x, weight, _, bias, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, mode, _, wanted = args
    # fmt: on
    outputs, ops, drop = _check(args), torch.ops.s3t, (seeds, rows, p)
    path = path_for(mode, x.device, x.dtype, x.shape[0], wanted, weight is not None and weight.dim() != 2)
    if weight is not None and path.fused:
        return ops.layer(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, outputs, *drop, path.backend)
    s = ops.shrink(x, a, a1, ids, offsets, scales, scale, *drop, path.backend)  # (T, P, r)
    y = x.new_zeros(x.shape[0], outputs) if weight is None else F.linear(x, unpack(weight, outputs), bias)  # (T, O)
    ops.expand_(y, s, b, b1, ids, offsets, None, None, 0.0, path.backend)
    return y, s


class _MaskedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        named = _Args(*args)
        with torch._C._AutoDispatchBelowAutograd():
            y, s = _forward(named)
        ctx.tensors = [name for name, value in named._asdict().items() if isinstance(value, Tensor) and name != "bias"]
        ctx.save_for_backward(s, *(getattr(named, name) for name in ctx.tensors))
        ctx.rest = {k: None if isinstance(v, Tensor) else v for k, v in named._asdict().items()}
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        s, *tensors = ctx.saved_tensors
        args = _Args(**{**ctx.rest, **dict(zip(ctx.tensors, tensors))})
        # fmt: off
        x, weight, turned, _, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, mode, outputs, wanted = args
        # fmt: on
        ops, drop = torch.ops.s3t, (seeds, rows, p)
        packed = weight is not None and weight.dim() != 2
        fused, backend = path_for(mode, x.device, x.dtype, x.shape[0], wanted, packed)
        dy = dy.contiguous()
        ds = ops.shrink(dy, b, b1, ids, offsets, scales, scale, None, None, 0.0, backend)  # (T, P, r)
        wants = dict(zip(_Args._fields, ctx.needs_input_grad))
        grads: dict[str, Tensor] = {}
        if wants["x"]:
            if turned is not None and fused:
                dx = ops.linear(dy, turned, None, ds, a, a1, ids, offsets, x.shape[1], False, *drop, backend)  # (T, K)
            elif weight is not None and fused:
                dx = ops.linear(dy, weight, None, ds, a, a1, ids, offsets, outputs, True, *drop, backend)  # (T, K)
            else:
                dx = torch.zeros_like(x) if weight is None else dy @ unpack(weight, outputs)  # (T, K)
                ops.expand_(dx, ds, a, a1, ids, offsets, *drop, backend)
            grads["x"] = dx
        first, at_a, at_b = (0, "a", "b") if a1 is None else (a.shape[0], "a1", "b1")
        for name, left, right, dropped in ((at_a, ds, x, drop), (at_b, s, dy, (None, None, 0.0))):
            pool = getattr(args, name)
            if wants[name]:
                sizes = (first, pool.shape[0], pool.dtype)
                grads[name] = ops.outer(left, right, ids, offsets, *sizes, *dropped, backend)
        return tuple(map(grads.get, _Args._fields))


def _masked_lora_args(x, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, backend):
    return _Args(x, None, None, None, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, "fast", 0, backend)


def _autograd(args: _Args) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return _MaskedLoRA.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(args)[0]


def _fake(args: _Args) -> Tensor:
    return args.x.new_empty(args.x.shape[0], _check(args))  # (T, O)


for _name, _args in (("masked_lora", _masked_lora_args), ("masked_lora_linear", _Args)):
    LIB.impl(_name, lambda *args, _args=_args: _autograd(_args(*args)), "Autograd")
    LIB.impl(_name, lambda *args, _args=_args: _forward(_args(*args))[0], "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", lambda *args, _args=_args: _fake(_args(*args)), lib=LIB)
