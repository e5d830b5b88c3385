"""Which way a call of the whole layer goes: one table, read before a launch, by shapes alone.

``exact`` always takes one fused kernel family, whatever T, so that a row's bits do not depend on its batch. ``fast``
takes what the table says is fastest for the number of rows; ``fused`` and ``split`` force one of its two ways: base
product and adapters in one accumulator, or the library's base product and ``expand_`` after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from s3t_ext.lora.kernels import backend_for, serves

MODES = ("exact", "fast", "fused", "split")


class Path(NamedTuple):
    """A way through a layer: in one accumulator or not, and by which backend's kernels."""

    fused: bool
    backend: str


# Backend of `exact`: one for every number of rows, so that no bit depends on it.
EXACT = {"cpu": Path(True, "native"), "cuda": Path(True, "triton")}

# Ways of `fast`, by kind of device and type: rows up to which one is taken. CPU: measured on AMD with AVX512_BF16, for
# plain weights (packed ones are always fused). There the library's fp32 product has half the speed of ours and its fp16
# product a tenth; its bf16 product has the same, and our reading of a plain weight is what costs. CUDA: no device has
# been measured yet. Up to 64 rows a 16-bit layer is bound by reading the weight, which one kernel does as fast as the
# library. Above, the roofline (bench/results/roofline_h100.csv) has the fused way ahead as long as its product is less
# than about 10 % behind the library's; until that is measured the library's product is the safe one.
_ANY, _WHOLE, _PARTS = float("inf"), Path(True, "native"), Path(False, "native")
FAST: dict[tuple[str, torch.dtype], tuple[tuple[float, Path], ...]] = {
    ("cpu", torch.float32): ((_ANY, _WHOLE),),
    ("cpu", torch.float16): ((_ANY, _WHOLE),),
    ("cpu", torch.bfloat16): ((64, _WHOLE), (_ANY, _PARTS)),
    ("cuda", torch.float32): ((_ANY, _PARTS),),
    ("cuda", torch.float16): ((64, _WHOLE), (_ANY, _PARTS)),
    ("cuda", torch.bfloat16): ((64, _WHOLE), (_ANY, _PARTS)),
}

# Way of `fused`: by the backend whose tiles suit the rows.
FUSED: dict[str, tuple[tuple[float, Path], ...]] = {
    "cpu": ((_ANY, _WHOLE),),
    "cuda": ((64, _WHOLE), (_ANY, Path(True, "triton"))),
}

# Where no table has a line: the first backend that serves.
_FUSED, _SPLIT = Path(True, ""), Path(False, "")
_CPU = torch.device("cpu")


def path_for(
    mode: str, device: torch.device, dtype: torch.dtype, rows: int, wanted: str = "", packed: bool = False
) -> Path:
    """Choose the way of one call.

    Args:
        mode: one of ``MODES``; ``rows``: T; ``wanted``: a backend that overrides the table's.
        packed: the weight lies in panels, which only the fused kernels read: no library need apply.

    Raises:
        ValueError, NotImplementedError: as ``backend_for``.
    """
    kind = "cpu" if device == _CPU else device.type  # the name of a device is made anew each time
    if mode == "exact":
        path = EXACT.get(kind, _FUSED)
    elif mode == "fused" or (mode == "fast" and packed):
        path = _at(FUSED.get(kind, ()), rows, _FUSED)
    else:
        path = _at(FAST.get((kind, dtype), ()), rows, _SPLIT) if mode == "fast" else _SPLIT
    op, backend = "layer" if path.fused else "expand_", wanted or path.backend
    if not (backend and serves(backend, op, kind, dtype)):
        backend = backend_for(op, device, dtype, wanted)
    return path if backend == path.backend else Path(path.fused, backend)


def _at(lines: tuple[tuple[float, Path], ...], rows: int, otherwise: Path) -> Path:
    for most, path in lines:
        if rows <= most:
            return path
    return otherwise
