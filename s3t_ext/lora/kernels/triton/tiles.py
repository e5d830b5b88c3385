"""The tile table: the block shapes of a Triton kernel by device, type, rows and width; plain data, read by ``tile``.

The choice is made on the host before a launch from shapes alone, never by timing. Only speed depends on it: along the
sum every row of one (op, device, type) walks in the same order, so that the bits of a result do not know their tile.

The numbers follow from shared memory, registers and the roofline. They are not yet measured on a device.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Block shape and launch settings of one program.

    ``per_sm`` programs share a multiprocessor: a persistent kernel launches that many for each.
    """

    block_m: int  # rows
    block_n: int  # columns of the result
    block_k: int  # terms of the sum in one step
    warps: int
    stages: int
    per_sm: int = 1


ANY = 1 << 62

# (op, compute capability, bytes of an element): rows up to, columns up to, tile; the first line that fits is taken.
# Shared memory: 227 KB on 9.0, 163 KB on 8.0, but 99 KB on 8.6 and 8.9, which take the lines of 8.0: those fit in it.
# `linear_dropout` is `linear` with masks: each slot has an accumulator of its own, so its tile is smaller.
# On 9.0 `block_m` of a 16-bit type is never below 64, also where fewer rows are there: 64 rows are what wgmma works on,
# and another instruction would sum in another order.
TABLE: dict[tuple[str, int, int], tuple[tuple[int, int, Tile], ...]] = {
    ("linear", 90, 2): (
        (64, 4224, Tile(64, 32, 128, 4, 5)),  # W is drawn once, by O / 32 programs with 32 KB of it in flight each
        (128, ANY, Tile(64, 64, 64, 4, 4, 2)),
        (256, ANY, Tile(128, 64, 64, 8, 4)),
        (512, ANY, Tile(128, 128, 64, 8, 4)),
        (ANY, ANY, Tile(128, 256, 64, 8, 4)),  # by the copy engine only
    ),
    ("linear", 80, 2): (
        (64, ANY, Tile(64, 32, 64, 4, 5, 2)),
        (256, ANY, Tile(64, 64, 32, 4, 6, 2)),
        (ANY, ANY, Tile(128, 128, 32, 8, 4)),
    ),
    ("linear", 90, 4): (
        (64, ANY, Tile(32, 32, 16, 4, 3, 2)),
        (ANY, ANY, Tile(64, 64, 16, 8, 3)),
    ),
    ("linear", 80, 4): (
        (64, ANY, Tile(32, 32, 16, 4, 3, 2)),
        (ANY, ANY, Tile(64, 64, 16, 8, 3)),
    ),
    ("linear_dropout", 90, 2): ((ANY, ANY, Tile(128, 64, 64, 8, 4)),),
    ("linear_dropout", 80, 2): ((ANY, ANY, Tile(64, 64, 32, 4, 4, 2)),),
    ("linear_dropout", 90, 4): ((ANY, ANY, Tile(32, 64, 16, 8, 3)),),
    ("linear_dropout", 80, 4): ((ANY, ANY, Tile(32, 64, 16, 8, 3)),),
    # Never 64 rows in the next two: from there on 16-bit products would be wgmma's on 9.0, below they are mma.sync's,
    # and sum in another order.
    ("shrink", 90, 2): (
        (16, 16, Tile(16, 16, 128, 4, 4)),
        (16, ANY, Tile(16, 64, 64, 4, 4)),
        (ANY, 16, Tile(32, 16, 128, 4, 4)),
        (ANY, ANY, Tile(32, 64, 64, 4, 4)),
    ),
    ("shrink", 80, 2): (
        (16, ANY, Tile(16, 32, 64, 4, 4)),
        (ANY, ANY, Tile(32, 64, 64, 4, 3)),
    ),
    ("shrink", 90, 4): (
        (16, ANY, Tile(16, 16, 32, 4, 3)),
        (ANY, ANY, Tile(32, 32, 16, 4, 3)),
    ),
    ("shrink", 80, 4): (
        (16, ANY, Tile(16, 16, 32, 4, 3)),
        (ANY, ANY, Tile(32, 32, 16, 4, 3)),
    ),
    # 64 columns, a line of 128 bytes: with 128, kernels like this one were seen to give NaN on 9.0 (vLLM issue 48590).
    ("expand_", 90, 2): (
        (16, ANY, Tile(16, 64, 16, 4, 3)),
        (ANY, 16, Tile(32, 64, 16, 4, 2)),
        (ANY, ANY, Tile(32, 64, 32, 4, 3)),
    ),
    ("expand_", 80, 2): (
        (ANY, 16, Tile(32, 64, 16, 4, 3)),
        (ANY, ANY, Tile(32, 64, 32, 4, 3)),
    ),
    ("expand_", 90, 4): ((ANY, ANY, Tile(16, 64, 16, 4, 2)),),
    ("expand_", 80, 4): ((ANY, ANY, Tile(16, 64, 16, 4, 2)),),
    # block_m: ranks, block_k: rows. The tile depends on the rank alone, so that an adapter's bits know of no batch.
    ("outer", 90, 2): (
        (ANY, 16, Tile(16, 64, 64, 4, 3)),
        (ANY, ANY, Tile(32, 64, 64, 4, 3)),
    ),
    ("outer", 80, 2): (
        (ANY, 16, Tile(16, 64, 64, 4, 3)),
        (ANY, ANY, Tile(32, 64, 64, 4, 3)),
    ),
    ("outer", 90, 4): ((ANY, ANY, Tile(16, 64, 16, 4, 3)),),
    ("outer", 80, 4): ((ANY, ANY, Tile(16, 64, 16, 4, 3)),),
}


def tile(op: str, capability: int, itemsize: int, rows: int, columns: int = 0) -> Tile:
    """Look a tile up.

    Args:
        op: "shrink", "expand_", "outer", "linear" or "linear_dropout".
        capability: ten times the compute capability of the device; below 90 counts as 80, above as 90.
        itemsize: bytes of an element of the rows: 2 or 4.
        rows: T; for shrink and expand_ T // G, rows of a group.
        columns: width of the result; for expand_ and outer the rank.
    """
    lines = TABLE[op, 90 if capability >= 90 else 80, itemsize]
    return next(line for most_rows, most_columns, line in lines if rows <= most_rows and columns <= most_columns)
