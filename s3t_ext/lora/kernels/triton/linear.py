"""The whole layer in one Triton kernel: the base product, then the adapters as the last steps of the same sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s3t_ext.lora.kernels.dropout import Dropout
from s3t_ext.lora.kernels.triton.launch import chip, launch, masks
from s3t_ext.lora.kernels.triton.routing import group_of, id_of, is_live, kept, read_pool, rows_of
from s3t_ext.lora.kernels.triton.tiles import Tile, tile

AHEAD = tl.constexpr(2)  # adapter tiles in flight: the next is fetched while this one is multiplied
LANES = tl.constexpr(32)  # columns of a packed panel
CHAIN = tl.constexpr(256)  # terms of one fp32 chain
ODD = (64, 32)  # most columns and terms of a tile that leaves registers for pointers to single elements
BY_32 = 128  # most columns of a tile that leaves registers for 32 terms of s and w a step, not 16
BAND = tl.constexpr(8)  # row tiles that share a column tile while it is in the L2 cache


@triton.jit
def _place(index, row_tiles, column_tiles):
    """Order tiles in bands of BAND row tiles, columns outermost, so that neighbours in time share operands in L2."""
    size = column_tiles * BAND
    band, inside = index // size, index % size
    height = tl.minimum(row_tiles - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@triton.jit
def _weight_tile(
    weight, k0, column0, inner, outer,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Read W[column, k], transposed W[k, column], plain or from panels, as (BLOCK_K, BLOCK_N); zero past the edges."""
    if TMA:
        return weight.load([k0, column0]) if TRANSPOSED else weight.load([column0, k0]).T
    else:
        k, columns = k0 + tl.arange(0, BLOCK_K)[:, None], column0 + tl.arange(0, BLOCK_N)[None, :]
        o, i, width = (k, columns, outer) if TRANSPOSED else (columns, k, inner)
        if PACKED:
            at = (o // LANES).to(tl.int64) * width * LANES + i * LANES + o % LANES
        else:
            at = o.to(tl.int64) * width + i
        return tl.load(weight + at, mask=(k < inner) & (columns < outer), other=0.0)


@triton.jit
def _base(
    x, weight, t, row0, column0, rows, inner, outer, x_stride,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum x W^T, transposed x W, over one tile."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    chain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, inner, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        if TMA:
            a = x.load([row0, k0])  # (BLOCK_M, BLOCK_K)
        else:
            at = t.to(tl.int64)[:, None] * x_stride + k[None, :]
            a = tl.load(x + at, mask=(t < rows)[:, None] & (k < inner)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        b = _weight_tile(weight, k0, column0, inner, outer, TRANSPOSED, PACKED, TMA, BLOCK_N, BLOCK_K)
        if CHAINED:
            chain = tl.dot(a, b, chain, input_precision="ieee")
            done = k0 + BLOCK_K
            if done % CHAIN == 0 or done >= inner:
                total += chain
                chain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            total = tl.dot(a, b, total)
    return total


@triton.jit
def _parts(s, t, row0, width, at, mask):
    """Read s[t, at], zero where the mask (BLOCK_M, BLOCK_E) is false."""
    here = (t - row0)[:, None] * width + at[None, :]
    return tl.load(s + row0.to(tl.int64) * width + here, mask=mask, other=0.0)


@triton.jit
def _odd(values):
    """Mark what is not finite with 1, the rest with 0."""
    return tl.where(tl.abs(values) < float("inf"), 0, 1)


@triton.jit
def _together(
    total, s, w, w1, ids, offsets, t, row0, column0, first, groups, rows, outer, slots, group_stride, slot_stride, n,
    adapters, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, dtype: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add the slots of the groups that the tile meets to its one accumulator, BLOCK_E terms a step.

    A slot fills whole blocks of 16 terms; a dead one adds zeros, which changes no bit. To select the sum of the group's
    rows would take a second accumulator, and with it half the tile. So s is selected instead: zero in the rows of other
    groups. That is enough unless w is not finite: then every row of the tile gets NaN, and the caller, who sees it, has
    the tile summed again, careful: w selected to its finite values, which keeps it from going straight to the product.
    """
    PADDED: tl.constexpr = (RANK + 15) // 16 * 16
    columns = column0 + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    steps = tl.cdiv(slots * PADDED, BLOCK_E)
    for i in tl.range(0, groups * steps, num_stages=1 if CAREFUL else AHEAD):
        group = first + i // steps
        e = i % steps * BLOCK_E + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
        slot, j = e // PADDED, e % PADDED
        adapter = id_of(ids, group, slot, group_stride, slot_stride, slot < slots)[:, None]  # (BLOCK_E, 1)
        live = is_live(adapter, adapters) & (j < RANK)[:, None]  # (BLOCK_E, 1)
        begin, end = rows_of(offsets, rows, group)
        mine = (t >= begin) & (t < tl.minimum(end, rows))  # (BLOCK_M,)
        a = _parts(s, t, row0, slots * RANK, slot * RANK + j, mine[:, None] & tl.reshape(live, (1, BLOCK_E)))
        inside = j[:, None] * outer + columns  # (BLOCK_E, BLOCK_N)
        b = read_pool(w, w1, n, adapter, RANK * outer, inside, live & (columns < outer), dtype)
        if CAREFUL:
            b = tl.where(_odd(b.to(tl.float32)) > 0, 0.0, b).to(dtype)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _poison(
    y, w, w1, ids, offsets, row0, column0, first, groups, rows, outer, slots, group_stride, slot_stride, n, adapters,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write NaN where a group's own w is not finite: after the sums, whose registers it would not leave alone."""
    tl.debug_barrier()  # other threads may have written these elements
    columns = column0 + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    steps = tl.cdiv(slots * RANK, BLOCK_E)
    for i in tl.range(0, groups * steps, num_stages=1):
        group = first + i // steps
        e = i % steps * BLOCK_E + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
        slot, j = e // RANK, e % RANK
        adapter = id_of(ids, group, slot, group_stride, slot_stride, slot < slots)[:, None]  # (BLOCK_E, 1)
        mask = is_live(adapter, adapters) & (columns < outer)  # (BLOCK_E, BLOCK_N)
        b = read_pool(w, w1, n, adapter, RANK * outer, j[:, None] * outer + columns, mask, y.dtype.element_ty)
        ill = tl.max(_odd(b.to(tl.float32)), 0)[None, :] > 0  # (1, BLOCK_N)
        begin, end = rows_of(offsets, rows, group)
        for t0 in range(tl.maximum(begin, row0), tl.minimum(tl.minimum(end, rows), row0 + BLOCK_M), 16):
            t = t0 + tl.arange(0, 16)[:, None]  # (16, 1)
            at = t.to(tl.int64) * outer + columns  # (16, BLOCK_N)
            tl.store(y + at, float("nan"), (t < tl.minimum(end, row0 + BLOCK_M)) & ill)


@triton.jit
def _apart(
    total, s, w, w1, ids, offsets, seeds, keys, t, row0, column0, first, groups, rows, outer, slots, group_stride,
    slot_stride, n, adapters, trained, threshold,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Sum each slot from zero, CHAIN terms at most, then select its rows and kept columns and add: fp32 and dropout.

    A dead slot's sum is zero, which changes no bit.
    """
    STEPS: tl.constexpr = (RANK + BLOCK_E - 1) // BLOCK_E
    columns = column0 + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    chain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(groups * slots * STEPS):
        group = first + i // (slots * STEPS)
        slot, j0 = i // STEPS % slots, i % STEPS * BLOCK_E
        j = j0 + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
        adapter = id_of(ids, group, slot, group_stride, slot_stride, slot < slots)
        inside = j < tl.where(is_live(adapter, adapters), RANK, 0)  # (BLOCK_E,)
        a = _parts(s, t, row0, slots * RANK, slot * RANK + j, (t < rows)[:, None] & inside[None, :])
        at = j[:, None] * outer + columns
        lanes = adapter + tl.zeros((BLOCK_E, 1), tl.int32)  # (BLOCK_E, 1)
        b = read_pool(w, w1, n, lanes, RANK * outer, at, inside[:, None] & (columns < outer), dtype)
        chain = tl.dot(a, b, chain, input_precision="ieee")
        done = j0 + BLOCK_E
        if done % CHAIN == 0 or done >= RANK:
            begin, end = rows_of(offsets, rows, group)
            chosen = ((t >= begin) & (t < end))[:, None]  # (BLOCK_M, 1)
            if seeds is not None:
                below = tl.where(adapter < trained, 0, threshold)
                chosen = chosen & kept(seeds, keys, group, t, t < rows, slot, column0, below, BLOCK_N)
            total = tl.where(chosen, total + chain, total)
            chain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return total


@triton.jit
def _finish(total, y, bias, t, row0, column0, rows, outer, BLOCK_N: tl.constexpr):
    """Add the bias, round once and write."""
    columns = column0 + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < outer, other=0.0).to(tl.float32)
    at = (t - row0)[:, None] * outer + columns  # inside a tile 32 bits are enough for widths below 2^24
    tl.store(y + row0.to(tl.int64) * outer + at, total.to(y.dtype.element_ty), (t < rows)[:, None] & (columns < outer))


_FREE = ["rows", "groups", "slots", "group_stride", "slot_stride", "n", "adapters", "trained", "threshold"]


@triton.jit(do_not_specialize=_FREE)
def linear_kernel(
    y, x, weight, bias, s, w, w1, ids, offsets, seeds, keys,
    rows, inner, outer, x_stride, groups, slots, group_stride, slot_stride, n, adapters, trained, threshold,
    RANK: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # y = x W^T + sum_p s_p w_n + bias; x (T, K), W (O, K), s (T, P, r), w (N, r, O); transposed y = x W, x (T, O).
    # A program owns one (BLOCK_M, BLOCK_N) tile of y after another, rows of any groups, in an order that shares L2.
    # 16-bit order: one fp32 accumulator through ascending k in instructions of 16 terms, then through the slots of each
    # group, ascending, each in instructions of its own, zeros filling the last. On 9.0 that is wgmma of 64 rows for all
    # T, on 8.x mma.sync: tile, T and other groups decide what shares an instruction, not what a row sums in it.
    # fp32 order: chains of 256 fused multiply-adds from zero, added in turn, each slot a chain of its own: as on CPUs.
    # NaN and Inf stay at home: a tile whose sum has some is summed again, where other groups' rows meet zeros of s and
    # finite w, and own rows get NaN where w is not finite.
    # Bound by the tensor cores from about T = 300 on, below that by reading W. 4096 x 4096, T = 2048, P r = 64, 16-bit:
    # 2 T O (K + P r) = 70 GFLOP, 88 us at 790 TFLOP/s; x, W, s, w, y 70 MB, 23 us at 3.0 TB/s. Not yet measured.
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(outer, BLOCK_N)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _place(index, row_tiles, column_tiles)
        row0, column0 = row_tile * BLOCK_M, column_tile * BLOCK_N
        t = row0 + tl.arange(0, BLOCK_M)
        total = _base(
            x, weight, t, row0, column0, rows, inner, outer, x_stride,
            TRANSPOSED, PACKED, TMA, CHAINED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        odd = 0
        if w is not None:
            first = group_of(offsets, groups, row0)
            met = group_of(offsets, groups, tl.minimum(row0 + BLOCK_M, rows) - 1) - first + 1
            if CHAINED or seeds is not None:
                total = _apart(
                    total, s, w, w1, ids, offsets, seeds, keys, t, row0, column0, first, met, rows, outer, slots,
                    group_stride, slot_stride, n, adapters, trained, threshold, RANK, BLOCK_M, BLOCK_N, BLOCK_E,
                    y.dtype.element_ty,
                )  # fmt: skip
            else:
                total = _together(
                    total, s, w, w1, ids, offsets, t, row0, column0, first, met, rows, outer, slots, group_stride,
                    slot_stride, n, adapters, RANK, BLOCK_N, BLOCK_E, y.dtype.element_ty, False,
                )  # fmt: skip
                odd = _odd(
                    tl.sum(total - total)
                )  # once a tile; NaN if one is not finite, in fewer registers than flags
                if odd > 0:
                    total = _base(
                        x, weight, t, row0, column0, rows, inner, outer, x_stride,
                        TRANSPOSED, PACKED, TMA, CHAINED, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                    total = _together(
                        total, s, w, w1, ids, offsets, t, row0, column0, first, met, rows, outer, slots, group_stride,
                        slot_stride, n, adapters, RANK, BLOCK_N, BLOCK_E, y.dtype.element_ty, True,
                    )  # fmt: skip
        _finish(total, y, bias, t, row0, column0, rows, outer, BLOCK_N)
        if w is not None:  # noqa: SIM102 (decided by the compiler, the next by the values)
            if odd > 0:
                _poison(
                    y, w, w1, ids, offsets, row0, column0, first, met, rows, outer, slots, group_stride, slot_stride, n,
                    adapters, RANK, BLOCK_M, BLOCK_N, BLOCK_E,
                )  # fmt: skip


def _describable(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the copy engine can read both: matrices (panels are none) whose rows start at 16 bytes.

    Its rows do not overlap either, as those of an expanded tensor would.
    """
    aligned = not any(t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (x, weight))
    return aligned and weight.dim() == 2 and x.numel() > 0 and x.stride(0) >= x.shape[1]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor,
    offsets: Tensor | None, out_features: int, transposed: bool, drop: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """Sum base product and adapters in one accumulator: y = x W^T + sum_p s_p w_n + bias, or x W if transposed.

    Args:
        x: (T, K), transposed: (T, O); fp32, fp16 or bf16; the last dimension contiguous.
        weight: (O, K), or panels (ceil(O/32), K, 32) as ``pack`` returned them; type of ``x``.
        bias: (O,), transposed: (K,); type of ``x``, or None.
        s: (T, P, r), type of ``x``.
        w, w1: (N, r, D) and (M, r, D) or None, D the width of the result; type of ``x``, or fp32 (rounded on reading).
        ids: (G, P) int32, any strides; n = ids[group(t), p] is dead outside 0..N+M-1.
        offsets: (G+1,) int32, or None for one group of all rows.
        out_features: O, also where the result is (T, K).
        drop: masks of the slots' parts, where the adapter is trainable; transposed only.

    Returns:
        y: (T, O), transposed: (T, K); type of ``x``.

    Notes:
        Panels serve where they are at hand but have no faster path on a device. The bits of a row depend on the row,
        its group's adapters and K alone: not on T, G, other rows or how the operands lie in memory; ``linear_kernel``
        gives the order of sums. With fp16 and bf16 a live adapter's Inf comes out as NaN.
    """
    y = x.new_empty(len(x), weight.shape[1] if transposed else out_features)  # (T, O) or (T, K)
    if y.numel():
        facts = chip(x.device)
        op = "linear" if drop is None else "linear_dropout"
        block = tile(op, facts.capability, x.element_size(), len(x), y.shape[1])
        tma = facts.capability >= 90 and x.element_size() == 2
        run(y, x, weight, bias, s, w, w1, ids, offsets, transposed, drop, block, facts.multiprocessors, tma)
    return y


def run(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, w: Tensor, w1: Tensor | None, ids: Tensor,
    offsets: Tensor | None, transposed: bool, drop: Dropout | None, block: Tile, multiprocessors: int, tma: bool,
) -> None:  # fmt: skip
    """Launch the kernel with a given tile; ``tma``: by descriptors, where the operands' addresses allow them.

    Elsewhere the tile shrinks to ``ODD``. Rows that start at odd multiples of 2 bytes are then read one element at a
    time, which no asynchronous copy can do: nothing is fetched ahead, a slow path for odd sizes.
    """
    (rows, outer), (_, slots, rank) = y.shape, s.shape
    operands: tuple[Tensor | TensorDescriptor, ...] = (x, weight)
    if not _describable(x, weight):
        block, tma = block._replace(block_n=min(block.block_n, ODD[0]), block_k=min(block.block_k, ODD[1])), False
    if tma:
        box = [block.block_k, block.block_n] if transposed else [block.block_n, block.block_k]
        blocks = ([block.block_m, block.block_k], box)
        operands = tuple(TensorDescriptor.from_tensor(t, b) for t, b in zip((x, weight), blocks))
    adapters = len(w) + (0 if w1 is None else len(w1))
    some = adapters * slots * rank > 0
    apart = x.dtype == torch.float32 or drop is not None
    terms = rank if apart else slots * (-(-rank // 16) * 16)
    tiles = -(-rows // block.block_m) * -(-outer // block.block_n)
    launch(
        linear_kernel, (min(tiles, multiprocessors * block.per_sm),),
        y, *operands, bias, s, w if some else None, w1 if some else None, ids, offsets,
        *masks(drop)[:2], rows, x.shape[1], outer, x.stride(0), len(ids), slots, *ids.stride(), len(w), adapters,
        *masks(drop)[2:], RANK=rank, TRANSPOSED=transposed, PACKED=weight.dim() == 3, TMA=tma,
        CHAINED=x.dtype == torch.float32, BLOCK_M=block.block_m, BLOCK_N=block.block_n, BLOCK_K=block.block_k,
        BLOCK_E=16 if apart or block.block_n > BY_32 or terms <= 16 else 32,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
