"""One table of primitives, ``IMPLS[op][backend]``, and nothing else, drives dispatch, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from s3t_ext.lora.kernels import native, reference

OPS = ("shrink", "expand_", "linear", "outer", "pack")

IMPLS: dict[str, dict[str, Callable]] = {
    op: {
        "reference": getattr(reference, op),
        **({"native": getattr(native, op)} if native.AVAILABLE else {}),
    }
    for op in OPS
}

_NATIVE_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def backend_for(op: str, device: torch.device, dtype: torch.dtype, wanted: str = "") -> str:
    """Name the backend that serves an op: the wanted one if it can, else native where it can, else reference.

    Raises:
        ValueError: ``wanted`` is no backend of this op.
        NotImplementedError: ``wanted`` does not serve this device or type.
    """
    if wanted and wanted not in IMPLS[op]:
        raise ValueError(f"backend: expected one of {sorted(IMPLS[op])} for {op}, got {wanted!r}")
    served = {
        "native": "native" in IMPLS[op]
        and dtype in _NATIVE_TYPES
        and (device.type == "cpu" or (device.type == "cuda" and op in native.CUDA_OPS)),
        "reference": dtype in (*_NATIVE_TYPES, torch.float64),
    }
    for name in (wanted,) if wanted else ("native", "reference"):
        if served[name]:
            return name
    raise NotImplementedError(
        f"{op}: no backend serves {dtype} on {device.type}; supported: float32, float16, bfloat16"
        " (float64 by backend='reference')"
    )
