"""The public ops ``masked_lora`` and ``masked_lora_linear``: one check each, schema, fake and autograd.

Both are formulas over four primitives (``kernels.IMPLS``), which are ops themselves so that a compiler sees through::

    forward:  s  = shrink(x, a);   y  = base(x)  + expand(s, b)
    backward: ds = shrink(dy, b);  dx = dy @ W   + expand(ds, a);   da = outer(ds, x);  db = outer(s, dy)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.lora.check import check, check_values, want
from s3t_ext.lora.kernels import IMPLS, backend_for
from s3t_ext.lora.kernels.reference import unpack


class Packed(NamedTuple):
    """A frozen weight (O, K) in panels of 32 outputs, as ``pack`` returned it. Its owner overwrites it when it dies."""

    panels: Tensor  # (ceil(O / 32), K, 32)
    out_features: int


def pack(weight: Tensor) -> Packed:
    """Lay a frozen weight out for the CPU kernels, once, so that no call does it again.

    Args:
        weight: (O, K), fp32, fp16 or bf16, contiguous.

    Returns:
        Packed: same type and device; outputs are equal, bit for bit, to those of the plain weight in mode ``exact``.

    Raises:
        ValueError: ``weight`` is not a contiguous matrix.
        NotImplementedError: no backend serves its type and device.
    """
    want(weight.dim() == 2 and weight.is_contiguous(), "weight", "a contiguous matrix (O, K)", weight)
    panels = IMPLS["pack"][backend_for("pack", weight.device, weight.dtype)](weight.detach())
    return Packed(panels, weight.shape[0])


def masked_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    train: tuple[Tensor, Tensor] | None = None,
    dropout: tuple | None = None,
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
        dropout: not implemented yet.
        backend: one of ``kernels.IMPLS[op]``; empty: the fastest that serves the device and the type.

    Returns:
        (T, O), type of x. Gradients of pools are dense, in the pool's type, zero for adapters that no group names.

    Raises:
        ValueError: an argument's shape, type or value is wrong; the message names it. Ids out of range and offsets
            that do not ascend from 0 to T are found on the CPU only; on a device such an id reads nothing.
        NotImplementedError: type or device that no backend serves; ``dropout`` given.

    Notes:
        fp32 sums in blocks of 256 terms in ascending order; x @ a.T is rounded once to x's type, y once more. The bits
        of a row depend on its own group's adapters and on the row alone: not on T, G, other rows or threads. A masked
        adapter is not read. Source: kernels.md, S3T (arXiv 2406.16257) section 3.
    """
    a1, b1 = _pools(train, dropout)
    scales, number = _scale(scale)
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
    dropout: tuple | None = None,
    mode: str = "fast",
    backend: str = "",
) -> Tensor:
    """Apply a frozen linear layer and the live adapters of every row's group in one pass.

    ``y[t] = W x[t] + bias + sum_p scale[n] * (x[t] @ a[n].T) @ b[n]``; see ``masked_lora`` for the other arguments.

    Args:
        weight: (O, K), type of x, frozen: plain and contiguous, or as ``pack`` returned it.
        bias: (O,), type of x, frozen; or None.
        mode: ``"exact"``: one accumulator for base and adapters, every output bit independent of T, G, other rows and
            threads (training and verification use it). ``"fast"``: the base product is the library's, and that promise
            covers the adapters' part only.

    Returns:
        (T, O), type of x.

    Raises:
        ValueError, NotImplementedError: as ``masked_lora``; also a weight or bias that requires gradients.
    """
    a1, b1 = _pools(train, dropout)
    scales, number = _scale(scale)
    panels, out_features = weight if isinstance(weight, Packed) else (weight, weight.shape[0] if weight.dim() else 0)
    for name, tensor in (("weight", panels), ("bias", bias)):
        want(
            tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad),
            name,
            "a frozen tensor",
            f"one that requires gradients; call {name}.requires_grad_(False)",
        )
    dtype = _autocast_type(x)
    return torch.ops.s3t.masked_lora_linear(
        _cast(x, dtype),
        _cast(panels, dtype),
        None if bias is None else _cast(bias, dtype),
        _cast_pool(a, dtype),
        _cast_pool(b, dtype),
        adapter_ids,
        offsets,
        scales,
        number,
        _cast_pool(a1, dtype),
        _cast_pool(b1, dtype),
        mode,
        out_features,
        backend,
    )


def _pools(train: tuple[Tensor, Tensor] | None, dropout: object) -> tuple[Tensor | None, Tensor | None]:
    if dropout is not None:
        raise NotImplementedError("dropout: not implemented yet; pass None")
    if train is None:
        return None, None
    pair = isinstance(train, (tuple, list)) and len(train) == 2 and all(isinstance(t, Tensor) for t in train)
    want(pair, "train", "a pair (a1, b1) of tensors", type(train))
    return train[0], train[1]


def _scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    if not isinstance(scale, Tensor):
        return None, float(scale)
    want(
        not (torch.is_grad_enabled() and scale.requires_grad),
        "scale",
        "a tensor without gradient",
        "one that requires it",
    )
    return scale, 1.0


def _autocast_type(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t if dtype is None else t.to(dtype)


def _cast_pool(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Cast a pool under autocast unless it is fp32: the kernels round that once on reading, gradients stay fp32."""
    return t if t is None or dtype is None or t.dtype == torch.float32 else t.to(dtype)


# --- primitives as ops -----------------------------------------------------------------------------------------------

_LIB = torch.library.Library("s3t", "DEF")
_TABLE = "Tensor adapter_ids, Tensor? offsets"
_SCALE = "Tensor? scales, float scale"
_LIB.define(f"shrink(Tensor u, Tensor w, Tensor? w1, {_TABLE}, {_SCALE}, str backend) -> Tensor")
_LIB.define(f"expand_(Tensor(a!) y, Tensor s, Tensor w, Tensor? w1, {_TABLE}, str backend) -> ()")
_LIB.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor w, Tensor? w1, {_TABLE},"
    " int out_features, bool transposed, str backend) -> Tensor"
)
_LIB.define(f"outer(Tensor s, Tensor u, {_TABLE}, int first, int count, ScalarType dtype, str backend) -> Tensor")
_LIB.define(
    f"masked_lora(Tensor x, Tensor a, Tensor b, {_TABLE}, {_SCALE}, Tensor? a1, Tensor? b1, str backend) -> Tensor"
)
_LIB.define(
    f"masked_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, {_TABLE}, {_SCALE},"
    " Tensor? a1, Tensor? b1, str mode, int out_features, str backend) -> Tensor"
)


def _shrink(u, w, w1, ids, offsets, scales, scale, backend):
    check_values(ids, offsets, u.shape[0], w.shape[0] + (0 if w1 is None else w1.shape[0]))
    fn = IMPLS["shrink"][backend_for("shrink", u.device, u.dtype, backend)]
    return fn(u, w, w1, ids, offsets, scales, scale)


def _expand_(y, s, w, w1, ids, offsets, backend):
    IMPLS["expand_"][backend_for("expand_", y.device, y.dtype, backend)](y, s, w, w1, ids, offsets)


def _linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, backend):
    fn = IMPLS["linear"][backend_for("linear", x.device, x.dtype, backend)]
    return fn(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed)


def _outer(s, u, ids, offsets, first, count, dtype, backend):
    fn = IMPLS["outer"][backend_for("outer", u.device, u.dtype, backend)]
    return fn(s, u, ids, offsets, first, count, dtype)


def _fake_linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, backend):
    return x.new_empty(x.shape[0], weight.shape[1] if transposed else out_features)  # (T, K) or (T, O)


for _name, _real, _like in (
    ("shrink", _shrink, lambda u, w, w1, ids, *_: u.new_empty(u.shape[0], ids.shape[1], w.shape[1])),  # (T, P, r)
    ("expand_", _expand_, lambda *_: None),
    ("linear", _linear, _fake_linear),
    (
        "outer",
        _outer,
        lambda s, u, ids, offsets, first, count, dtype, backend: u.new_empty(
            count, s.shape[2], u.shape[1], dtype=dtype
        ),
    ),  # (count, r, D)
):
    _LIB.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", _like, lib=_LIB)


# --- the two public ops ----------------------------------------------------------------------------------------------


def _forward(x, weight, bias, a, b, ids, offsets, scales, scale, a1, b1, mode, out_features, backend):
    """Compute (y, s); ``weight`` None: the adapters' sum alone."""
    outputs = check(x, weight, bias, a, b, ids, offsets, scales, a1, b1, mode, out_features)
    ops = torch.ops.s3t
    s = ops.shrink(x, a, a1, ids, offsets, scales, scale, backend)  # (T, P, r)
    if weight is not None and mode == "exact":
        return ops.linear(x, weight, bias, s, b, b1, ids, offsets, outputs, False, backend), s
    y = x.new_zeros(x.shape[0], outputs) if weight is None else F.linear(x, unpack(weight, outputs), bias)  # (T, O)
    ops.expand_(y, s, b, b1, ids, offsets, backend)
    return y, s


class _MaskedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, weight, _, a, b, ids, offsets, scales, scale, a1, b1, mode, out_features, backend = args
        with torch._C._AutoDispatchBelowAutograd():
            y, s = _forward(*args)
        ctx.save_for_backward(x, weight, a, b, a1, b1, ids, offsets, scales, s)
        ctx.settings = (scale, mode, out_features, backend)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, a, b, a1, b1, ids, offsets, scales, s = ctx.saved_tensors
        scale, mode, out_features, backend = ctx.settings
        ops = torch.ops.s3t
        dy = dy.contiguous()
        ds = ops.shrink(dy, b, b1, ids, offsets, scales, scale, backend)  # (T, P, r)
        grads: list[Tensor | None] = [None] * 14
        if ctx.needs_input_grad[0]:
            if weight is not None and mode == "exact":
                grads[0] = ops.linear(dy, weight, None, ds, a, a1, ids, offsets, out_features, True, backend)
            else:
                dx = torch.zeros_like(x) if weight is None else dy @ unpack(weight, out_features)  # (T, K)
                ops.expand_(dx, ds, a, a1, ids, offsets, backend)
                grads[0] = dx
        first, pool_a, pool_b, at_a, at_b = (0, a, b, 3, 4) if a1 is None else (a.shape[0], a1, b1, 9, 10)
        if ctx.needs_input_grad[at_a]:
            grads[at_a] = ops.outer(ds, x, ids, offsets, first, pool_a.shape[0], pool_a.dtype, backend)
        if ctx.needs_input_grad[at_b]:
            grads[at_b] = ops.outer(s, dy, ids, offsets, first, pool_b.shape[0], pool_b.dtype, backend)
        return tuple(grads)


def _masked_lora_args(x, a, b, ids, offsets, scales, scale, a1, b1, backend):
    return x, None, None, a, b, ids, offsets, scales, scale, a1, b1, "fast", 0, backend


def _masked_lora_linear_args(x, weight, bias, a, b, ids, offsets, scales, scale, a1, b1, mode, out_features, backend):
    return x, weight, bias, a, b, ids, offsets, scales, scale, a1, b1, mode, out_features, backend


def _fake(x, weight, bias, a, b, ids, offsets, scales, scale, a1, b1, mode, out_features, backend):
    outputs = check(x, weight, bias, a, b, ids, offsets, scales, a1, b1, mode, out_features)
    return x.new_empty(x.shape[0], outputs)  # (T, O)


for _name, _args in (("masked_lora", _masked_lora_args), ("masked_lora_linear", _masked_lora_linear_args)):
    _LIB.impl(_name, lambda *args, _args=_args: _MaskedLoRA.apply(*_args(*args)), "Autograd")
    _LIB.impl(_name, lambda *args, _args=_args: _forward(*_args(*args))[0], "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", lambda *args, _args=_args: _fake(*_args(*args)), lib=_LIB)
