"""Influence Approximation Unlearning: to forget a record is to learn one of the opposite gradient, in one step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from s3t_ext.approximate.work import Records, Work


def iau(work: Work, *, learning_rate: float = 0.1, correction: float = 1.0, batch: int = 256) -> None:
    """Take one step ``theta <- theta + eta / n (sum over forgotten of grad l - c sum over retained of grad l)``.

    Args:
        learning_rate: eta, in the place of the inverse Hessian of the mean loss over the n records that are kept; the
            right one is the model's, ours is careful. (The authors' code has 1e-3, for ``iau_released``.)
        correction: c, the gradient correction by the records that are kept; 0: none.
        batch: records of one forward pass; all of them make the one step.

    Notes:
        "Efficient Machine Unlearning via Influence Approximation" (arXiv 2507.23257). On a quadratic of
        curvature h at its minimum the step is exact for ``eta = 1 / (h (1 + c))``. The released code does otherwise.
    """
    gone, kept = (gradient(work, records, batch) for records in (work.forget, work.retain))
    with torch.no_grad():
        for weight, up, down in zip(work.weights().values(), gone, kept):
            weight.add_(up - correction * down, alpha=learning_rate / len(work.retain))
    work.cost["steps"] += 1


def iau_released(work: Work, *, learning_rate: float = 1e-3, batch: int = 256) -> None:
    """Take one step of Adam on ``mean loss(retain) - mean loss(forget)``: its first, so all but a step of signs.

    Args:
        learning_rate: by which each weight moves, whatever its gradient; ``batch``: records of one forward pass.

    Notes:
        The authors' code of arXiv 2507.23257.
    """
    gone, kept = (gradient(work, records, batch) for records in (work.forget, work.retain))
    weights = list(work.weights().values())
    for weight, up, down in zip(weights, gone, kept):
        weight.grad = down / len(work.retain) - up / len(work.forget)
    torch.optim.Adam(weights, learning_rate).step()
    work.cost["steps"] += 1


def gradient(work: Work, records: Records, batch: int) -> list[Tensor]:
    """Sum the gradients of all records' losses, one tensor for each weight that may change."""
    weights = list(work.weights().values())
    total = [torch.zeros_like(p) for p in weights]
    for part in work.batches(records, batch, shuffle=False):
        found = torch.autograd.grad(work.losses(part).sum(), weights, allow_unused=True)
        for grown, more in zip(total, found):
            if more is not None:
                grown += more
    return total


def gradient_restricted(loss: Tensor, weights: Iterable[Tensor], strength: float = 0.005, each: bool = False) -> Tensor:
    """Give the training loss ``l + a |grad l|_2``, under which no record pulls hard, so that it is forgotten easily.

    Args:
        loss: l, a number whose graph is alive; ``weights``: those it is trained by.
        strength: a, 0.005 as published.
        each: sum the norms of the weights' tensors one by one, as the authors' code does, in place of one norm of all.

    Notes:
        arXiv 2507.23257, gradient restriction. Its gradient goes through a second backward pass: layers must allow it.
    """
    found = torch.autograd.grad(loss, list(weights), create_graph=True, allow_unused=True)
    norms = torch.stack([grad.norm() for grad in found if grad is not None])
    return loss + strength * (norms.sum() if each else norms.norm())
