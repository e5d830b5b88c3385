"""expand_: add the adapters' part to rows in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout
from s3t_ext.lora.kernels.triton.launch import CHUNK, chip, launch, masks, row_tiles
from s3t_ext.lora.kernels.triton.routing import id_of, is_live, kept, read_pool, tile_in_group
from s3t_ext.lora.kernels.triton.tiles import tile

_NAMES = ["rows", "groups", "slots", "n", "adapters", "group_stride", "slot_stride", "first", "threshold", "blocks"]


@triton.jit(do_not_specialize=_NAMES)
def expand_kernel(
    y, s, w, w1, ids, offsets, seeds, keys,
    rows, dim, groups, slots, n, adapters, y_stride, group_stride, slot_stride, first, threshold, blocks,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    # y[t] += sum_p sum_j s[t,p,j] w[n,j], n = ids[group(t),p], live ones only; y (T,D), s (T,P,r), w (N,r,D).
    # A program owns up to ROWS rows, all of one group, x COLUMNS columns; a group without a live slot is left alone.
    # Order: slot by slot, each from zero in steps of DEPTH ranks (a slot never shares a step with another, so that a
    # masked slot and an absent one give the same bits), added to a total from zero; y + total is rounded once.
    # Dropout selects each slot's part. Always mma.sync, whatever ROWS is: ROWS < 64.
    # Bound by reading and writing y: T=2048, D=4096, P*r=64, bf16: 33 MB + w from L2, 11 us on an H100.
    group, start, end = tile_in_group(offsets, groups, rows, tl.program_id(0) // blocks, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS
    t = (start + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,)
    d = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    all_slots = tl.arange(0, SLOTS)  # (SLOTS,)
    table = id_of(
        ids, group, all_slots, group_stride, slot_stride, all_slots < tl.where(start < end, slots, 0)
    )  # (SLOTS,)
    alive = tl.max(is_live(table, adapters).to(tl.int32), 0) > 0
    inside = t < tl.where(alive, end, 0)
    at = y + t[:, None] * y_stride + d[None, :]
    mask = inside[:, None] & (d < dim)[None, :]
    before = tl.load(at, mask=mask, other=0)  # (ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    chain = tl.zeros((ROWS, COLUMNS), tl.float32)
    parts: tl.constexpr = (RANK + DEPTH - 1) // DEPTH
    for step in range(tl.where(alive, slots * parts, 0)):
        slot, part = step // parts, step % parts
        j = part * DEPTH + tl.arange(0, DEPTH)  # (DEPTH,)
        adapter = tl.load(ids + group.to(tl.int64) * group_stride + slot * slot_stride)
        real = j < tl.where(is_live(adapter, adapters), RANK, 0)
        terms = tl.load(
            s + t[:, None] * (slots * RANK) + (slot * RANK + j)[None, :], mask=inside[:, None] & real[None, :], other=0
        )  # (ROWS, DEPTH)
        place = j[:, None] * dim + d[None, :]
        values = read_pool(w, w1, n, adapter, RANK * dim, place, real[:, None] & (d < dim)[None, :], terms.dtype)
        chain = tl.dot(terms, values, chain, input_precision="ieee")
        if seeds is not None:  # noqa: SIM102 (decided by the compiler; the next one by the device)
            if adapter >= first:
                chain = tl.where(kept(seeds, keys, group, t, inside, slot, column, threshold, COLUMNS), chain, 0)
        full = (part == parts - 1) | ((part + 1) * DEPTH % CHUNK == 0)
        total = tl.where(full, total + chain, total)
        chain = tl.where(full, 0.0, chain)
    tl.store(at, (before.to(tl.float32) + total).to(before.dtype), mask=mask)


def expand_(
    y: Tensor, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, drop: Dropout | None = None
) -> None:
    """Add the adapters' part in place: y[t] += sum_p sum_j s[t,p,j] w[n,j], rounded once.

    Args:
        y: (T, D), fp32, fp16 or bf16, changed in place; the last dimension contiguous.
        s: (T, P, r), type of ``y``.
        w, w1, ids, offsets: as in ``shrink``.
        drop: selects, slot by slot, the elements of ``y`` that a slot adds to, or None.

    Notes:
        The slots are summed first, then y + total is rounded once. A row without a live slot is not touched.
    """
    rows, dim = y.shape
    groups, slots = ids.shape
    rank = w.shape[1]
    if y.numel() == 0 or slots == 0 or rank == 0:
        return
    shape = tile("expand_", chip(y.device).capability, y.element_size(), rows // groups, rank)
    blocks = triton.cdiv(dim, shape.block_n)
    seeds, keys, first, threshold = masks(drop)
    launch(
        expand_kernel, (row_tiles(rows, groups, offsets, shape.block_m) * blocks,),
        y, s, w, w1, ids, offsets, seeds, keys, rows, dim, groups, slots,
        len(w), len(w) + (0 if w1 is None else len(w1)), y.stride(0), *ids.stride(), first, threshold, blocks,
        SLOTS=triton.next_power_of_2(slots), RANK=rank, ROWS=shape.block_m, COLUMNS=shape.block_n,
        DEPTH=shape.block_k, CHUNK=CHUNK[y.element_size()], num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
