"""Cases for the native kernels, and their oracle: the contract of the sums restated in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s3t_ext.lora.kernels import native

TYPES = (torch.float32, torch.float16, torch.bfloat16)
POOLS = [(x, w, w1) for x in TYPES for w in {x, torch.float32} for w1 in {x, torch.float32}]
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
    }


def every_op(v: dict) -> dict[str, Tensor]:
    """Run the forward and backward of a layer, op by op."""
    table = (v["ids"], v["offsets"])
    out, adapters = len(v["weight"]), len(v["scales"])
    s = native.shrink(v["x"], v["a"], v["a1"], *table, v["scales"], 1.0)
    y = v["y"].clone()
    native.expand_(y, s, v["b"], v["b1"], *table)
    ds = native.shrink(v["y"], v["b"], v["b1"], *table, None, 0.7)
    return {
        "s": s,
        "ds": ds,
        "y": y,
        "linear": native.linear(v["x"], v["weight"], v["bias"], s, v["b"], v["b1"], *table, out, False),
        "dx": native.linear(v["y"], v["weight"], None, ds, v["a"], v["a1"], *table, out, True),
        "da": native.outer(ds, v["x"], *table, 0, adapters, torch.float32),
        "db": native.outer(s, v["y"], *table, 0, adapters, v["x"].dtype),
    }


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name]), name


# The oracle.


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Round a * b + c once to fp32: long double holds the product exactly and rounds the sum far below fp32."""
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


def in_blocks(total: np.ndarray, a: np.ndarray, b: np.ndarray, pairs: bool) -> np.ndarray:
    """Add a (M, K) @ b (K, N) to a total (M, N) in the order of the contract; of a pair the second comes first."""
    for start in range(0, a.shape[1], BLOCK):
        chain = np.zeros_like(total)
        terms = range(start, min(start + BLOCK, a.shape[1]))
        for k in sorted(terms, key=lambda k: k ^ 1) if pairs else terms:
            chain = fma(a[:, k, None], b[k], chain)
        total = total + chain
    return total


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

    add_blocks = partial(in_blocks, pairs=dtype == torch.bfloat16)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).float().numpy()

    P, r = v["ids"].shape[1], v["a"].shape[1]
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
            s[rows, p] = rounded(add_blocks(zeros(count, r), x[rows], pools["a"][n].T) * scale)
            ds[rows, p] = rounded(add_blocks(zeros(count, r), y[rows], pools["b"][n].T) * np.float32(0.7))
            base = add_blocks(base, s[rows, p], pools["b"][n])
            dx = add_blocks(dx, ds[rows, p], pools["a"][n])
            adapted = add_blocks(adapted, s[rows, p], pools["b"][n])
            da[n] = add_blocks(da[n], ds[rows, p].T, x[rows])
            db[n] = add_blocks(db[n], s[rows, p].T, y[rows])
        out["linear"][rows], out["dx"][rows] = base + bias, dx
        out["y"][rows] = y[rows] + adapted if ids else y[rows]
    result = {name: torch.from_numpy(value).to(dtype) for name, value in {**out, "s": s, "ds": ds, "db": db}.items()}
    return {**result, "da": torch.from_numpy(da)}
