"""What every Triton kernel shares, as device functions: the group of a row, what a slot names, pools, dropout masks."""

from __future__ import annotations

import triton
import triton.language as tl

_SCAN = tl.constexpr(256)  # groups that are looked at together: one wide load costs less than a search's chain of loads


@triton.jit
def group_of(offsets, groups, row):
    """Find the (never empty) group of a row: as many groups end at or before it. ``offsets`` None: 0."""
    found = 0
    if offsets is not None:
        for first in range(0, groups, _SCAN):
            g = first + tl.arange(0, _SCAN)  # (_SCAN,)
            end = tl.load(offsets + g + 1, mask=g < groups, other=0x7FFFFFFF)  # (_SCAN,)
            found += tl.sum((end <= row).to(tl.int32), 0)
    return tl.minimum(found, groups - 1)


@triton.jit
def rows_of(offsets, rows, group):
    """Give the first row of a group and the row after its last."""
    if offsets is None:
        return 0, rows
    else:
        return tl.load(offsets + group), tl.load(offsets + group + 1)


@triton.jit
def tile_in_group(offsets, groups, rows, tile, SIZE: tl.constexpr):
    """Find tile ``tile`` of at most SIZE rows, all of one group: (group, first row, row after the last).

    The tiles of group g are numbered from offsets[g] // SIZE + g on. Numbers may stay unused (the tile is then empty),
    none is used twice, and all lie below rows // SIZE + G: no prefix sum is needed, on the host or here.
    """
    if offsets is None:
        return tl.zeros((), tl.int32), tile * SIZE, tl.minimum(tile * SIZE + SIZE, rows)
    else:
        group = 0
        for first in range(0, groups, _SCAN):
            g = first + tl.arange(0, _SCAN)  # (_SCAN,)
            begin = tl.load(offsets + g + 1, mask=g < groups, other=0)  # (_SCAN,)
            group += tl.sum(((g < groups) & (begin // SIZE + g + 1 <= tile)).to(tl.int32), 0)
        group = tl.minimum(group, groups - 1)
        begin, end = rows_of(offsets, rows, group)
        start = begin + (tile - begin // SIZE - group) * SIZE
        return group, start, tl.minimum(start + SIZE, end)


@triton.jit
def id_of(ids, group, slot, group_stride, slot_stride, mask):
    """Read adapter_ids[group, slot], -1 where the mask is false."""
    return tl.load(ids + group.to(tl.int64) * group_stride + slot * slot_stride, mask=mask, other=-1)


@triton.jit
def is_live(adapter, adapters):
    """Tell which ids name one of N + M adapters; all others are never read."""
    return (adapter >= 0) & (adapter < adapters)


@triton.jit
def read_pool(w, w1, n, adapter, size, inside, mask, dtype: tl.constexpr):
    """Read element ``inside`` of adapters of ``size`` = r * D elements, an fp32 pool rounded to the rows' type.

    ``mask`` must be false where the adapter is dead; the result is zero there. ``w1``: the pool of ids from n on, or
    None. The arguments broadcast; ``mask`` is a block.
    """
    if w1 is None:
        return tl.load(w + adapter.to(tl.int64) * size + inside, mask=mask, other=0).to(dtype)
    else:
        frozen = adapter + tl.zeros_like(inside) < n  # a block: the interpreter cannot combine a scalar with a mask
        values = tl.load(w + adapter.to(tl.int64) * size + inside, mask=mask & frozen, other=0).to(dtype)
        second = tl.load(w1 + (adapter - n).to(tl.int64) * size + inside, mask=mask & ~frozen, other=0)
        return tl.where(frozen, values, second.to(dtype))


@triton.jit
def kept(seeds, keys, group, t, inside, slot, column, threshold, COLUMNS: tl.constexpr):
    """Say which of columns ``column``.. (a multiple of 4) of rows ``t`` dropout keeps in a slot: (len(t), COLUMNS).

    One Philox 4x32-10 gives four columns; see ``kernels.dropout``. ``inside`` masks the reads of ``keys``.
    """
    seed = tl.load(seeds + group)
    key = tl.load(keys + t, mask=inside, other=0)[:, None]  # (len(t), 1)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)  # (len(t), 1)
    quad = (column // 4 + tl.arange(0, COLUMNS // 4))[None, :].to(tl.uint32)  # (1, COLUMNS / 4)
    quad = tl.broadcast_to(quad, low.shape[0], COLUMNS // 4)
    zero = tl.zeros_like(quad)
    w0, w1, w2, w3 = tl.philox(seed, quad, zero + slot, zero + low, zero + high)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (len(t), COLUMNS / 4, 2, 2), in the order 0 1 2 3
    return tl.reshape(words, low.shape[0], COLUMNS) >= threshold.to(tl.uint32)
