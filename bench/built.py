"""What a provider makes of a case: a callable, and how its gradients are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.truth import Inputs, Results


class Cannot(Exception):
    """The provider does not do this case; the message says why."""


class Built(NamedTuple):
    """A provider over one case: ``forward()`` is timed; gradients go to x and ``leaves``."""

    forward: Callable[[], Tensor]
    x: Tensor
    leaves: list[Tensor]
    pools: Callable[[list[Tensor]], tuple[Tensor, Tensor]]  # gradients of the leaves as da (N, r, K), db (N, r, O)


def step(built: Built, i: Inputs) -> Callable[[], object]:
    """Give what is timed. ``bwd`` runs the forward at its first call only, on the stream of that call."""
    leaves = [built.x, *built.leaves]
    if i.case.step == "fwd":
        return built.forward
    if i.case.step == "fwdbwd":
        return lambda: torch.autograd.grad(built.forward(), leaves, i.dy)
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(built.forward())
        return torch.autograd.grad(kept[0], leaves, i.dy, retain_graph=True)

    return backward


def results(built: Built, i: Inputs) -> Results:
    """Compute the case once: what ``truth.wrong`` judges."""
    y = built.forward()
    if i.case.step == "fwd":
        return {"y": y}
    dx, *rest = torch.autograd.grad(y, [built.x, *built.leaves], i.dy)
    found = {"dx": dx}
    if built.leaves:
        found["da"], found["db"] = built.pools(rest)
    return found | ({"y": y.detach()} if i.case.step == "fwdbwd" else {})


def leaf(t: Tensor, i: Inputs) -> Tensor:
    """Give a tensor as one that gets a gradient where the case has a backward."""
    return t.detach().requires_grad_(i.case.step != "fwd")


def live(i: Inputs) -> list[int]:
    """List the adapters that some row needs, group by group."""
    return [n for _, names in i.groups for n in names]


def scatter(i: Inputs, names: list[int]) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Give dense pools from one gradient for each adapter named, all of a before all of b."""

    def pools(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        both = []
        for like, part in ((i.a, grads[: len(names)]), (i.b, grads[len(names) :])):
            full = torch.zeros_like(like)
            for n, grad in zip(names, part):
                full[n] = grad if grad.shape == full[n].shape else grad.t()
            both.append(full)
        return both[0], both[1]

    return pools
