"""The formula of both ops over the primitives, forward and backward, and how a call reaches it.

Both ops are formulas over a few primitives (``kernels.IMPLS``)::

    forward:  s  = shrink(x, a);   y  = base(x)  + expand(s, b)
    backward: ds = shrink(dy, b);  dx = dy @ W   + expand(ds, a);   da = outer(ds, x);  db = outer(s, dy)

Dropout selects elements of x for each slot: in shrink(x, a), in outer(ds, x) and in what expand(ds, a) adds to dx.

The ops and the primitives are torch ops, which compilers, modes, subclasses, transforms and profilers see. The way
through torch's dispatcher costs more than a small layer does: where none of those is there, it is passed by. Where no
gradient is wanted either, and on the CPU, ``ops.direct`` leads past this file too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from s3t_ext.lora.check import check
from s3t_ext.lora.kernels import native
from s3t_ext.lora.kernels.paths import path_for
from s3t_ext.lora.kernels.reference import unpack
from s3t_ext.lora.primitives import DROP, KERNELS, LIB, SCALE, TABLE

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

# Each is false (None, 0) where nothing of its kind would see an op.
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch.autograd._profiler_enabled,
    torch._C._get_tracing_state,
    lambda: forward_ad._current_level >= 0,
)
native.attach((*_WATCHERS, torch._C._is_any_autocast_enabled))


def unseen(x: Tensor, *tensors: Tensor | None) -> bool:
    """Tell whether nothing in torch would see an op on these tensors: then its kernel may be called straight.

    Of a tensor with the negative bit the memory holds the negative, and a batch of gradients has none of its own: what
    the dispatcher makes real.
    """
    return (
        not torch.compiler.is_compiling()
        and (x.is_cpu or x.is_cuda)
        and _PLAIN.issuperset(map(type, (x, *tensors)))
        and not any(watches() for watches in _WATCHERS)
        and not any(t.is_neg() or not torch._C._has_storage(t) for t in (x, *tensors) if t is not None)
    )


# fmt: off
def masked_lora(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float,
    a1: Tensor | None, b1: Tensor | None, seeds: Tensor | None, rows: Tensor | None, p: float, backend: str,
) -> Tensor:
    """Run the op of this name; arguments as in its schema."""
    args = (x, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, backend)
    if unseen(x, a, b, ids, offsets, scales, a1, b1, seeds, rows):
        return _run(KERNELS, *_as_linear(*args))
    return torch.ops.s3t.masked_lora(*args)


def masked_lora_linear(
    x: Tensor, weight: Tensor, turned: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, ids: Tensor,
    offsets: Tensor | None, scales: Tensor | None, scale: float, a1: Tensor | None, b1: Tensor | None,
    seeds: Tensor | None, rows: Tensor | None, p: float, mode: str, out_features: int, backend: str,
) -> Tensor:
    """Run the op of this name; arguments as in its schema."""
    args = (
        x, weight, turned, bias, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, mode, out_features, backend,
    )
    if unseen(x, weight, turned, bias, a, b, ids, offsets, scales, a1, b1, seeds, rows):
        return _run(KERNELS, *args)
    return torch.ops.s3t.masked_lora_linear(*args)


def _as_linear(x, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, backend):
    """Give the arguments of ``masked_lora`` as those of a layer without a weight."""
    return x, None, None, None, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, "fast", 0, backend


def _run(ops: Any, *args: Any) -> Tensor:
    """Compute y, by way of autograd where a gradient is wanted; ``ops`` runs the primitives."""
    x, _, _, _, a, b, _, _, _, _, a1, b1, *_ = args
    if ops is not KERNELS:
        _refuse_tangents(x=x, a=a, b=b, a1=a1, b1=b1)
    trained = x.requires_grad or a.requires_grad or b.requires_grad or (
        a1 is not None and (a1.requires_grad or b1.requires_grad)
    )
    if trained and torch.is_grad_enabled():
        return _MaskedLoRA.apply(x, a, b, a1, b1, ops, args)
    if ops is KERNELS:  # nothing of theirs is known to autograd
        return _forward(ops, *args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(ops, *args)[0]


def _refuse_tangents(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and torch._VF._unpack_dual(tensor, level=0)[1] is not None:
            raise NotImplementedError(f"{name}: forward-mode differentiation is not supported; use reverse mode")


def _forward(
    ops, x, weight, turned, bias, a, b, ids, offsets, scales, scale, a1, b1, seeds, rows, p, mode, out_features, wanted
):
    """Compute (y, s)."""
    outputs = check(x, weight, turned, bias, a, b, ids, offsets, scales, a1, b1, seeds, rows, mode, out_features)
    path = path_for(mode, x.device, x.dtype, x.shape[0], wanted, weight is not None and weight.dim() != 2)
    if weight is not None and path.fused:
        return ops.layer(
            x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, outputs, seeds, rows, p, path.backend
        )
    s = ops.shrink(x, a, a1, ids, offsets, scales, scale, seeds, rows, p, path.backend)  # (T, P, r)
    plain = None if weight is None else unpack(weight, outputs, x.shape[1])
    y = x.new_zeros(x.shape[0], outputs) if plain is None else F.linear(x, plain, bias)  # (T, O)
    ops.expand_(y, s, b, b1, ids, offsets, None, None, 0.0, path.backend)
    return y, s


class _MaskedLoRA(torch.autograd.Function):
    """Takes apart what may get a gradient from all the rest, since torch looks at every argument."""

    @staticmethod
    def forward(ctx, x, a, b, a1, b1, ops, args):
        _, weight, turned, _, _, _, ids, offsets, scales, scale, _, _, seeds, rows, p, mode, outputs, wanted = args
        with torch._C._AutoDispatchBelowAutograd():
            y, s = _forward(ops, *args)
        ctx.save_for_backward(s, x, weight, turned, a, b, ids, offsets, scales, a1, b1, seeds, rows)
        ctx.rest = scale, p, mode, outputs, wanted
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # read once: a checkpoint gives them up once
        s, x, weight, turned, a, b, ids, offsets, scales, a1, b1, seeds, rows = saved
        scale, p, mode, outputs, wanted = ctx.rest
        ops = KERNELS if unseen(dy, *saved) else torch.ops.s3t
        drop, no_drop = (seeds, rows, p), (None, None, 0.0)
        fused, backend = path_for(
            mode, x.device, x.dtype, x.shape[0], wanted, weight is not None and weight.dim() != 2
        )
        dy = dy.contiguous()
        ds = ops.shrink(dy, b, b1, ids, offsets, scales, scale, *no_drop, backend)  # (T, P, r)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            if weight is None or not fused:
                dx = torch.zeros_like(x) if weight is None else dy @ unpack(weight, outputs, x.shape[1])  # (T, K)
                ops.expand_(dx, ds, a, a1, ids, offsets, *drop, backend)
            elif turned is not None:
                dx = ops.linear(dy, turned, None, ds, a, a1, ids, offsets, x.shape[1], False, *drop, backend)  # (T, K)
            else:
                dx = ops.linear(dy, weight, None, ds, a, a1, ids, offsets, outputs, True, *drop, backend)  # (T, K)
        first, pool_a, pool_b, at = (0, a, b, 1) if a1 is None else (a.shape[0], a1, b1, 3)
        if ctx.needs_input_grad[at]:
            da = ops.outer(ds, x, ids, offsets, first, pool_a.shape[0], pool_a.dtype, *drop, backend)
        if ctx.needs_input_grad[at + 1]:
            db = ops.outer(s, dy, ids, offsets, first, pool_b.shape[0], pool_b.dtype, *no_drop, backend)
        return (dx, da, db, None, None, None, None) if a1 is None else (dx, None, None, da, db, None, None)
# fmt: on


# --- as torch ops ----------------------------------------------------------------------------------------------------

LIB.define(
    f"masked_lora(Tensor x, Tensor a, Tensor b, {TABLE}, {SCALE}, Tensor? a1, Tensor? b1, {DROP},"
    " str backend) -> Tensor"
)
LIB.define(
    f"masked_lora_linear(Tensor x, Tensor weight, Tensor? turned, Tensor? bias, Tensor a, Tensor b, {TABLE}, {SCALE},"
    f" Tensor? a1, Tensor? b1, {DROP}, str mode, int out_features, str backend) -> Tensor"
)


# fmt: off
def _fake(
    x, weight, turned, bias, a, b, ids, offsets, scales, _, a1, b1, seeds, rows, _p, mode, out_features, _wanted
):
    outputs = check(x, weight, turned, bias, a, b, ids, offsets, scales, a1, b1, seeds, rows, mode, out_features)
    return x.new_empty(x.shape[0], outputs)  # (T, O)
# fmt: on


for _name, _args in (("masked_lora", _as_linear), ("masked_lora_linear", lambda *args: args)):
    LIB.impl(_name, lambda *args, _args=_args: _run(torch.ops.s3t, *_args(*args)), "Autograd")
    LIB.impl(_name, lambda *args, _args=_args: _forward(torch.ops.s3t, *_args(*args))[0], "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", lambda *args, _args=_args: _fake(*_args(*args)), lib=LIB)
