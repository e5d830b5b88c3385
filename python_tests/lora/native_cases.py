"""Cases for the native kernels, and their oracle: the contract of the sums restated in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s3t_ext.lora.kernels import dropout, native

TYPES = (torch.float32, torch.float16, torch.bfloat16)
_AND_FLOAT = {x: tuple(dict.fromkeys((x, torch.float32))) for x in TYPES}  # in one order: workers collect alike
POOLS = [(x, w, w1) for x in TYPES for w in _AND_FLOAT[x] for w1 in _AND_FLOAT[x]]
BLOCK = 256  # terms of one chain of the sum


@dataclass(frozen=True)
class Case:
    """One call of every op: x (T, K) through weight (O, K), adapters (N, r, K) and (N, r, O), a second pool of M."""

    why: str
    K: int
    O: int
    r: int
    sizes: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    N: int = 3
    M: int = 2
    offsets: bool = True
    strided: bool = False
    dropped: bool = False  # dropout of the last frozen adapter and of the second pool


def turns(groups: int, slots: int, adapters: int = 5) -> tuple[tuple[int, ...], ...]:
    """Name all adapters in turn, the two pools side by side in every group; -1 now and then."""
    return tuple(tuple((g + 2 * p) % (adapters + 1) - 1 for p in range(slots)) for g in range(groups))


CASES = [
    Case("one of everything", 1, 1, 1, (1,), ((0,),), N=1, M=0),
    Case("primes: remainders of every tile", 13, 31, 3, (7, 5), ((0, 2), (-1, 4))),
    Case("full panels and tiles", 64, 64, 8, (32, 16), ((0, 1), (3, 2))),
    Case("one past a block of the sum and a panel", 257, 33, 16, (9,), ((1,),)),
    Case("three blocks; a group past a chunk and a block of rows", 520, 40, 8, (3, 300, 0, 1), ((4, -1, 0),) * 4),
    Case("rank past a panel", 40, 35, 33, (6, 4), ((0, 1), (2, 99))),
    Case("rank past a block", 35, 37, 300, (4,), ((1, 3),)),
    Case("no rows", 16, 16, 4, (0, 0), ((0, 1), (2, 3))),
    Case("no slots", 16, 16, 4, (5, 3), ((), ())),
    Case("no groups of no offsets: one group", 20, 24, 4, (11,), ((0, -1, 3),), offsets=False),
    Case("all dead, by every kind of dead id", 30, 20, 5, (4, 4), ((-1, 5), (2**31 - 1, -(2**31)))),
    Case("no adapters at all", 10, 12, 2, (4,), ((0, -1),), N=0, M=0),
    Case("second pool alone", 10, 12, 2, (4,), ((0, -1, 1),), N=0),
    Case("the same id twice in a row, and in two groups", 50, 60, 8, (10, 10), ((1, 1, 0), (0, -1, 1))),
    Case("empty groups first, between and last", 24, 40, 8, (0, 9, 0, 0, 4, 0), ((0,), (1,), (2,), (3,), (4,), (0,))),
    Case("strided rows and ids", 48, 50, 8, (5, 12), ((0, 3), (2, -1)), strided=True),
]
# Strips of several panels, chosen by panels, rows and threads: the last one partial, of y, and of dx.
STRIPS = [
    Case("groups of 1, 2, 3, 9 and 17 rows", 10, 520, 5, (1, 2, 3, 9, 17), turns(5, 3)),
    Case("groups of 1, 2, 3, 9 and 17 rows, turned", 520, 10, 5, (1, 2, 3, 9, 17), turns(5, 3)),
    Case("groups past the edges of three chunks", 8, 150, 3, (255, 2, 260, 1, 82), turns(5, 2)),
    Case("groups past the edges of three chunks, turned", 150, 8, 3, (255, 2, 260, 1, 82), turns(5, 2)),
]
# Where the CPU kernels do one thing up to a limit and another past it; too large for the slower backends' emulators.
EDGES = [
    *STRIPS,
    Case("half a pair at the end of K, O and r", 45, 37, 7, (1, 5, 3), turns(3, 3)),
    Case("one row, whole panels", 300, 160, 4, (1,), ((0, 3),)),
    Case("two rows, three blocks and a part of a panel", 515, 150, 4, (2,), ((4, 1),)),
    Case("two rows, panels of slots that do not all fit", 10, 150, 43, (2,), ((0, 1),)),
    Case("four rows of three groups", 30, 150, 8, (1, 2, 1), turns(3, 2)),
    Case("rank one, more live slots than wait together", 20, 40, 1, (3, 19, 2), ((0, 1, 2) * 12, *turns(2, 36))),
    Case("slots that fill a block of terms, and one more", 10, 70, 31, (2, 19), ((0, 1, 2) * 3, (3, 4, 3) * 3)),
    Case("rank one past a block, beside another slot", 10, 70, 257, (2, 19), ((0, 1, 2), (4, -1, 0))),
    Case("strided rows of whole panels", 64, 96, 8, (2, 5, 1), turns(3, 2), strided=True),
    Case("dropout, of some slots", 270, 150, 9, (1, 5, 0, 19), turns(4, 4), dropped=True),
    Case("dropout, ranks past a panel and rows past a chunk", 10, 45, 33, (250, 10), ((2, 4), (0, 3)), dropped=True),
]
MIXED = Case("mixed", 70, 45, 9, (5, 130, 0, 3, 40), ((0, -1), (1, 4), (2, 2), (-1, -1), (3, 1)))


def make(case: Case, types: tuple[torch.dtype, ...] = (torch.float32,) * 3, seed: int = 0) -> dict:
    """Draw the tensors of a case; strided ones lie in larger tensors full of NaN."""
    dtype, w_type, w1_type = types
    random = torch.Generator().manual_seed(seed)
    T = sum(case.sizes)

    def draw(*shape: int, type_: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(type_)

    def spread(x: Tensor) -> Tensor:
        if not case.strided:
            return x
        wide = x.new_full((len(x), x.shape[1] + 7), float("nan"))
        wide[:, 3:-4] = x
        return wide[:, 3:-4]

    def keys(count: int) -> Tensor:
        return torch.randint(-(2**62), 2**62, (count,), generator=random)

    ids = torch.tensor(case.ids, dtype=torch.int64).to(torch.int32).view(len(case.sizes), -1)  # (G, P)
    if case.strided:
        ids = torch.stack([ids, torch.full_like(ids, -7)], 2).flip(1).contiguous().flip(1)[:, :, 0]
    offsets = torch.tensor(np.cumsum([0, *case.sizes]), dtype=torch.int32) if case.offsets else None
    return {
        "x": spread(draw(T, case.K)),
        "y": spread(draw(T, case.O)),
        "weight": draw(case.O, case.K),
        "bias": draw(case.O),
        "a": draw(case.N, case.r, case.K, type_=w_type),
        "b": draw(case.N, case.r, case.O, type_=w_type),
        "a1": draw(case.M, case.r, case.K, type_=w1_type) if case.M else None,
        "b1": draw(case.M, case.r, case.O, type_=w1_type) if case.M else None,
        "ids": ids,
        "offsets": offsets,
        "scales": torch.rand(case.N + case.M, generator=random) + 0.5,
        "drop": dropout.Dropout(0.3, keys(len(case.sizes)), keys(T), case.N - 1) if case.dropped else None,
    }


def twin(x: Tensor) -> Tensor:
    """Copy with the strides that it has: ``clone`` would close the gaps between rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def every_op(v: dict) -> dict[str, Tensor]:
    """Run the forward and backward of a layer, op by op."""
    table, drop = (v["ids"], v["offsets"]), v["drop"]
    out, adapters = len(v["weight"]), len(v["scales"])
    s = native.shrink(v["x"], v["a"], v["a1"], *table, v["scales"], 1.0, drop)
    y = twin(v["y"])
    native.expand_(y, s, v["b"], v["b1"], *table, drop)
    ds = native.shrink(v["y"], v["b"], v["b1"], *table, None, 0.7, drop)
    return {
        "s": s,
        "ds": ds,
        "y": y,
        "linear": native.linear(v["x"], v["weight"], v["bias"], s, v["b"], v["b1"], *table, out, False, drop),
        "dx": native.linear(v["y"], v["weight"], None, ds, v["a"], v["a1"], *table, out, True, drop),
        "da": native.outer(ds, v["x"], *table, 0, adapters, torch.float32, drop),
        "db": native.outer(s, v["y"], *table, 0, adapters, v["x"].dtype, drop),
    }


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name]), name


# The oracle.


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round a * b + c once to fp32: long double holds the product exactly and rounds the sum far below fp32.

    The product of two halves of ordinary size is exact in fp32 itself.
    """
    wide = np.longdouble if dtype == torch.float32 else np.float32
    return (a.astype(wide, copy=False) * b + c).astype(np.float32, copy=False)


def in_blocks(total: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Add a (M, K) @ b (K, N) to a total (M, N) in the order of the contract; of a bf16 pair the second comes first."""
    for start in range(0, a.shape[1], BLOCK):
        chain = np.zeros_like(total)
        terms = range(start, min(start + BLOCK, a.shape[1]))
        for k in sorted(terms, key=lambda k: k ^ 1) if dtype == torch.bfloat16 else terms:
            chain = fma(a[:, k, None], b[k], chain, dtype)
        total = total + chain
    return total


def kept(v: dict, columns: int) -> np.ndarray:
    """Say which elements dropout keeps, (T, P, columns): all without it."""
    T, (G, P) = len(v["x"]), v["ids"].shape
    if v["drop"] is None:
        return np.ones((T, P, columns), bool)
    group = torch.repeat_interleave(torch.arange(G), v["offsets"].diff())
    return dropout.keep(v["drop"], v["ids"][group], group, columns).numpy()


def oracle(v: dict) -> dict[str, Tensor]:
    dtype = v["x"].dtype
    T, G = len(v["x"]), len(v["ids"])
    offsets = [0, T] if v["offsets"] is None else v["offsets"].tolist()
    x, y, weight, bias = (v[name].float().numpy() for name in ("x", "y", "weight", "bias"))
    pools = {}
    for name in "ab":
        parts = [p.to(dtype).float().numpy() for p in (v[name], v[name + "1"]) if p is not None]
        pools[name] = np.concatenate(parts)
    adapters = len(pools["a"])

    add_blocks = partial(in_blocks, dtype=dtype)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).float().numpy()

    P, r = v["ids"].shape[1], v["a"].shape[1]
    kept_x, kept_y = (kept(v, u.shape[1]) for u in (x, y))  # (T, P, K), (T, P, O)

    def selected(u: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return np.where(kept, u, np.float32(0))

    def add_slot(total: np.ndarray, s: np.ndarray, w: np.ndarray, kept: np.ndarray) -> np.ndarray:
        if kept.all():
            return add_blocks(total, s, w)
        return total + selected(add_blocks(np.zeros_like(total), s, w), kept)

    s, ds = zeros(T, P, r), zeros(T, P, r)
    out = {"linear": zeros(T, len(weight)), "dx": zeros(T, x.shape[1]), "y": y.copy()}
    da, db = zeros(*pools["a"].shape), zeros(*pools["b"].shape)
    for g in range(G):
        rows = slice(offsets[g], offsets[g + 1])
        ids = [(p, n) for p, n in enumerate(v["ids"][g].tolist()) if 0 <= n < adapters]
        count = offsets[g + 1] - offsets[g]
        base = add_blocks(zeros(count, len(weight)), x[rows], weight.T)
        dx = add_blocks(zeros(count, x.shape[1]), y[rows], weight)
        adapted = zeros(count, len(weight))
        for p, n in ids:
            scale = v["scales"][n].numpy()
            by_x, by_y = kept_x[rows, p], kept_y[rows, p]
            seen_x, seen_y = selected(x[rows], by_x), selected(y[rows], by_y)
            s[rows, p] = rounded(add_blocks(zeros(count, r), seen_x, pools["a"][n].T) * scale)
            ds[rows, p] = rounded(add_blocks(zeros(count, r), seen_y, pools["b"][n].T) * np.float32(0.7))
            base = add_slot(base, s[rows, p], pools["b"][n], by_y)
            dx = add_slot(dx, ds[rows, p], pools["a"][n], by_x)
            adapted = add_slot(adapted, s[rows, p], pools["b"][n], by_y)
            da[n] = add_blocks(da[n], ds[rows, p].T, seen_x)
            db[n] = add_blocks(db[n], s[rows, p].T, seen_y)
        out["linear"][rows], out["dx"][rows] = base + bias, dx
        out["y"][rows] = y[rows] + adapted if ids else y[rows]
    result = {name: torch.from_numpy(value).to(dtype) for name, value in {**out, "s": s, "ds": ds, "db": db}.items()}
    return {**result, "da": torch.from_numpy(da)}
