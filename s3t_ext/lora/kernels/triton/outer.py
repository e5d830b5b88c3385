"""outer: sum outer products of rows by adapter, deterministically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3t_ext.lora.kernels.dropout import Dropout
from s3t_ext.lora.kernels.triton.launch import CHUNK, chip, launch, masks, row_tiles
from s3t_ext.lora.kernels.triton.routing import id_of, kept, rows_of, tile_in_group
from s3t_ext.lora.kernels.triton.tiles import tile

_NAMES = ["rows", "groups", "slots", "count", "group_stride", "slot_stride", "first", "frozen", "threshold"]
_SCAN = tl.constexpr(1024)  # entries of the table that are looked at together
_NONE = tl.constexpr(0x7FFFFFFF)
_WORKSPACE = 1 << 26  # bytes; above, the adapters' programs read their rows themselves


@triton.jit
def _add_rows(
    total, s, u, seeds, keys, group, begin, end, slot, adapter, frozen, threshold, j, column, dim, u_stride, width,
    RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the outer products of rows begin..end - 1 to a total (RANKS, COLUMNS), in chunks counted from ``begin``."""
    d = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    chain = tl.zeros((RANKS, COLUMNS), tl.float32)
    for t0 in range(begin, end, DEPTH):
        t = (t0 + tl.arange(0, DEPTH)).to(tl.int64)  # (DEPTH,)
        inside = t < end
        left = tl.load(
            s + t[:, None] * width + (slot * RANK + j)[None, :], mask=inside[:, None] & (j < RANK)[None, :], other=0
        )  # (DEPTH, RANKS)
        mask = inside[:, None] & (d < dim)[None, :]
        right = tl.load(u + t[:, None] * u_stride + d[None, :], mask=mask, other=0)  # (DEPTH, COLUMNS)
        if seeds is not None:
            least = tl.where(adapter >= frozen, threshold, 0)
            right = tl.where(kept(seeds, keys, group, t, inside, slot, column, least, COLUMNS), right, 0)
        chain = tl.dot(tl.trans(left), right, chain, input_precision="ieee")
        full = (t0 - begin + DEPTH) % CHUNK == 0
        total = tl.where(full, total + chain, total)
        chain = tl.where(full, 0.0, chain)
    return total + chain


@triton.jit(do_not_specialize=_NAMES)
def outer_kernel(
    s, u, ids, offsets, dw, sums, seeds, keys,
    rows, dim, groups, slots, u_stride, group_stride, slot_stride, first, frozen, threshold,
    RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # dw[n - first] = sum over (g,p) with ids[g,p] = n and g's rows t of s[t,p]^T u[t]; s (T,P,r), u (T,D), dw (M,r,D).
    # A program owns RANKS x COLUMNS elements of one adapter's gradient; it scans the table for its occurrences.
    # Order: occurrences by ascending g, then p; the rows of each in chunks of CHUNK counted from its group's first row,
    # each from zero, added in ascending order to one total: nobody else's rows enter, and nothing is shared.
    # With `sums` (tiles,P,r,D) the chunks were summed by outer_chunk_kernel; the same order, the same bits.
    # Bound by reading u once for each slot that trains: T=8192, D=4096, P=1, bf16: 67 MB, 22 us on an H100.
    rank_blocks: tl.constexpr = (RANK + RANKS - 1) // RANKS
    column_blocks = tl.cdiv(dim, COLUMNS)
    index = tl.program_id(0) // column_blocks // rank_blocks
    adapter = first + index
    j = tl.program_id(0) // column_blocks % rank_blocks * RANKS + tl.arange(0, RANKS)  # (RANKS,)
    column = tl.program_id(0) % column_blocks * COLUMNS
    d = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    place = j[:, None] * dim + d[None, :]
    mask = (j < RANK)[:, None] & (d < dim)[None, :]
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for base in range(0, groups * slots, _SCAN):
        entry = base + tl.arange(0, _SCAN)  # (_SCAN,)
        named = id_of(ids, entry // slots, entry % slots, group_stride, slot_stride, entry < groups * slots)
        hits = tl.where(named == adapter, entry, _NONE)  # (_SCAN,)
        hit = tl.min(hits, 0)
        while hit < _NONE:
            group, slot = hit // slots, hit % slots
            begin, end = rows_of(offsets, rows, group)
            if sums is None:
                total = _add_rows(
                    total, s, u, seeds, keys, group, begin, end, slot, adapter, frozen, threshold, j, column, dim,
                    u_stride, slots * RANK, RANK, RANKS, COLUMNS, DEPTH, CHUNK,
                )  # fmt: skip
            else:
                for chunk in range(tl.cdiv(end - begin, CHUNK)):
                    at = ((begin // CHUNK + group + chunk).to(tl.int64) * slots + slot) * (RANK * dim)
                    total += tl.load(sums + at + place, mask=mask, other=0)
            hits = tl.where(hits > hit, hits, _NONE)
            hit = tl.min(hits, 0)
    at = index.to(tl.int64) * (RANK * dim)
    tl.store(dw + at + place, total.to(dw.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NAMES)
def outer_chunk_kernel(
    s, u, ids, offsets, sums, seeds, keys,
    rows, dim, groups, slots, count, u_stride, group_stride, slot_stride, first, frozen, threshold,
    RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # sums[tile,p] = sum over the up to CHUNK rows t of a tile, all of one group, of s[t,p]^T u[t], if ids[g,p] trains.
    # Tiles are numbered as routing.tile_in_group does. A program owns RANKS x COLUMNS elements of one (tile, p).
    rank_blocks: tl.constexpr = (RANK + RANKS - 1) // RANKS
    column_blocks = tl.cdiv(dim, COLUMNS)
    part = tl.program_id(0) // column_blocks
    tile, slot = part // rank_blocks // slots, part // rank_blocks % slots
    j = part % rank_blocks * RANKS + tl.arange(0, RANKS)  # (RANKS,)
    column = tl.program_id(0) % column_blocks * COLUMNS
    d = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    group, begin, end = tile_in_group(offsets, groups, rows, tile, CHUNK)
    adapter = tl.load(ids + group.to(tl.int64) * group_stride + slot * slot_stride)
    wanted = (adapter >= first) & (adapter < first + count) & (begin < end)
    end = tl.where(wanted, end, begin)
    total = _add_rows(
        tl.zeros((RANKS, COLUMNS), tl.float32), s, u, seeds, keys, group, begin, end, slot, adapter, frozen, threshold,
        j, column, dim, u_stride, slots * RANK, RANK, RANKS, COLUMNS, DEPTH, CHUNK,
    )  # fmt: skip
    at = (tile.to(tl.int64) * slots + slot) * (RANK * dim)
    mask = (j < tl.where(wanted, RANK, 0))[:, None] & (d < dim)[None, :]
    tl.store(sums + at + j[:, None] * dim + d[None, :], total, mask=mask)


def outer(
    s: Tensor, u: Tensor, ids: Tensor, offsets: Tensor | None, first: int, count: int, dtype: torch.dtype,
    drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum outer products by adapter: dw[n - first] = sum over every (g, p) with ids[g, p] = n of s[t,p]^T u[t].

    Args:
        s: (T, P, r), type of ``u``.
        u: (T, D), fp32, fp16 or bf16; the last dimension contiguous.
        ids, offsets: as in ``shrink``.
        first, count: the adapters first..first+count-1 get a gradient.
        dtype: fp32, or the type of ``u``.
        drop: selects elements of ``u``, slot by slot, or None.

    Returns:
        dw: (count, r, D), zero for adapters that no group names.

    Notes:
        Occurrences by ascending g, then p; rows of each in chunks of ``launch.CHUNK`` counted from the first row of
        its group. Whether the chunks of one adapter are summed by one program or by many changes no bit.
    """
    rows, dim = u.shape
    groups, slots = ids.shape
    rank = s.shape[2]
    dw = u.new_empty(count, rank, dim, dtype=dtype)  # (count, r, D)
    if dw.numel() == 0:
        return dw
    device, chunk = chip(u.device), CHUNK[u.element_size()]
    shape = tile("outer", device.capability, u.element_size(), rows, rank)
    blocks = triton.cdiv(dim, shape.block_n) * triton.cdiv(rank, shape.block_m)
    tiles = row_tiles(rows, groups, offsets, chunk)
    seeds, keys, frozen, threshold = masks(drop)
    common = {
        "RANK": rank, "RANKS": shape.block_m, "COLUMNS": shape.block_n, "DEPTH": shape.block_k, "CHUNK": chunk,
        "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip
    sums = None
    few = count * blocks < device.multiprocessors and rows > chunk
    if few and 4 * tiles * slots * rank * dim <= _WORKSPACE:
        sums = u.new_empty(tiles, slots, rank, dim, dtype=torch.float32)  # (tiles, P, r, D)
        launch(
            outer_chunk_kernel, (tiles * slots * blocks,),  # along x: the other edges of a grid end at 65535
            s, u, ids, offsets, sums, seeds, keys,
            rows, dim, groups, slots, count, u.stride(0), *ids.stride(), first, frozen, threshold, **common,
        )  # fmt: skip
        seeds = keys = None
    launch(
        outer_kernel, (count * blocks,),
        s, u, ids, offsets, dw, sums, seeds, keys,
        rows, dim, groups, slots, u.stride(0), *ids.stride(), first, frozen, threshold, **common,
    )  # fmt: skip
    return dw
