"""shrink: project every row onto the adapters of its group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout
from s3t_ext.lora.kernels.triton.launch import CHUNK, chip, launch, masks, row_tiles
from s3t_ext.lora.kernels.triton.routing import id_of, is_live, kept, read_pool, tile_in_group
from s3t_ext.lora.kernels.triton.tiles import tile

_NAMES = ["rows", "groups", "slots", "n", "adapters", "group_stride", "slot_stride", "first", "threshold", "blocks"]


@triton.jit
def _columns(block, slots, RANK: tl.constexpr, COLUMNS: tl.constexpr, ONE_SLOT: tl.constexpr):
    """Name the columns of s that a program owns: (slot, rank, is there such a column), packed or of one slot only."""
    if ONE_SLOT:
        per_slot: tl.constexpr = (RANK + COLUMNS - 1) // COLUMNS
        j = block % per_slot * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
        return tl.zeros((COLUMNS,), tl.int32) + block // per_slot, j, j < RANK
    else:
        c = block * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
        return c // RANK, c % RANK, c < slots * RANK


@triton.jit
def _sum(
    u, w, w1, seeds, keys, t, inside, adapter, live, slot, j, group, low, high, dim, u_stride, n, threshold,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    """Sum terms low..high - 1 of (ROWS, COLUMNS) dot products, in chunks; low is a multiple of CHUNK."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    chain = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(low, high, DEPTH):
        k = d + tl.arange(0, DEPTH)  # (DEPTH,)
        real = (k < dim)[None, :]
        x = tl.load(u + t[:, None] * u_stride + k[None, :], mask=inside[:, None] & real, other=0)  # (ROWS, DEPTH)
        if DROP:
            x = tl.where(kept(seeds, keys, group, t, inside, slot, d, threshold, DEPTH), x, 0)
        place = j[:, None] * dim + k[None, :]
        values = read_pool(w, w1, n, adapter[:, None], RANK * dim, place, live[:, None] & real, x.dtype)
        chain = tl.dot(x, tl.trans(values), chain, input_precision="ieee")
        full = (d + DEPTH) % CHUNK == 0
        total = tl.where(full, total + chain, total)
        chain = tl.where(full, 0.0, chain)
    return total + chain


@triton.jit
def _write(s, scales, scale, total, adapter, live, place, mask):
    by = scale
    if scales is not None:
        by = tl.load(scales + adapter, mask=live, other=0)[None, :]
    total = tl.where(live[None, :], total * by, 0)
    tl.store(s + place, total.to(s.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NAMES)
def shrink_kernel(
    u, w, w1, ids, offsets, scales, s, sums, seeds, keys,
    rows, dim, groups, slots, n, adapters, u_stride, group_stride, slot_stride, scale, first, threshold, blocks,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # s[t,p,j] = scale[n] * sum_d w[n,j,d] u[t,d], n = ids[group(t),p], 0 if n is dead; u (T,D), w (N,r,D), s (T,P,r).
    # A program owns up to ROWS rows, all of one group, and COLUMNS of the P * r columns (p,j), packed without padding:
    # u is read once for all of them; with dropout, whose masks differ by slot, the columns of one slot. A row of
    # another group is never loaded, a dead adapter neither.
    # Order: chunks of CHUNK terms, each from zero by the device's product (fp32: one chain of fma), added in ascending
    # order. With `sums` (C,T,P*r) a program owns one chunk and finish_kernel adds them: the same order, the same bits.
    # Always mma.sync, whatever ROWS is, as wgmma would sum otherwise: ROWS < 64.
    # Bound by reading u and the live adapters: T=2048, D=4096, P*r=64, bf16: 16 MB + 0.5 MB a group, 6 us on an H100.
    DROP: tl.constexpr = seeds is not None
    block = tl.program_id(0) % blocks
    group, start, end = tile_in_group(offsets, groups, rows, tl.program_id(0) // blocks, ROWS)
    slot, j, real = _columns(block, slots, RANK, COLUMNS, DROP)
    t = (start + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,)
    inside = t < end
    adapter = id_of(ids, group, slot, group_stride, slot_stride, real)  # (COLUMNS,)
    live = is_live(adapter, adapters)  # (COLUMNS,)
    low, high = 0, dim
    if sums is not None:
        low = tl.program_id(1) * CHUNK
        high = tl.minimum(low + CHUNK, dim)
    high = tl.where((start < end) & (tl.max(live.to(tl.int32), 0) > 0), high, low)
    if DROP:
        one = tl.max(tl.where(real, slot, 0), 0)
        if tl.max(adapter, 0) >= first:
            total = _sum(
                u, w, w1, seeds, keys, t, inside, adapter, live, one, j, group, low, high, dim, u_stride, n, threshold,
                RANK, ROWS, COLUMNS, DEPTH, CHUNK, True,
            )  # fmt: skip
        else:
            total = _sum(
                u, w, w1, seeds, keys, t, inside, adapter, live, one, j, group, low, high, dim, u_stride, n, threshold,
                RANK, ROWS, COLUMNS, DEPTH, CHUNK, False,
            )  # fmt: skip
    else:
        total = _sum(
            u, w, w1, seeds, keys, t, inside, adapter, live, slot, j, group, low, high, dim, u_stride, n, threshold,
            RANK, ROWS, COLUMNS, DEPTH, CHUNK, False,
        )  # fmt: skip
    place = t[:, None] * (slots * RANK) + (slot * RANK + j)[None, :]
    mask = inside[:, None] & real[None, :]
    if sums is None:
        _write(s, scales, scale, total, adapter, live, place, mask)
    else:
        at = tl.program_id(1).to(tl.int64) * rows * (slots * RANK)
        tl.store(sums + at + place, total, mask=mask & live[None, :])


@triton.jit(do_not_specialize=[*_NAMES, "chunks"])
def finish_kernel(
    sums, ids, offsets, scales, s, rows, groups, slots, adapters, group_stride, slot_stride, scale, blocks, chunks,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # s = scale[n] * (sum over chunks, ascending, of sums (C,T,P*r)); a program owns ROWS rows of one group x COLUMNS.
    group, start, end = tile_in_group(offsets, groups, rows, tl.program_id(0) // blocks, ROWS)
    slot, j, real = _columns(tl.program_id(0) % blocks, slots, RANK, COLUMNS, False)
    t = (start + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,)
    adapter = id_of(ids, group, slot, group_stride, slot_stride, real)  # (COLUMNS,)
    live = is_live(adapter, adapters)  # (COLUMNS,)
    place = t[:, None] * (slots * RANK) + (slot * RANK + j)[None, :]
    mask = (t < end)[:, None] & real[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(chunks):
        total += tl.load(sums + place, mask=mask & live[None, :], other=0)
        sums += rows.to(tl.int64) * (slots * RANK)
    _write(s, scales, scale, total, adapter, live, place, mask)


def shrink(
    u: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor, offsets: Tensor | None, scales: Tensor | None, scale: float,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Project rows onto their adapters: s[t,p,j] = scale[n] * sum_d w[n,j,d] u[t,d]; exactly 0 in a dead slot.

    Args:
        u: (T, D), fp32, fp16 or bf16; the last dimension contiguous.
        w, w1: (N, r, D) and (M, r, D) or None; type of ``u``, or fp32 (rounded once to the type of ``u`` on reading).
        ids: (G, P) int32, any strides; n = ids[group(t), p] is dead outside 0..N+M-1.
        offsets: (G+1,) int32, or None for one group of all rows.
        scales: (N+M,) fp32, or None for the number ``scale``.
        drop: selects elements of ``u``, slot by slot, or None.

    Returns:
        s: (T, P, r), type of ``u``.

    Notes:
        fp32 sums of chunks of ``launch.CHUNK`` terms, added in ascending order, scaled in fp32, rounded once. How many
        programs share the chunks follows from the shapes and changes no bit.
    """
    rows, dim = u.shape
    groups, slots = ids.shape
    rank = w.shape[1]
    s = u.new_empty(rows, slots, rank)  # (T, P, r)
    if s.numel() == 0:
        return s
    device, chunk = chip(u.device), CHUNK[u.element_size()]
    shape = tile("shrink", device.capability, u.element_size(), rows // groups, rank if drop else slots * rank)
    tiles = row_tiles(rows, groups, offsets, shape.block_m)
    blocks = slots * triton.cdiv(rank, shape.block_n) if drop else triton.cdiv(slots * rank, shape.block_n)
    chunks = triton.cdiv(dim, chunk)
    sums = None
    if chunks > 1 and min(rows, tiles) * blocks < device.multiprocessors:
        sums = u.new_empty(chunks, rows, slots * rank, dtype=torch.float32)  # (C, T, P * r)
    adapters = len(w) + (0 if w1 is None else len(w1))
    seeds, keys, first, threshold = masks(drop)
    launch(
        shrink_kernel, (tiles * blocks, 1 if sums is None else chunks),
        u, w, w1, ids, offsets, scales, s, sums, seeds, keys,
        rows, dim, groups, slots, len(w), adapters, u.stride(0), *ids.stride(), scale, first, threshold, blocks,
        RANK=rank, ROWS=shape.block_m, COLUMNS=shape.block_n, DEPTH=shape.block_k, CHUNK=chunk,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if sums is not None:
        blocks = triton.cdiv(slots * rank, shape.block_n)
        launch(
            finish_kernel, (tiles * blocks,),
            sums, ids, offsets, scales, s, rows, groups, slots, adapters, *ids.stride(), scale, blocks, chunks,
            RANK=rank, ROWS=shape.block_m, COLUMNS=shape.block_n, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return s
