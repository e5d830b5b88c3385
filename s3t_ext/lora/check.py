"""What the two ops accept: shapes and types, checked once for the public call and the fake, and values on the CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from s3t_ext.lora.kernels.paths import MODES
from s3t_ext.lora.kernels.reference import LANES


def want(ok: bool, name: str, wanted: str, got: object) -> None:
    """Raise the ValueError that names an argument, what was wanted and what came; a tensor is told by its shape."""
    if not ok:
        if isinstance(got, Tensor):
            got = f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')} on {got.device}"
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def check(
    x: Tensor,
    weight: Tensor | None,
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
    p: float,
    mode: str,
    out_features: int,
) -> int:
    """Check shapes, types and devices of either op; return the number of outputs O."""
    want(x.dim() == 2, "x", "a matrix (T, K)", x)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise NotImplementedError(f"x: {x.dtype} is not supported; use float32, float16, bfloat16 or float64")
    want(
        x.shape[1] < 2 or x.stride(1) == 1,
        "x",
        "a contiguous last dimension",
        f"strides {tuple(x.stride())}",
    )
    want(mode in MODES, "mode", f"one of {MODES}", repr(mode))
    want(a.dim() == 3, "a", "(N, r, K)", a)
    want(b.dim() == 3, "b", "(N, r, O)", b)
    outputs = out_features if weight is not None else b.shape[2]
    if weight is not None:
        _check_weight(x, weight, bias, outputs)
    _check_pool("a", a, x, (a.shape[0], a.shape[1], x.shape[1]))
    _check_pool("b", b, x, (a.shape[0], a.shape[1], outputs))
    adapters = a.shape[0]
    if a1 is not None and b1 is not None:
        want(a1.dim() == 3, "train[0]", "(M, r, K)", a1)
        _check_pool("train[0]", a1, x, (a1.shape[0], a.shape[1], x.shape[1]))
        _check_pool("train[1]", b1, x, (a1.shape[0], a.shape[1], outputs))
        adapters += a1.shape[0]
    want(
        ids.dim() == 2 and ids.dtype == torch.int32 and ids.device == x.device,
        "adapter_ids",
        f"(G, P) int32 on {x.device}",
        ids,
    )
    if offsets is None:
        want(ids.shape[0] == 1, "adapter_ids", "one row (G = 1) where offsets is None", ids)
    else:
        want(
            offsets.shape == (ids.shape[0] + 1,)
            and offsets.dtype == torch.int32
            and offsets.device == x.device
            and offsets.is_contiguous(),
            "offsets",
            f"({ids.shape[0] + 1},) contiguous int32 on {x.device}",
            offsets,
        )
    if scales is not None:
        want(
            scales.shape == (adapters,)
            and scales.dtype == torch.float32
            and scales.device == x.device
            and scales.is_contiguous(),
            "scale",
            f"a number or ({adapters},) contiguous float32 on {x.device}",
            scales,
        )
    if seeds is not None and rows is not None:
        want(0 <= p < 1, "dropout[0]", "a probability 0 <= p < 1", p)
        _check_keys("dropout[1]", "G", seeds, ids.shape[0], x)
        _check_keys("dropout[2]", "T", rows, x.shape[0], x)
    return outputs


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> None:
    shape = (outputs, x.shape[1]) if weight.dim() == 2 else (-(-outputs // LANES), x.shape[1], LANES)
    want(
        weight.shape == shape and weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous(),
        "weight",
        f"{shape} contiguous {x.dtype} on {x.device}, or what pack() returned",
        weight,
    )
    if bias is not None:
        want(
            bias.shape == (outputs,) and bias.dtype == x.dtype and bias.device == x.device and bias.is_contiguous(),
            "bias",
            f"({outputs},) contiguous {x.dtype} on {x.device}",
            bias,
        )


def _check_pool(name: str, pool: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    want(
        pool.shape == shape
        and pool.dtype in (x.dtype, torch.float32)
        and pool.device == x.device
        and pool.is_contiguous(),
        name,
        f"{shape} contiguous {x.dtype} or float32 on {x.device}",
        pool,
    )


def _check_keys(name: str, size: str, keys: Tensor, count: int, x: Tensor) -> None:
    want(
        keys.shape == (count,) and keys.dtype == torch.int64 and keys.device == x.device and keys.is_contiguous(),
        name,
        f"({size},) = ({count},) contiguous int64 on {x.device}",
        keys,
    )


def check_values(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int) -> None:
    """Check what only a look at the numbers shows; on the CPU, where it costs no synchronisation."""
    if ids.device.type != "cpu":
        return
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < adapters):
        raise ValueError(
            f"adapter_ids: expected -1 (masked) or 0..{adapters - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    if offsets is not None:
        edges = offsets.tolist()
        if edges[0] != 0 or edges[-1] != rows or any(lo > hi for lo, hi in itertools.pairwise(edges)):
            raise ValueError(f"offsets: expected ascending numbers from 0 to T = {rows}, got {edges[:4]}..{edges[-1]}")
