"""The strongest of torch's ways on a CPU: products over weights that oneDNN has packed; on a GPU the plain ones.

``_linear_pointwise`` multiplies by a packed weight and may add another tensor, or multiply by one, in the same call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import concatenated, mask_of
from bench.built import Built, Cannot, leaf, live
from bench.truth import SCALE, Inputs

Product = Callable[..., Tensor]  # of rows alone, or with a tensor and "add" or "mul"


def packed(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """Pack a weight (O, K) for so many rows; give what multiplies by it."""
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not hasattr(ops, "_linear_pointwise"):
        raise Cannot("oneDNN's prepacked linear is for the CPU")
    panels = ops._reorder_linear_weight(weight.contiguous(), rows)

    def product(x: Tensor, other: Tensor | None = None, by: str = "add") -> Tensor:
        if other is None:
            return ops._linear_pointwise.default(x, panels, bias, "none", [], "")
        return ops._linear_pointwise.binary(x, other, panels, bias, by)

    return product


def onednn(i: Inputs) -> Built:
    """Three products over packed weights: base, shrink, and expand that adds to the base.

    One group concatenates its live adapters, the scale folded in; several multiply s by a mask in the same call.
    """
    case, x = i.case, i.x
    if case.step != "fwd":
        return _trained(i)
    a, b = concatenated(i) if case.G == 1 else (i.a.flatten(0, 1), i.b.flatten(0, 1))  # (R, K), (R, O)
    base, shrink, expand = packed(i.weight, i.bias, case.T), packed(a, None, case.T), packed(b.t(), None, case.T)
    factors = (mask_of(i), "mul") if case.G > 1 else ()
    return Built(lambda: expand(shrink(x, *factors), base(x)), x, [], lambda grads: (i.a, i.b))


class PackedLinear(nn.Module):
    """A linear layer in products over packed weights, with an adapter a (R, K), b (O, R) that adds to the base."""

    def __init__(self, linear: nn.Linear, rows: int, a: Tensor | None = None, b: Tensor | None = None) -> None:
        super().__init__()
        self.base = packed(linear.weight, linear.bias, rows)
        self.adapter = None if a is None or b is None else (packed(a, None, rows), packed(b, None, rows))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., O)
        if self.adapter is None:
            return y
        shrink, expand = self.adapter
        return expand(shrink(x), y)


class _Trained(torch.autograd.Function):
    """The layer over a packed weight and its packed transpose; adapters in training change too often to be packed."""

    @staticmethod
    def forward(ctx, x, a, b, mask, base, back):  # (T, K), (R, K), (R, O), (T, R) or None
        s = _masked(x @ a.t(), mask)  # (T, R)
        ctx.save_for_backward(x, a, b, mask, s)
        ctx.back = back
        return base(x).addmm_(s, b)  # (T, O)

    @staticmethod
    def backward(ctx, dy):
        x, a, b, mask, s = ctx.saved_tensors
        ds = _masked(dy @ b.t(), mask)  # (T, R)
        return ctx.back(dy).addmm_(ds, a), ds.t() @ x, s.t() @ dy, None, None, None


def _masked(s: Tensor, mask: Tensor | None) -> Tensor:
    return s if mask is None else s.mul_(mask)


def _trained(i: Inputs) -> Built:
    """As forward alone: one group's live adapters with the scale folded into b, or all of them and a mask."""
    base, back = packed(i.weight, i.bias, i.case.T), packed(i.weight.t(), None, i.case.T)
    names, x = torch.tensor(live(i) if i.case.G == 1 else range(i.case.N)), leaf(i.x, i)
    mask, scale = (None, SCALE) if i.case.G == 1 else (mask_of(i), 1.0)
    a, b = leaf(i.a[names].flatten(0, 1), i), leaf((i.b[names] * scale).flatten(0, 1), i)  # (R, K), (R, O)

    def forward() -> Tensor:
        return _Trained.apply(x, a, b, mask, base, back)

    return Built(forward, x, [a, b], _pools(i, names, scale))


def _pools(i: Inputs, names: Tensor, scale: float) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Give dense pools from the gradients of the adapters named, b's being of b times a scale."""

    def pools(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        both = torch.zeros_like(i.a), torch.zeros_like(i.b)
        for full, grad, by in zip(both, grads, (1.0, scale)):
            full[names] = grad.view(*names.shape, i.case.r, -1) * by
        return both

    return pools


def _base(i: Inputs, x: Tensor) -> Callable[[], Tensor]:
    """Give the strongest base product of the device that has the gradients of the case."""
    if i.case.step == "fwd" and x.device.type == "cpu":
        product = packed(i.weight, i.bias, i.case.T)
        return lambda: product(x)
    return lambda: F.linear(x, i.weight, i.bias)


def by_group(i: Inputs) -> Built:
    """Two products for each group, over its live adapters as one; the second adds to the group's rows in place."""
    if i.case.G == 1:
        raise Cannot("one group: the same as three_calls")
    if i.case.step != "fwd":
        raise Cannot("adds in place: no backward")
    base, x = _base(i, i.x), i.x
    parts = [(rows, i.a[n].flatten(0, 1).t(), (i.b[n] * SCALE).flatten(0, 1)) for rows, n in i.groups]

    def forward() -> Tensor:
        y = base()  # (T, O)
        for rows, a, b in parts:
            y[rows].addmm_(x[rows] @ a, b)
        return y

    return Built(forward, x, [], lambda grads: (i.a, i.b))


def padded(i: Inputs) -> Built:
    """Two batched products over groups that are padded to the largest; where rows go is known beforehand."""
    if i.case.G == 1:
        raise Cannot("one group: the same as three_calls")
    x, groups, device = leaf(i.x, i), i.groups, i.x.device
    most = max(rows.stop - rows.start for rows, _ in groups)
    into = torch.zeros(len(groups), most, dtype=torch.int64)  # row of x at each place; what is left over reads row 0
    back = torch.cat([g * most + torch.arange(rows.stop - rows.start) for g, (rows, _) in enumerate(groups)])  # (T,)
    for g, (rows, _) in enumerate(groups):
        into[g, : rows.stop - rows.start] = torch.arange(rows.start, rows.stop)
    into, back = into.flatten().to(device), back.to(device)
    names = torch.tensor([n for _, n in groups], device=device)  # (busy, slots)
    a = leaf(i.a[names].flatten(1, 2), i)  # (busy, R, K)
    b = leaf((i.b[names] * SCALE).flatten(1, 2), i)  # (busy, R, O)
    base = _base(i, x)

    def forward() -> Tensor:
        rows = x.index_select(0, into).view(len(groups), most, -1)  # (busy, most, K)
        sums = base().index_select(0, into).view(len(groups), most, -1)  # (busy, most, O)
        y = torch.baddbmm(sums, torch.bmm(rows, a.mT), b)  # (busy, most, O)
        return y.flatten(0, 1).index_select(0, back)

    return Built(forward, x, [a, b], _pools(i, names, SCALE))
