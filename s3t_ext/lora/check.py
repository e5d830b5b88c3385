"""What the two ops accept: shapes and types, checked once for the public call and the fake, and values on the CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from s3t_ext.lora.kernels.paths import MODES
from s3t_ext.lora.kernels.reference import LANES


def wrong(name: str, wanted: str, got: object) -> ValueError:
    """Make the error that names an argument, what was wanted and what came; a tensor is told by its shape."""
    if isinstance(got, Tensor):
        laid = "" if got.is_contiguous() else f" with strides {got.stride()}"
        got = f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')} on {got.device}{laid}"
    return ValueError(f"{name}: expected {wanted}, got {got}")


def check(
    x: Tensor,
    weight: Tensor | None,
    turned: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    a1: Tensor | None,
    b1: Tensor | None,
    seeds: Tensor | None,
    rows: Tensor | None,
    mode: str,
    out_features: int,
) -> int:
    """Check shapes, types and devices of either op; return the number of outputs O."""
    if x.dim() != 2:
        raise wrong("x", "a matrix (T, K)", x)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise NotImplementedError(f"x: {x.dtype} is not supported; use float32, float16, bfloat16 or float64")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise wrong("x", "a contiguous last dimension", f"strides {tuple(x.stride())}")
    if mode not in MODES:
        raise wrong("mode", f"one of {MODES}", repr(mode))
    for name, pool, width in (("a", a, "K"), ("b", b, "O")):
        if pool.dim() != 3:
            raise wrong(name, f"(N, r, {width})", pool)
    adapters, rank, inputs = a.shape[0], a.shape[1], x.shape[1]
    if weight is not None and weight.dim() not in (2, 3):
        raise wrong("weight", "a matrix (O, K), or what pack() returned", weight)
    if weight is not None and weight.shape[1] != inputs:
        raise wrong("x", f"(T, {weight.shape[1]}), as wide as the weight's rows", x)
    outputs = out_features if weight is not None else b.shape[2]
    if weight is not None:
        _check_weight(x, weight, turned, bias, outputs)
    _check_pool("a", a, x, (adapters, rank, inputs))
    _check_pool("b", b, x, (adapters, rank, outputs))
    if a1 is not None and b1 is not None:
        if a1.dim() != 3:
            raise wrong("train[0]", "(M, r, K)", a1)
        _check_pool("train[0]", a1, x, (a1.shape[0], rank, inputs))
        _check_pool("train[1]", b1, x, (a1.shape[0], rank, outputs))
        adapters += a1.shape[0]
    if ids.dim() != 2 or ids.dtype != torch.int32 or ids.device != x.device:
        raise wrong("adapter_ids", f"(G, P) int32 on {x.device}", ids)
    if offsets is None:
        if ids.shape[0] != 1:
            raise wrong("adapter_ids", "one row (G = 1) where offsets is None", ids)
    elif not _is(offsets, (ids.shape[0] + 1,), torch.int32, x):
        raise wrong("offsets", f"({ids.shape[0] + 1},) contiguous int32 on {x.device}", offsets)
    if scales is not None and not _is(scales, (adapters,), torch.float32, x):
        raise wrong("scale", f"a number or ({adapters},) contiguous float32 on {x.device}", scales)
    if seeds is not None and not _is(seeds, (ids.shape[0],), torch.int64, x):
        raise wrong("dropout[1]", f"(G,) = ({ids.shape[0]},) contiguous int64 on {x.device}", seeds)
    if rows is not None and not _is(rows, (x.shape[0],), torch.int64, x):
        raise wrong("dropout[2]", f"(T,) = ({x.shape[0]},) contiguous int64 on {x.device}", rows)
    return outputs


def _is(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> bool:
    return t.shape == shape and t.dtype == dtype and t.device == x.device and t.is_contiguous()


def _panels(out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of what pack() makes of a weight (O, K)."""
    return -(-out_features // LANES), in_features, LANES


def _check_weight(x: Tensor, weight: Tensor, turned: Tensor | None, bias: Tensor | None, outputs: int) -> None:
    shape = (outputs, x.shape[1]) if weight.dim() == 2 else _panels(outputs, x.shape[1])
    if not _is(weight, shape, x.dtype, x):
        raise wrong("weight", f"{shape} contiguous {x.dtype} on {x.device}, or what pack() returned", weight)
    if turned is not None and not _is(turned, _panels(x.shape[1], outputs), x.dtype, x):
        raise wrong("weight", "what pack() returned, unchanged", turned)
    if weight.dim() != 2 and x.device.type != "cpu":
        raise wrong("weight", "a plain (O, K) weight on a device: panels are for the CPU", weight)
    if bias is not None and not _is(bias, (outputs,), x.dtype, x):
        raise wrong("bias", f"({outputs},) contiguous {x.dtype} on {x.device}", bias)


def _check_pool(name: str, pool: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not (_is(pool, shape, x.dtype, x) or _is(pool, shape, torch.float32, x)):
        types = "float32" if x.dtype == torch.float32 else f"{str(x.dtype).removeprefix('torch.')} or float32"
        raise wrong(name, f"{shape} contiguous {types} on {x.device}", pool)


def check_values(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int) -> None:
    """Check what only a look at the numbers shows; on the CPU, where it costs no synchronisation."""
    if ids.device.type != "cpu":
        return
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < adapters):
        got = f"{int(ids.min())}..{int(ids.max())}"
        raise wrong("adapter_ids", f"-1 (masked) or 0..{adapters - 1}", got)
    if offsets is not None:
        edges = offsets.tolist()
        if edges[0] != 0 or edges[-1] != rows or any(lo > hi for lo, hi in itertools.pairwise(edges)):
            raise wrong("offsets", f"ascending numbers from 0 to T = {rows}", f"{edges[:4]}..{edges[-1]}")
