"""The strongest that torch can be made to do, and its plain ways beside it."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.built import Built, Cannot, leaf, live, scatter
from bench.cases import COMPILED
from bench.truth import SCALE, Inputs


def bare(i: Inputs) -> Built:
    """The plain layer, without adapters."""
    x = leaf(i.x, i)
    return Built(lambda: F.linear(x, i.weight, i.bias), x, [], lambda grads: (i.a, i.b))


class Naive(nn.Module):
    """PEFT's loop in plain torch, one parameter for each live adapter, group by group."""

    def __init__(self, i: Inputs) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias))
        grad = i.case.step != "fwd"
        self.a = nn.ParameterList([nn.Parameter(i.a[n].clone(), grad) for n in live(i)])  # (r, K) each
        self.b = nn.ParameterList([nn.Parameter(i.b[n].t().contiguous(), grad) for n in live(i)])  # (O, r) each
        self.groups = [(rows.start, rows.stop, len(names)) for rows, names in i.groups]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (T, O)
        parts, at = [], 0
        for lo, hi, count in self.groups:
            rows, part = (x, y) if len(self.groups) == 1 else (x[lo:hi], y[lo:hi])
            for n in range(at, at + count):
                part = part + F.linear(F.linear(rows, self.a[n]), self.b[n]) * SCALE
            parts.append(part)
            at += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Concatenated(nn.Module):
    """The live adapters of one group as one of rank R, its scale folded into b: what a compiler can do best with."""

    def __init__(self, i: Inputs) -> None:
        super().__init__()
        a, b = concatenated(i)
        self.weight, self.bias, self.a, self.b = (
            nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias, a, b.t().contiguous())
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)  # (T, O)


def concatenated(i: Inputs) -> tuple[Tensor, Tensor]:
    """Give the live adapters as one: a (R, K), and b (R, O) times the scale."""
    return i.a[live(i)].flatten(0, 1), (i.b[live(i)] * SCALE).flatten(0, 1)


def naive(i: Inputs) -> Built:
    """PEFT's loop."""
    module, x = Naive(i), leaf(i.x, i)
    return Built(lambda: module(x), x, [*module.a, *module.b], scatter(i, live(i)))


def compiled(kind: Callable[[Inputs], nn.Module], autotune: bool = False) -> Callable[[Inputs], Built]:
    """A module through ``torch.compile``, frozen; ``autotune``: a single row's kernels are chosen by timing them.

    That gains 1.4 times for a concatenated layer at T = 1 (3.5 times for PEFT's loop, which is still behind) and
    nothing at more rows; on a GPU it takes minutes and is left out.
    """

    def build(i: Inputs) -> Built:
        if i.case not in COMPILED:
            raise Cannot(f"compiled for {len(COMPILED)} cases only")
        import torch._inductor.config

        on_cpu = i.x.device.type == "cpu"
        mode = "max-autotune-no-cudagraphs" if autotune and on_cpu and i.case.T == 1 else None
        module = torch.compile(kind(i).eval(), fullgraph=True, mode=mode)
        # Freezing prepacks weights. As an option of torch.compile it did nothing (torch 2.13), so it is set while the
        # first call compiles; on a device there is nothing to prepack.
        with torch._inductor.config.patch(freezing=on_cpu), redirect_stderr(io.StringIO()):  # its table of choices
            module(i.x)
        return Built(lambda: module(i.x), i.x, [], lambda grads: (i.a, i.b))

    return build


def addmm(i: Inputs) -> Built:
    """Add each adapter by ``addmm`` with alpha, as Unsloth does: in place without gradients."""
    names, x = live(i), leaf(i.x, i)
    at = {n: index for index, n in enumerate(names)}
    a = [leaf(i.a[n], i) for n in names]  # (r, K) each
    b = [leaf(i.b[n], i) for n in names]  # (r, O) each
    groups, grad = i.groups, i.case.step != "fwd"

    def forward() -> Tensor:
        y = F.linear(x, i.weight, i.bias)  # (T, O)
        parts = []
        for rows, own in groups:
            part, some = (y, x) if len(groups) == 1 else (y[rows], x[rows])
            for n in own:
                s = some @ a[at[n]].t()  # (rows, r)
                part = torch.addmm(part, s, b[at[n]], alpha=SCALE) if grad else part.addmm_(s, b[at[n]], alpha=SCALE)
            parts.append(part)
        return y if not grad else parts[0] if len(parts) == 1 else torch.cat(parts)

    return Built(forward, x, [*a, *b], scatter(i, names))


def mask_of(i: Inputs) -> Tensor:
    """Give the scale of each column of s for each row: 0 where the row's group does not name the adapter. (T, N r)"""
    mask = torch.zeros(i.case.T, i.case.N, i.case.r, device=i.x.device, dtype=i.x.dtype)  # (T, N, r)
    for rows, names in i.groups:
        mask[rows, names] = SCALE
    return mask.flatten(1)


def three_calls(i: Inputs) -> Built:
    """All adapters by three calls: one product, the mask, ``addmm``; the mask is made beforehand."""
    x, a, b = leaf(i.x, i), leaf(i.a.flatten(0, 1), i), leaf(i.b.flatten(0, 1), i)  # (T, K), (N r, K), (N r, O)
    mask, grad = mask_of(i), i.case.step != "fwd"

    def forward() -> Tensor:
        y, s = F.linear(x, i.weight, i.bias), (x @ a.t()) * mask  # (T, O), (T, N r)
        return torch.addmm(y, s, b) if grad else y.addmm_(s, b)

    return Built(forward, x, [a, b], lambda grads: (grads[0].view_as(i.a), grads[1].view_as(i.b)))
