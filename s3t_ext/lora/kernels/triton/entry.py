"""The primitives as Triton kernels: on CUDA, and on the CPU where Triton's interpreter is on (TRITON_INTERPRET=1).

Each function has the signature of its twin in ``reference``; Triton itself is imported by the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout

AVAILABLE = importlib.util.find_spec("triton") is not None
WHY_NOT = "" if AVAILABLE else "triton is not installed; a torch built for CUDA on Linux brings it along"


def serves(device: str, dtype: torch.dtype) -> bool:
    """Tell whether the kernels run on this kind of device and type.

    On CUDA that takes compute capability 8.0 or more of every device. On the CPU, where only the interpreter runs,
    there is no bfloat16: the interpreter's products of it are wrong.
    """
    if not AVAILABLE or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if device == "cuda":
        return _modern()
    return device == "cpu" and dtype != torch.bfloat16 and _interpreted()


@functools.cache
def _modern() -> bool:
    return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(torch.cuda.device_count()))


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _run(file: str, op: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"s3t_ext.lora.kernels.triton.{file}"), op)(*args)


def shrink(
    u: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Project rows onto their adapters: s[t,p,j] = scale[n] * sum_d w[n,j,d] u[t,d]; see ``shrink.shrink``."""
    return _run("shrink", "shrink", u, w, w1, ids, offsets, scales, scale, drop)


def expand_(
    y: Tensor, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, drop: Dropout | None = None
) -> None:
    """Add the adapters' part in place: y[t] += sum_p sum_j s[t,p,j] w[n,j]; see ``expand.expand_``."""
    _run("expand", "expand_", y, s, w, w1, ids, offsets, drop)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor,
    offsets: Tensor | None, out_features: int, transposed: bool, drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum base product and adapters in one accumulator: y = x W^T + sum_p s_p w_n + bias; see ``linear.linear``."""
    return _run("linear", "linear", x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, drop)


def outer(
    s: Tensor, u: Tensor, ids: Tensor, offsets: Tensor | None, first: int, count: int, dtype: torch.dtype,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum outer products by adapter: dw[n - first] = sum over n's rows of s[t,p]^T u[t]; see ``outer.outer``."""
    return _run("outer", "outer", s, u, ids, offsets, first, count, dtype, drop)


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, a1: Tensor | None, b: Tensor, b1: Tensor | None,
    ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float, out_features: int,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the whole layer, shrink and linear: (y (T, O), s (T, P, r)); ``drop`` selects elements of x in shrink."""
    s = shrink(x, a, a1, ids, offsets, scales, scale, drop)  # (T, P, r)
    return linear(x, weight, bias, s, b, b1, ids, offsets, out_features, False), s  # (T, O)
