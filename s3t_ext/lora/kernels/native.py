"""The primitives in C++ and CUDA (csrc/): allocates results and passes raw pointers to ``s3t_ext._native``.

Arguments are taken as checked by ``s3t_ext.lora.ops``; each function has the signature of its twin in ``reference``.
On the CPU every type runs on every instruction set. On CUDA the plain (O, K) weight is served only.

Order of sums, in fp32: blocks of 256 terms in ascending order, inside a block one chain of fused multiply-adds from +0,
the blocks added in order to a total from +0. Each live slot is a block of its own after the base; dead slots are never
read. fp16 and bf16 are converted exactly on reading and rounded once, to nearest even, on writing; NaN stays NaN, its
payload is not defined. A bit of a row (or of an adapter's gradient) thus depends on that row's (or adapter's) own terms
and on nothing else: not on the batch, the other groups, the threads or the instruction set. In bf16 the terms of a pair
(2i, 2i + 1) are added second first, as VDPBF16PS does; where that instruction is used (set avx512_bf16), numbers below
2^-126 count as zero, in its inputs and in its sums: among such small numbers the sets differ.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout

_native: Any = None
AVAILABLE, WHY_NOT = True, ""
try:
    # After torch: the kernels join the thread team that torch brought along.
    _native = importlib.import_module("s3t_ext._native")
    if not hasattr(_native, "direct"):
        raise ImportError("it was built from older sources")
except ImportError as error:
    AVAILABLE = False
    WHY_NOT = (
        f"the compiled module s3t_ext._native did not load ({error}); install the package again with a C++17 compiler"
        " on PATH (pip install --force-reinstall --no-deps .), or go on with the slower reference backend"
    )

CUDA = AVAILABLE and bool(_native.build_info()["cuda"])
ATTENDS = AVAILABLE and hasattr(_native, "attend")  # not in builds of a day ago


class _Team(threading.local):
    """Threads of the kernels, where a thread has pinned torch's own operators to another number."""

    threads: int | None = None


team = _Team()

_PANEL = 32
_CPU = torch.device("cpu")
_NONE = (0, 0, 0, 0)  # no dropout
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def attach(watchers: tuple[Callable[[], Any], ...]) -> None:
    """Tell the compiled module what ``direct`` needs of torch; ``watchers``: what must all be false for it to run."""
    if AVAILABLE:
        _native.attach(Tensor, torch.nn.Parameter, watchers, torch.is_grad_enabled, torch.get_num_threads)


def _declined(*_: Any) -> None:
    pass


# Runs ``layer`` of arguments that nobody has checked, or returns None: see csrc/direct.cpp.
direct: Callable[..., Tensor | None] = _native.direct if AVAILABLE else _declined


def build_info() -> dict[str, Any]:
    """Describe the compiled module.

    Returns:
        compiler, cuda (version compiled with, "" if none), cuda_archs, isa (selected, "" if S3T_CPU is bad), isas (what
        runs here), threads (path of the library whose thread team is joined, "" if none).
    """
    _require("build_info", None)
    return _native.build_info()


def _require(op: str, tensor: Tensor | None) -> None:
    if not AVAILABLE:
        raise NotImplementedError(f"{op}: {WHY_NOT}")
    if tensor is None or (tensor.device == _CPU and tensor.dtype in _TYPES):
        return
    if tensor.dtype not in _TYPES:
        raise NotImplementedError(f"{op}: the native backend has float32, float16 and bfloat16, not {tensor.dtype}")
    if tensor.device.type != "cpu" and not (tensor.device.type == "cuda" and CUDA and op != "pack"):
        served = "CPU and CUDA" if CUDA and op != "pack" else "the CPU"
        raise NotImplementedError(f"{op}: the native backend, as built here, serves {served}, not {tensor.device.type}")
    if tensor.device.type == "cuda" and (found := _capability(tensor.device)) < (8, 0):
        raise NotImplementedError(
            f"{op}: the native backend serves CUDA devices of compute capability 8.0 and newer,"
            f" not {found[0]}.{found[1]}; backend='reference' serves all of them"
        )


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _where(tensor: Tensor) -> tuple[int, int, int]:
    """Threads, device (-1: the CPU) and stream of a launch."""
    if tensor.is_cpu:
        return team.threads or torch.get_num_threads(), -1, 0
    return 1, tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride()[0], _TYPES[t.dtype]


def _pools(w: Tensor, w1: Tensor | None) -> tuple[int, ...]:
    n, rank, dim = w.shape
    if w1 is None:
        return w.data_ptr(), 0, n, 0, rank, dim, _TYPES[w.dtype], 0
    return w.data_ptr(), w1.data_ptr(), n, w1.shape[0], rank, dim, _TYPES[w.dtype], _TYPES[w1.dtype]


def _table(ids: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    groups, slots = ids.shape
    return ids.data_ptr(), *ids.stride(), _pointer(offsets), groups, slots


def _dropout(drop: Dropout | None) -> tuple[int, ...]:
    return _NONE if drop is None else (drop.seeds.data_ptr(), drop.rows.data_ptr(), drop.threshold, drop.first)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def check_values(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int) -> bool:
    """Tell whether all ids are -1 or name one of the adapters, and the offsets ascend from 0 to the number of rows."""
    return _native.check_values(_table(ids, offsets), rows, adapters)


def shrink(
    u: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Project rows onto their adapters: s[t,p,j] = scale[n] * sum_d w[n,j,d] u[t,d]; exactly 0 in a dead slot.

    Args:
        u: (T, D), fp32, fp16 or bf16; the last dimension contiguous.
        w, w1: (N, r, D) and (M, r, D) or None; type of ``u``, or fp32 (rounded once to the type of ``u`` on reading).
        ids: (G, P) int32, any strides; n = ids[group(t), p] is dead outside 0..N+M-1.
        offsets: (G+1,) int32, or None for one group of all rows.
        scales: (N+M,) fp32, or None for the number ``scale``.
        drop: selects elements of ``u``, for each slot on its own; or None.

    Returns:
        s: (T, P, r), type of ``u``.

    Notes:
        The fp32 sum is scaled in fp32 and rounded once. On CUDA the launch is on the current stream of u's device.
    """
    _require("shrink", u)
    rows, table, pools = u.shape[0], _table(ids, offsets), _pools(w, w1)
    s = u.new_empty(rows, table[5], pools[4])  # (T, P, r)
    _native.shrink(
        rows, _matrix(u), s.data_ptr(), pools, table, _pointer(scales), scale, _dropout(drop), _where(u),
    )  # fmt: skip
    return s


def expand_(
    y: Tensor, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None,
    drop: Dropout | None = None,
) -> None:  # fmt: skip
    """Add the adapters' part in place: y[t] += sum_p sum_j s[t,p,j] w[n,j], rounded once.

    Args:
        y: (T, D), fp32, fp16 or bf16, changed in place; the last dimension contiguous.
        s: (T, P, r), type of ``y``.
        w, w1, ids, offsets: as in ``shrink``.
        drop: selects, for each slot, the elements of y that it adds to; or None.

    Notes:
        The slots are summed first, then y + total is rounded once. A row without a live slot is not touched.
    """
    _require("expand_", y)
    _native.expand(y.shape[0], _matrix(y), s.data_ptr(), _pools(w, w1), _table(ids, offsets), _dropout(drop), _where(y))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor,
    offsets: Tensor | None, out_features: int, transposed: bool, drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum base product and adapters in one accumulator: y = x W^T + sum_p s_p w_n + bias, or x W if transposed.

    Args:
        x: (T, K), transposed: (T, O); fp32, fp16 or bf16; the last dimension contiguous.
        weight: (O, K), or panels as ``pack`` returned them; type of ``x``.
        bias: (O,), transposed: (K,); type of ``x``, or None.
        s: (T, P, r), type of ``x``.
        w, w1: (N, r, D) and (M, r, D) or None, D the width of the result; ids, offsets: as in ``shrink``.
        out_features: O, also where the result is (T, K).
        drop: as in ``expand_``.

    Returns:
        y: (T, O), transposed: (T, K); type of ``x``.

    Notes:
        Plain and packed weights give the same bits. Rounded once, after the bias.
    """
    _require("linear", x)
    y = x.new_empty(x.shape[0], w.shape[2])  # (T, O), transposed: (T, K)
    _native.linear(
        x.shape[0], x.shape[1], y.shape[1], _matrix(x), _matrix(y), weight.data_ptr(), weight.dim() != 2, transposed,
        _pointer(bias), s.data_ptr(), _pools(w, w1), _table(ids, offsets), _dropout(drop), _where(x),
    )  # fmt: skip
    return y


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, a1: Tensor | None, b: Tensor, b1: Tensor | None,
    ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float, out_features: int,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the whole forward of a layer in one call: s = shrink(x, a), then y = linear(x, weight, bias, s, b).

    Args:
        x, weight, bias, out_features: as in ``linear``; a, a1: pools of ``shrink``; b, b1: pools of ``linear``.
        ids, offsets, scales, scale, drop: as in ``shrink``.

    Returns:
        y: (T, O); s: (T, P, r); the bits of the two calls.

    Notes:
        On CUDA of sm_90 or newer the base product runs while the shrink is still under way.
    """
    _require("layer", x)
    (rows, inner), table, down = x.shape, _table(ids, offsets), _pools(a, a1)
    s = x.new_empty(rows, table[5], down[4])  # (T, P, r)
    y = x.new_empty(rows, out_features)  # (T, O)
    _native.layer(
        rows, inner, out_features, _matrix(x), (y.data_ptr(), out_features, _TYPES[x.dtype]), weight.data_ptr(),
        weight.dim() != 2, _pointer(bias), s.data_ptr(), down, _pools(b, b1), table, _pointer(scales), scale,
        _NONE if drop is None else _dropout(drop), _where(x),
    )  # fmt: skip
    return y, s


def outer(
    s: Tensor, u: Tensor, ids: Tensor, offsets: Tensor | None, first: int, count: int, dtype: torch.dtype,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum outer products by adapter: dw[n - first] = sum over every (g, p) with ids[g, p] = n of s[t,p]^T u[t].

    Args:
        s: (T, P, r), type of ``u``.
        u: (T, D), fp32, fp16 or bf16; the last dimension contiguous.
        ids, offsets: as in ``shrink``.
        first, count: the adapters first..first+count-1 get a gradient.
        dtype: fp32, or the type of ``u``.
        drop: selects elements of ``u``, for each slot on its own; or None.

    Returns:
        dw: (count, r, D), zero for adapters that no group names.

    Notes:
        Occurrences by ascending g, then p; rows of each in blocks of 256 counted from the first row of its group.
    """
    _require("outer", u)
    dw = u.new_empty(count, s.shape[2], u.shape[1], dtype=dtype)  # (count, r, D)
    args = (
        *u.shape, s.shape[2], first, count, _matrix(u), s.data_ptr(), _table(ids, offsets), _dropout(drop),
        dw.data_ptr(), _TYPES[dtype],
    )  # fmt: skip
    size = _native.outer_workspace(*args) if u.device.type == "cuda" else 0
    workspace = u.new_empty(size, dtype=torch.uint8) if size else None
    _native.outer(*args, _pointer(workspace), _where(u))
    return dw


def pack(weight: Tensor) -> Tensor:
    """Lay a weight out in panels of 32 outputs: panels[i,k,c] = weight[32 i + c, k], zero past the last output.

    In bf16, whose products the processor adds in pairs, two k lie side by side: panels[i, k // 2, c, k % 2].

    Args:
        weight: (O, K), any strides; fp32, fp16 or bf16.

    Returns:
        panels: (ceil(O/32), K, 32), in bf16 (ceil(O/32), ceil(K/2), 32, 2); same type.
    """
    _require("pack", weight)
    out, width = weight.shape
    shape = (-(-width // 2), _PANEL, 2) if weight.dtype == torch.bfloat16 else (width, _PANEL)
    panels = weight.new_empty(-(-out // _PANEL), *shape)  # (ceil(O/32), K, 32) or (ceil(O/32), ceil(K/2), 32, 2)
    _native.pack(
        out, width, weight.data_ptr(), *weight.stride(), panels.data_ptr(), _TYPES[weight.dtype], _where(weight)[0]
    )
    return panels


def _heads(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else (t.data_ptr(), *t.stride()[:3])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, mask: Tensor | None, stats: Tensor, scale: float,
    grads: tuple[Tensor | None, ...], starts: Tensor | None, causal: bool,
) -> None:  # fmt: skip
    _require("attention", q)
    records, heads, rows, dim = q.shape
    records = records if starts is None else len(starts) - 1
    hidden = (0, 0, 0) if mask is None else (mask.data_ptr(), mask.stride()[0], mask.stride()[2])
    _native.attend(
        (records, heads, k.shape[1], rows, k.shape[2], dim), _TYPES[q.dtype], *map(_heads, (q, k, v, y)), hidden,
        stats.data_ptr(), scale, *map(_heads, grads), (_pointer(starts), causal),
        grads[0] is not None, _where(q)[0],
    )  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, starts: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix values for each head: y = softmax(scale q k^T + mask) v.

    Args:
        q: (n, h, s, d), fp32, fp16 or bf16, any strides, the last dimension contiguous; k, v: (n, h', t, d), h' a
            divisor of h: each head serves h / h' of q's in turn.
        mask: (n, 1, s, t) fp32, added to the scores; stride 0 where it is the same; the last dimension contiguous.
        starts: (records + 1,) int64, ascending from 0: q, k and v are then (1, h or h', T, d), all tokens of all
            records, of which record i owns those from starts[i] to starts[i + 1] - 1; no mask.
        causal: a query sees no key past its own place.

    Returns:
        y: (n, h, s, d), a view of a contiguous (n, s, h, d); type of ``q``.
        stats: (n, h, s, 2) fp32, of the scores of each query: 1 / sum of exponentials, and the greatest.

    Notes:
        All in fp32, rounded once at the end. The bits of a record depend on that record alone.
    """
    records, heads, rows, dim = q.shape
    y = q.new_empty(records, rows, heads, dim).transpose(1, 2)  # (n, h, s, d)
    stats = q.new_empty(records, heads, rows, 2, dtype=torch.float32)
    _attention(q, k, v, y, mask, stats, scale, (None, None, None), starts, causal)
    return y, stats


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, stats: Tensor, grad: Tensor,
    starts: Tensor | None = None, causal: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Give the gradients of q, k and v, in their shapes, as views of (n, s or t, heads, d); scores are made again.

    Args:
        grad: (n, h, s, d), of y; any strides, the last dimension contiguous. The others: as in ``attention``.
    """
    grads = tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    _attention(q, k, v, grad, mask, stats, scale, grads, starts, causal)
    return grads
