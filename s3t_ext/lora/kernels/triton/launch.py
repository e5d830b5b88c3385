"""How a kernel is launched: on the device of its tensors, on the current stream, with a tile that fits the device."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout

# Terms of one chain of a sum by bytes of an element; chains are added in ascending order, by one program or by many.
# fp32: as every other backend has it. 16 bit: the shorter, the more programs share a sum; the longer, the fewer pass on
# partial sums through memory.
CHUNK = {4: 256, 2: 512}


class Chip(NamedTuple):
    """What the choice of a tile may depend on besides shapes."""

    capability: int  # ten times the compute capability
    multiprocessors: int


@functools.cache
def chip(device: torch.device) -> Chip:
    """Describe a device; the CPU, where only the interpreter runs, counts as an H100."""
    if device.type == "cpu":
        return Chip(90, 132)
    facts = torch.cuda.get_device_properties(device)
    return Chip(10 * facts.major + facts.minor, facts.multi_processor_count)


def options(num_warps: int) -> dict[str, Any]:
    """Give the compiler's options that all kernels share.

    fp32 sums are chains of fused multiply-adds, said here because Triton's default is about to change. Registers are
    limited by what a block may have, because ptxas, if left to itself, spills a few to fit one block more.
    """
    return {"enable_fp_fusion": True, "maxnreg": min(255, 2048 // num_warps)}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Run a kernel over a grid (nothing if it is empty); the first argument is a tensor of the device to run on."""
    if 0 in grid:
        return
    here = torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext()
    with here:
        kernel[grid](*args, **options(settings["num_warps"]), **settings)


def row_tiles(rows: int, groups: int, offsets: Tensor | None, size: int) -> int:
    """Count the tiles that ``routing.tile_in_group`` numbers."""
    return -(-rows // size) if offsets is None else rows // size + groups


def masks(drop: Dropout | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Spell dropout out for a kernel: seeds, row keys, first adapter that is dropped, threshold."""
    return (None, None, 0, 0) if drop is None else (drop.seeds, drop.rows, drop.first, drop.threshold)
