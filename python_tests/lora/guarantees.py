"""The guarantees of the ops, one function each; ``test_guarantees`` runs them, and breaks each of them once.

A place is a backend, a kind of device and a type. Cases are drawn and compared on the CPU, wherever they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from numerics import SHAPES, TYPES, Case, Shape, assert_error, make, plain, size_of_terms
from torch import Tensor

from s3t_ext import masked_lora, masked_lora_linear
from s3t_ext.lora.kernels import IMPLS, serves

MANY = Shape((5, 0, 9, 1, 7), 300, 70, 5, 6, ((0, 1), (2, -1), (-1, 3), (4, 1), (2, 0)), reason="many groups")


UNEVEN = Shape(
    (*(1, 2, 3, 5, 8, 13, 0) * 10, 21, 0, 34, 1, 1),
    64,
    48,
    8,
    75,
    tuple((g, (7 * g + 3) % 75 if g % 3 else -1) for g in range(75)),
    reason="75 uneven groups",
)

_no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = (pytest.mark.gpu, _no_gpu)


def places(op: str = "shrink", types: tuple[torch.dtype, ...] = TYPES) -> list:
    """List (backend, device, dtype) for every backend of an op, each on every kind of device that it serves."""
    return [
        pytest.param(backend, device, dtype, id=f"{backend}-{device}-{dtype}", marks=GPU if device == "cuda" else ())
        for backend in IMPLS[op]
        for device in ("cpu", "cuda")
        for dtype in types
        if serves(backend, op, device, dtype)
    ]


def every_place(op: str = "shrink", types: tuple[torch.dtype, ...] = TYPES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "device", "dtype"), places(op, types))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward(case: Case, backend: str, base: bool) -> Tensor:
    """Run the layer (mode exact), or the adapters' sum alone."""
    if not base:
        return masked_lora(case.x, case.a, case.b, case.ids, case.offsets, scale=case.scales, backend=backend)
    return masked_lora_linear(
        case.x,
        case.weight,
        case.bias,
        case.a,
        case.b,
        case.ids,
        case.offsets,
        scale=case.scales,
        mode="exact",
        backend=backend,
    )


def gradients(case: Case, backend: str, base: bool, device: str = "cpu") -> dict[str, Tensor]:
    """Run forward and backward on a device; give y, dx, da, db, on the CPU."""
    case = case.to(device)
    leaves = [t.detach().requires_grad_() for t in (case.x, case.a.clone(), case.b.clone())]
    y = forward(replace(case, x=leaves[0], a=leaves[1], b=leaves[2]), backend, base)
    y.backward(case.dy)
    found = {"y": y.detach(), **{name: t.grad for name, t in zip(("dx", "da", "db"), leaves)}}
    return {name: value.cpu() for name, value in found.items()}


def error_rule(
    backend: str, dtype: torch.dtype, pool: torch.dtype, shape: Shape, base: bool, device: str = "cpu"
) -> None:
    """Guarantee 6, forward and backward."""
    seeds = range(8 if sum(shape.groups) * shape.rank < 64 else 1)
    found: dict[str, tuple[list, list, list]] = {}
    terms = 0.0
    for seed in seeds:
        case = make(shape, dtype, pool, seed)
        terms = max(terms, size_of_terms(case))
        ours = gradients(case, backend, base, device)
        same, exact = (_autograd(case, t, base) for t in (dtype, torch.float64))
        for name in ours:
            lists = found.setdefault(name, ([], [], []))
            for values, value in zip(lists, (ours[name], same[name], exact[name])):
                values.append(value)
    for name, lists in found.items():
        scale = terms if name == "y" else max(float(t.abs().max()) if t.numel() else 0.0 for t in lists[2])
        assert_error(*lists, scale * max(shape.rank, 1))


def _autograd(case: Case, dtype: torch.dtype, base: bool) -> dict[str, Tensor]:
    leaves = [t.detach().to(case.x.dtype).to(dtype).requires_grad_() for t in (case.x, case.a, case.b)]
    typed = replace(case, x=leaves[0], a=leaves[1], b=leaves[2], weight=case.weight.to(dtype), bias=case.bias.to(dtype))
    y = plain(typed, dtype, base)
    if y.requires_grad:
        y.backward(case.dy.to(dtype))
    zero = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return {"y": y.detach(), **dict(zip(("dx", "da", "db"), zero))}


def dead_is_unread(backend: str, dtype: torch.dtype, base: bool, device: str = "cpu") -> None:
    """Guarantee 1: poison in a dead adapter changes no bit, and masked is as absent."""
    case = make(MANY, dtype)
    case = replace(case, ids=torch.where(case.ids == 2, -1, case.ids))
    clean = gradients(case, backend, base, device)
    for poison in (torch.nan, torch.inf):
        a, b = case.a.clone(), case.b.clone()
        for n in (2, 5):  # 2 is masked everywhere, 5 is named nowhere
            a[n], b[n] = poison, poison
        dirty = gradients(replace(case, a=a, b=b), backend, base, device)
        same_bits(clean, dirty)
    keep = [0, 1, 3, 4]
    names = torch.tensor([0, 1, -1, 2, 3, -1, -1], dtype=torch.int32)  # new name of each old id; the last for -1
    absent = replace(case, a=case.a[keep], b=case.b[keep], scales=case.scales[keep], ids=names[case.ids.long()])
    less = gradients(absent, backend, base, device)
    same_bits({**clean, "da": clean["da"][keep], "db": clean["db"][keep]}, less)
    assert not clean["da"][[2, 5]].any()


def live_elsewhere_stays(backend: str, dtype: torch.dtype, base: bool, device: str = "cpu") -> None:
    """Guarantee 1: NaN in a live adapter, or in a row of another group, stays with those that own it."""
    case = make(MANY, dtype)
    clean = gradients(case, backend, base, device)
    a = case.a.clone()
    a[3] = torch.nan  # group 2 alone names it
    sick = gradients(replace(case, a=a), backend, base, device)
    lo, hi = int(case.offsets[2]), int(case.offsets[3])
    others = [t for t in range(len(case.x)) if not lo <= t < hi]
    assert sick["y"][lo:hi].isnan().any()
    for name in ("y", "dx"):
        same_bits({name: clean[name][others]}, {name: sick[name][others]})
    healthy = [0, 1, 2, 4, 5]
    same_bits({k: clean[k][healthy] for k in ("da", "db")}, {k: sick[k][healthy] for k in ("da", "db")})
    x = case.x.clone()
    x[lo] = torch.inf  # one row of group 2; its adapter 3 falls ill, nobody else
    sick = gradients(replace(case, x=x), backend, base, device)
    rest = [t for t in range(len(x)) if t != lo]
    same_bits({"y": clean["y"][rest], "dx": clean["dx"][rest]}, {"y": sick["y"][rest], "dx": sick["dx"][rest]})
    same_bits({k: clean[k][healthy] for k in ("da", "db")}, {k: sick[k][healthy] for k in ("da", "db")})


def batch_invariant(backend: str, dtype: torch.dtype, base: bool, device: str = "cpu") -> None:
    """Guarantee 2: bits depend neither on other groups' rows, nor on T, G, padding or threads."""
    case = make(MANY, dtype)
    whole = gradients(case, backend, base, device)
    for count in (1, 2, 3, 4) if device == "cpu" else ():
        with threads(count):
            same_bits(whole, gradients(case, backend, base, device))
    for g in range(len(case.ids)):
        rows = slice(int(case.offsets[g]), int(case.offsets[g + 1]))
        size = rows.stop - rows.start
        alone = replace(
            case,
            x=case.x[rows],
            dy=case.dy[rows],
            ids=case.ids[g : g + 1],
            offsets=torch.tensor([0, size], dtype=torch.int32),
        )
        part = gradients(alone, backend, base, device)
        same_bits({k: whole[k][rows] for k in ("y", "dx")}, {k: part[k] for k in ("y", "dx")})
        owned = [n for n in case.ids[g].tolist() if n >= 0 and (case.ids == n).sum() == 1]
        same_bits({k: whole[k][owned] for k in ("da", "db")}, {k: part[k][owned] for k in ("da", "db")})
        for t in range(size):  # and row by row
            one = replace(
                alone, x=alone.x[t : t + 1], dy=alone.dy[t : t + 1], offsets=torch.tensor([0, 1], dtype=torch.int32)
            )
            same_bits({"y": part["y"][t : t + 1]}, {"y": forward(one.to(device), backend, base).cpu()})


def same_bits(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Compare bit for bit, NaN equal to NaN."""
    for name, value in expected.items():
        assert value.shape == got[name].shape, name
        assert torch.equal(value.nan_to_num(1e30, 2e30, -2e30), got[name].nan_to_num(1e30, 2e30, -2e30)), name


ALL_SHAPES = (*SHAPES, MANY, UNEVEN)
