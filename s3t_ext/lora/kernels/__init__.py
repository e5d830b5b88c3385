"""One table of primitives, ``IMPLS[op][backend]``, and nothing else, drives dispatch, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from s3t_ext.lora.kernels import native, reference, triton

OPS = ("shrink", "expand_", "linear", "layer", "outer", "pack")
_BACKENDS = {"native": native, "triton": triton, "reference": reference}

IMPLS: dict[str, dict[str, Callable]] = {
    op: {
        name: getattr(module, op)
        for name, module in _BACKENDS.items()
        if hasattr(module, op) and getattr(module, "AVAILABLE", True)
    }
    for op in OPS
}

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(backend: str, op: str, device: str, dtype: torch.dtype) -> bool:
    """Tell whether a backend has this op for this kind of device ("cpu", "cuda") and type."""
    if backend not in IMPLS[op]:
        return False
    if backend == "native":
        return dtype in TYPES and (device == "cpu" or (device == "cuda" and native.CUDA and op != "pack"))
    if backend == "triton":
        return triton.serves(device, dtype)
    return dtype in (*TYPES, torch.float64)


def backend_for(op: str, device: torch.device, dtype: torch.dtype, wanted: str = "") -> str:
    """Name the backend that serves an op: the wanted one if it can, else the first of native, triton and reference.

    Raises:
        ValueError: ``wanted`` is no backend of this op.
        NotImplementedError: ``wanted`` does not serve this device or type.
    """
    if wanted and wanted not in IMPLS[op]:
        raise ValueError(f"backend: expected one of {sorted(IMPLS[op])} for {op}, got {wanted!r}")
    for name in (wanted,) if wanted else IMPLS[op]:
        if serves(name, op, device.type, dtype) and (wanted or not (name == "triton" and device.type == "cpu")):
            return name
    if wanted == "triton" and device.type == "cpu":
        raise NotImplementedError(
            "backend: 'triton' needs a CUDA device (on the CPU only its interpreter runs, slowly:"
            " set TRITON_INTERPRET=1 before the first call; float32 and float16)"
        )
    who = f"{wanted} has nothing" if wanted else "no backend"
    raise NotImplementedError(
        f"{op}: {who} for {dtype} on {device.type}; supported: float32, float16, bfloat16 (float64 by"
        " backend='reference')"
    )
