"""The one rule of tolerance, and the shapes with the reason each is there."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: rows of each group, K, O, r, N adapters, table (G, P), strided rows or not."""

    groups: tuple[int, ...]
    inputs: int
    outputs: int
    rank: int
    adapters: int
    table: tuple[tuple[int, ...], ...]
    strided: bool = False
    reason: str = ""

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")


SHAPES = (
    Shape((1,), 1, 1, 1, 1, ((0,),), reason="all ones"),
    Shape((5,), 7, 5, 3, 2, ((1, 0),), reason="primes below one vector"),
    Shape((4, 0, 3), 37, 41, 5, 3, ((0, -1), (1, 2), (2, 1)), reason="empty group, primes above one vector"),
    Shape((3, 2), 257, 33, 8, 4, ((3, -1, 1), (-1, -1, -1)), reason="one past a block and a panel, a dead group"),
    Shape((9, 8), 64, 64, 8, 3, ((2, 2), (0, 1)), reason="same id twice"),
    Shape((2, 2, 2), 64, 96, 16, 3, ((0,), (1,), (2,)), strided=True, reason="routing, strided rows"),
    Shape((6,), 30, 50, 4, 2, ((),), reason="no slots"),
    Shape((0,), 16, 16, 2, 1, ((0,),), reason="no rows"),
    Shape((2, 3), 600, 40, 33, 2, ((-1, 1), (0, -1)), reason="three blocks, rank above a panel"),
    Shape((3,), 12, 300, 300, 1, ((0,),), reason="rank above a block"),
)


@dataclass
class Case:
    """Tensors of one case; ``a``, ``b`` fp32 or of the type of ``x``."""

    x: Tensor  # (T, K)
    weight: Tensor  # (O, K)
    bias: Tensor  # (O,)
    a: Tensor  # (N, r, K)
    b: Tensor  # (N, r, O)
    ids: Tensor  # (G, P)
    offsets: Tensor  # (G + 1,)
    scales: Tensor  # (N,)
    dy: Tensor  # (T, O)

    def to(self, device: str) -> Case:
        """Move every tensor; rows keep their strides."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        if self.x.stride(0) != self.x.shape[1] and len(self.x) > 1:
            wide = moved["x"].new_empty(len(self.x), self.x.stride(0))
            moved["x"] = wide[:, : self.x.shape[1]].copy_(moved["x"])
        return replace(self, **moved)


def make(shape: Shape, dtype: torch.dtype, pool: torch.dtype | None = None, seed: int = 0) -> Case:
    """Draw a case; values have the sizes that a layer sees."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, by: float = 1.0, as_: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * by).to(as_)

    rows, k, o, r, n = sum(shape.groups), shape.inputs, shape.outputs, shape.rank, shape.adapters
    pool = pool or dtype
    x = draw(rows, 2 * k)[:, :k] if shape.strided else draw(rows, k)
    ids = torch.tensor(shape.table, dtype=torch.int32).view(len(shape.groups), -1)
    offsets = torch.tensor([0, *torch.tensor(shape.groups).cumsum(0).tolist()], dtype=torch.int32)
    return Case(
        x,
        draw(o, k, by=k**-0.5),
        draw(o),
        draw(n, r, k, by=k**-0.5, as_=pool),
        draw(n, r, o, as_=pool),
        ids,
        offsets,
        (torch.rand(n, generator=g) + 0.5),
        draw(rows, o),
    )


def plain(case: Case, dtype: torch.dtype, base: bool) -> Tensor:
    """Compute the layer group by group in plain torch, in the given type: naive PEFT, or the truth in fp64."""
    x, weight, bias, a, b = (t.to(case.x.dtype).to(dtype) for t in (case.x, case.weight, case.bias, case.a, case.b))
    y = torch.nn.functional.linear(x, weight, bias) if base else x.new_zeros(len(x), b.shape[2])  # (T, O)
    for g, row in enumerate(case.ids.tolist()):
        rows = slice(int(case.offsets[g]), int(case.offsets[g + 1]))
        for n in row:
            if n >= 0:
                y[rows] = y[rows] + (x[rows] @ a[n].t()) * case.scales[n].to(dtype) @ b[n]
    return y


def size_of_terms(case: Case) -> float:
    """Bound what the adapters add to any element: sum over p of |scale| |x| |a| |b|, Euclidean norms."""
    if not case.x.numel() or not case.ids.numel():
        return 0.0
    a, b = case.a.double().flatten(1).norm(dim=1), case.b.double().flatten(1).norm(dim=1)
    per_group = [sum(float(case.scales[n] * a[n] * b[n]) for n in row if n >= 0) for row in case.ids.tolist()]
    return float(case.x.double().norm(dim=1).max()) * max(per_group)


def assert_error(got: list[Tensor], same_type: list[Tensor], exact: list[Tensor], terms: float) -> None:
    """Hold an error against fp64 to twice torch's own, pooled over the given draws, plus what rounding alone may do.

    ``|got - exact| <= 2 |torch - exact| + ulp(max |exact|) + 4 eps32 terms``, in maximum and in root mean square.
    """
    ours, theirs, truth = (torch.cat([t.double().flatten() for t in ts]) for ts in (got, same_type, exact))
    if not len(truth):
        return
    slack = ulp(float(truth.abs().max()), got[0].dtype) + 4 * torch.finfo(torch.float32).eps * terms
    for name, norm in (("maximum", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error, bound = float(norm(ours - truth)), 2 * float(norm(theirs - truth)) + slack
        assert error <= bound, f"{name} error {error:.3e} above {bound:.3e}"


def ulp(value: float, dtype: torch.dtype) -> float:
    """Give the distance between neighbours of a value in a type."""
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(value, 1e-30)).log2().floor().item()
