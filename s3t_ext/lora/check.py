"""What the two ops accept: shapes and types, checked once for the public call and the fake, and values on the CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from s3t_ext.lora.kernels import native
from s3t_ext.lora.kernels.paths import MODES
from s3t_ext.lora.kernels.reference import LANES

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    size, dtype, device = x.shape, x.dtype, x.device  # read once: an attribute of a tensor costs as much as a call
    if len(size) != 2:
        raise wrong("x", "a matrix (T, K)", x)
    if dtype not in _TYPES:
        raise NotImplementedError(f"x: {dtype} is not supported; use float32, float16, bfloat16 or float64")
    inputs = size[1]
    if inputs > 1 and x.stride()[1] != 1:
        raise wrong("x", "a contiguous last dimension", f"strides {tuple(x.stride())}")
    if mode not in MODES:
        raise wrong("mode", f"one of {MODES}", repr(mode))
    pool = a.shape
    if len(pool) != 3:
        raise wrong("a", "(N, r, K)", a)
    if b.dim() != 3:
        raise wrong("b", "(N, r, O)", b)
    adapters, rank, _ = pool
    outputs = b.shape[2] if weight is None else out_features
    if weight is not None:
        _check_weight(x, weight, turned, bias, (outputs, inputs), dtype, device)
    if not _is(a, (adapters, rank, inputs), dtype, device):
        _check_pool("a", a, (adapters, rank, inputs), dtype, device)
    if not _is(b, (adapters, rank, outputs), dtype, device):
        _check_pool("b", b, (adapters, rank, outputs), dtype, device)
    if a1 is not None and b1 is not None:
        if a1.dim() != 3:
            raise wrong("train[0]", "(M, r, K)", a1)
        _check_pool("train[0]", a1, (a1.shape[0], rank, inputs), dtype, device)
        _check_pool("train[1]", b1, (a1.shape[0], rank, outputs), dtype, device)
        adapters += a1.shape[0]
    table = ids.shape
    if len(table) != 2 or ids.dtype != torch.int32 or ids.device != device:
        raise wrong("adapter_ids", f"(G, P) int32 on {device}", ids)
    groups = table[0]
    if offsets is None:
        if groups != 1:
            raise wrong("adapter_ids", "one row (G = 1) where offsets is None", ids)
    elif not _is(offsets, (groups + 1,), torch.int32, device):
        raise wrong("offsets", f"({groups + 1},) contiguous int32 on {device}", offsets)
    if scales is not None and not _is(scales, (adapters,), torch.float32, device):
        raise wrong("scale", f"a number or ({adapters},) contiguous float32 on {device}", scales)
    if seeds is not None and not _is(seeds, (groups,), torch.int64, device):
        raise wrong("dropout[1]", f"(G,) = ({groups},) contiguous int64 on {device}", seeds)
    if rows is not None and not _is(rows, (size[0],), torch.int64, device):
        raise wrong("dropout[2]", f"(T,) = ({size[0]},) contiguous int64 on {device}", rows)
    return outputs


def _is(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return t.dtype is dtype and t.shape == shape and t.device == device and t.is_contiguous()


def _panels(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of what pack() makes of a weight (O, K)."""
    panel = (-(-in_features // 2), LANES, 2) if dtype == torch.bfloat16 else (in_features, LANES)
    return -(-out_features // LANES), *panel


def _check_weight(
    x: Tensor,
    weight: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    outputs, inputs = sizes
    packed = weight.dim() != 2
    shape = _panels(outputs, inputs, dtype) if packed else sizes
    if not _is(weight, shape, dtype, device):
        if weight.dim() not in (2, 3, 4):
            raise wrong("weight", "a matrix (O, K), or what pack() returned", weight)
        if weight.dim() < 4 and weight.shape[1] != inputs:
            raise wrong("x", f"(T, {weight.shape[1]}), as wide as the weight's rows", x)
        if packed and weight.dtype != dtype:
            had, has = (str(t).removeprefix("torch.") for t in (weight.dtype, dtype))
            raise ValueError(f"weight: packed as {had}, x is {has}; give pack(weight.to({dtype}))")
        raise wrong("weight", f"{shape} contiguous {dtype} on {device}, or what pack() returned", weight)
    if turned is not None and not _is(turned, _panels(inputs, outputs, dtype), dtype, device):
        raise wrong("weight", "what pack() returned, unchanged", turned)
    if packed and not weight.is_cpu:
        raise wrong("weight", "a plain (O, K) weight on a device: panels are for the CPU", weight)
    if bias is not None and not _is(bias, (outputs,), dtype, device):
        raise wrong("bias", f"({outputs},) contiguous {dtype} on {device}", bias)


def _check_pool(name: str, pool: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not (_is(pool, shape, dtype, device) or _is(pool, shape, torch.float32, device)):
        types = "float32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} or float32"
        raise wrong(name, f"{shape} contiguous {types} on {device}", pool)


def check_values(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int) -> None:
    """Check what only a look at the numbers shows; on the CPU, where it costs no synchronisation."""
    if not ids.is_cpu or (native.AVAILABLE and native.check_values(ids, offsets, rows, adapters)):
        return
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < adapters):
        got = f"{int(ids.min())}..{int(ids.max())}"
        raise wrong("adapter_ids", f"-1 (masked) or 0..{adapters - 1}", got)
    if offsets is not None:
        edges = offsets.tolist()
        if edges[0] != 0 or edges[-1] != rows or any(lo > hi for lo, hi in itertools.pairwise(edges)):
            raise wrong("offsets", f"ascending numbers from 0 to T = {rows}", f"{edges[:4]}..{edges[-1]}")
