"""The public ops ``masked_lora`` and ``masked_lora_linear``, and ``pack``: what they take, as a user writes it."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from s3t_ext.lora import autograd
from s3t_ext.lora.check import wrong
from s3t_ext.lora.kernels import IMPLS, TYPES, backend_for, native
from s3t_ext.lora.kernels.paths import EXACT, MODES, path_for
from s3t_ext.lora.kernels.reference import unpack


class Packed(NamedTuple):
    """A frozen weight (O, K) in panels of 32 outputs, as ``pack`` returned it. Its owner overwrites it when it dies."""

    panels: Tensor  # (ceil(O / 32), K, 32), in bf16 (ceil(O / 32), ceil(K / 2), 32, 2)
    out_features: int
    in_features: int
    turned: Tensor | None = None  # panels of the transposed weight, for the gradient of x


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
        ``weight`` afterwards: its owner may drop it. Nothing else is allocated.
    """
    if not isinstance(weight, Tensor):
        raise wrong("weight", "a contiguous tensor (O, K), as linear.weight is", type(weight))
    if weight.dim() != 2 or not weight.is_contiguous():
        raise wrong("weight", "a contiguous matrix (O, K)", weight)
    if weight.device.type != "cpu":
        raise NotImplementedError(f"weight: panels are for the CPU; on {weight.device} pass the plain weight")
    lay_out = IMPLS["pack"][backend_for("pack", weight.device, weight.dtype)]
    weight, (outputs, inputs) = weight.detach().resolve_neg(), weight.shape
    return Packed(lay_out(weight), outputs, inputs, lay_out(weight.t()) if backward else None)


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
    _tensors(("x", x), ("a", a), ("b", b), ("adapter_ids", adapter_ids), ("offsets", offsets))
    a1, b1 = (None, None) if train is None else _pools(train)
    seeds, rows, p = (None, None, 0.0) if dropout is None else _dropout(dropout)
    scales, number = _scale(scale, p, a, a1)
    dtype = _autocast_type(x)
    if dtype is not None:
        x, a, b = x.to(dtype), _cast_pool(a, dtype), _cast_pool(b, dtype)
        a1, b1 = (None, None) if a1 is None or b1 is None else (_cast_pool(a1, dtype), _cast_pool(b1, dtype))
    return autograd.masked_lora(x, a, b, adapter_ids, offsets, scales, number, a1, b1, seeds, rows, p, backend)


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
    if dropout is None and backend in ("", "native"):
        y = direct(x, weight, bias, a, b, adapter_ids, offsets, scale, train, mode)
        if y is not None:
            return y
    _tensors(("x", x), ("bias", bias), ("a", a), ("b", b), ("adapter_ids", adapter_ids), ("offsets", offsets))
    if not isinstance(mode, str):
        raise wrong("mode", f"one of {MODES}", repr(mode))
    if isinstance(weight, Packed):
        panels, out_features, in_features, turned = weight
        if x.shape[-1:] != (in_features,):  # panels cannot tell: in bf16 they have even numbers of columns
            raise wrong("x", f"(T, {in_features}), as wide as the weight's rows", x)
    elif isinstance(weight, Tensor) and weight.dim() == 2:
        panels, out_features, turned = weight, weight.shape[0], None
    else:
        got = weight if isinstance(weight, Tensor) else type(weight)
        raise wrong("weight", "a matrix (O, K), or the Packed that pack() returned", got)
    a1, b1 = (None, None) if train is None else _pools(train)
    seeds, rows, p = (None, None, 0.0) if dropout is None else _dropout(dropout)
    scales, number = _scale(scale, p, a, a1)
    if panels.requires_grad or (bias is not None and bias.requires_grad):
        _frozen(weight=panels, bias=bias)
    dtype = _autocast_type(x)
    if dtype is not None:
        if panels.dim() != 2 and panels.dtype != dtype:  # panels are laid out for their own type
            panels, turned = unpack(panels, out_features, in_features).contiguous(), None
        x, panels, bias = x.to(dtype), panels.to(dtype), None if bias is None else bias.to(dtype)
        a, b = _cast_pool(a, dtype), _cast_pool(b, dtype)
        a1, b1 = (None, None) if a1 is None or b1 is None else (_cast_pool(a1, dtype), _cast_pool(b1, dtype))
    # fmt: off
    return autograd.masked_lora_linear(
        x, panels, turned, bias, a, b, adapter_ids, offsets, scales, number, a1, b1, seeds, rows, p, mode, out_features,
        backend,
    )
    # fmt: on


def direct(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    offsets: Tensor | None,
    scale: float | Tensor,
    train: tuple[Tensor, Tensor] | None,
    mode: str,
    matrix: bool = True,
) -> Tensor | None:
    """Run ``masked_lora_linear`` in one step, if that can be: on the CPU, with no gradient wanted and nobody watching.

    Args:
        matrix: False: x (..., K) may have any number of dimensions from 2, contiguous if more; y is then (..., O).

    Returns:
        y: the same bits as by the op; None: not in one step, and perhaps not at all.
    """
    if torch.compiler.is_compiling():  # the compiler records an op
        return None
    packed = type(weight) is Packed and weight.out_features is not None
    if mode != "exact" and not (mode == "fast" and (packed or _whole(x))):
        return None
    panels, out_features, in_features, turned = weight if packed else (weight, None, None, None)
    a1, b1 = (None, None) if train is None else _pools(train)
    # fmt: off
    return native.direct(
        x, panels, turned, bias, a, b, adapter_ids, offsets, scale, a1, b1, out_features, in_features,
        native.team.threads or 0, matrix,
    )
    # fmt: on


def _whole(x: Tensor) -> bool:
    """Tell whether mode ``fast`` takes the whole layer to the native kernels, on the CPU and with a plain weight."""
    if not isinstance(x, Tensor) or not x.is_cpu or x.dtype not in TYPES:
        return False
    return path_for("fast", x.device, x.dtype, x.shape[:-1].numel()) == EXACT["cpu"]


def _tensors(*arguments: tuple[str, object]) -> None:
    for name, value in arguments:
        if not isinstance(value, Tensor) and (value is not None or name not in ("offsets", "bias")):
            raise wrong(name, "a tensor", type(value))


def _frozen(**arguments: Tensor | None) -> None:
    for name, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise wrong(name, "a frozen tensor", f"one that requires gradients; call {name}.requires_grad_(False)")


def _pools(train: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    pair = isinstance(train, (tuple, list)) and len(train) == 2 and all(isinstance(t, Tensor) for t in train)
    if not pair:
        raise wrong("train", "a pair (a1, b1) of tensors", type(train))
    return train[0], train[1]


def _dropout(dropout: tuple[float, Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None, float]:
    triple = isinstance(dropout, (tuple, list)) and len(dropout) == 3
    if not triple or not isinstance(dropout[0], (int, float)) or not all(isinstance(t, Tensor) for t in dropout[1:]):
        raise wrong("dropout", "(p, seed (G,) int64, rows (T,) int64)", type(dropout))
    p, seeds, rows = dropout
    if not 0 <= p < 1:
        raise wrong("dropout[0]", "a probability 0 <= p < 1", p)
    return (seeds, rows, float(p)) if p else (None, None, 0.0)


def _scale(scale: float | Tensor, p: float, a: Tensor, a1: Tensor | None) -> tuple[Tensor | None, float]:
    """Split a scale in (tensor, number); the trainable adapters' take up the factor 1 / (1 - p) of dropout."""
    if not isinstance(scale, (float, int, Tensor, Real)):
        raise wrong("scale", "a number or a tensor", type(scale))
    factor = 1 / (1 - p)
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
    kind = "cpu" if x.is_cpu else x.device.type  # a name of a device costs as much as four other attributes
    if not (x.is_cpu or torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def _cast_pool(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a pool under autocast unless it is fp32: the kernels round that once on reading, gradients stay fp32."""
    return t if t.dtype == torch.float32 else t.to(dtype)
