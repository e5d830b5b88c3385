"""Which way a call of the whole layer goes: one table, read before a launch, by shapes alone.

``exact`` always takes one fused kernel family, whatever T, so that a row's bits do not depend on its batch. ``fast``
takes what the table says is fastest for the number of rows; ``fused`` and ``split`` force one of its two ways: base
product and adapters in one accumulator, or the library's base product and ``expand_`` after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from s3t_ext.lora.kernels import backend_for

MODES = ("exact", "fast", "fused", "split")


class Path(NamedTuple):
    """A way through a layer: in one accumulator or not, and by which backend's kernels."""

    fused: bool
    backend: str


# Backends of `exact`. On a device the 16-bit product needs the matrix units at every T; fp32 has one order of sums on
# every backend, and runs on the ordinary units.
EXACT = {"cpu": {}, "cuda": {torch.float16: "triton", torch.bfloat16: "triton"}}

# Ways of `fast`: (rows up to which it is taken, is it fused). A device: below 65 rows the layer is bound by reading the
# weight, which one kernel reads at the speed of memory; above, a product 10 % slower than the library's loses what the
# fusion saves. That is a prediction (bench/results/roofline_h100.csv); no device has been measured yet. The CPU: to be
# measured with the packed kernels.
FAST: dict[str, tuple[tuple[float, bool], ...]] = {
    "cpu": ((float("inf"), False),),
    "cuda": ((64, True), (float("inf"), False)),
}


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
    fused = mode in ("exact", "fused")
    if mode == "fast":
        fused = packed or next(way for most, way in FAST.get(device.type, FAST["cpu"]) if rows <= most)
    op = "layer" if fused else "expand_"
    if not wanted and mode == "exact":
        family = EXACT.get(device.type, {}).get(dtype, "")
        try:
            return Path(fused, backend_for(op, device, dtype, family))
        except (ValueError, NotImplementedError):  # Triton is not installed: the next family, for every T alike
            pass
    return Path(fused, backend_for(op, device, dtype, wanted))
