"""Selective Synaptic Dampening: shrink the weights that matter more for the forgotten than for all, and stop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s3t_ext.approximate.work import Batch, Records, Work, join

Importance = Mapping[str, Tensor]  # of each weight that may be dampened, by name, in its shape


def ssd(
    work: Work, *, alpha: float = 10.0, lam: float = 1.0, batch: int = 64, stored: Importance | None = None
) -> None:
    """Dampen where I_f > alpha I_D: ``theta <- theta min(lam I_D / I_f, 1)``, I = mean squared gradient of the loss.

    Args:
        alpha: how much more a weight must matter for the forgotten; 10 as published, 5 for a whole class of a ViT.
        lam: lambda, 1 as published: the smaller, the stronger is the dampening.
        batch: records of one gradient, taken as they stand. The authors' code squares the mean gradient of a batch;
            the text means 1: each record's own.
        stored: I_D, as ``importance`` gave it of all records at training time; then none that are kept are needed.

    Notes:
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening" (AAAI 2024; arXiv 2308.07707);
        I_D over all of D, the forgotten among them, as in the code. Of LoRA, B alone is dampened.
        Known to be brittle: with the published alpha some classes take all others with them.
    """
    _dampen(work, alpha, lam, batch, stored, labelled=True)


def ssd_label_free(
    work: Work, *, alpha: float = 10.0, lam: float = 1.0, batch: int = 64, stored: Importance | None = None
) -> None:
    """Dampen as ``ssd`` does, with I = mean absolute gradient of ``|f(x)|^2``, which needs no label.

    Notes:
        "Loss-Free Machine Unlearning" (arXiv 2402.19308); the gradient's magnitude, not its square, as in
        Memory Aware Synapses, which it follows. See ``ssd``.
    """
    _dampen(work, alpha, lam, batch, stored, labelled=False)


def importance(model: nn.Module, records: Records, *, batch: int = 64, labelled: bool = True) -> dict[str, Tensor]:
    """Measure how much each weight matters for some records: I_D, to be stored when a model has been trained.

        I = mean over batches of (d mean loss / d theta)^2,  or of |d mean |f(x)|^2 / d theta|

    Args:
        model: as ``unlearn`` takes it, in eval mode; ``batch``, ``labelled``: as the method will use.
    """
    task = records.task or "classification"
    return _importance(Work(model, records, records, task, torch.Generator()), records, batch, labelled)


def _importance(work: Work, records: Records, batch: int, labelled: bool) -> dict[str, Tensor]:
    weights = work.weights(scale_free=True)
    found = {name: torch.zeros_like(p) for name, p in weights.items()}
    batches = list(work.batches(records, batch, shuffle=False))
    for part in batches:
        loss = work.losses(part).mean() if labelled else _norm(work, part)
        for name, grad in zip(weights, torch.autograd.grad(loss, [*weights.values()], allow_unused=True)):
            if grad is not None:
                found[name] += (grad.square() if labelled else grad.abs()) / len(batches)
    return found


def _norm(work: Work, batch: Batch) -> Tensor:
    """Give the mean over records of the squared norm of their outputs; of texts padding does not count."""
    inputs, out = batch[0], work.outputs(batch[0])
    if out.ndim == 3:
        out = out * (inputs >= 0)[..., None]
    return out.square().flatten(1).sum(1).mean()


def _dampen(work: Work, alpha: float, lam: float, batch: int, stored: Importance | None, labelled: bool) -> None:
    if alpha < 0 or lam < 0:
        raise ValueError(f"alpha, lam: expected numbers of at least 0, got {alpha} and {lam}")
    weights = work.weights(scale_free=True)
    if stored is not None:
        wrong = [n for n, p in weights.items() if n not in stored or stored[n].shape != p.shape]
        if wrong:
            raise ValueError(f"stored: expected an importance of each weight, in its shape, got none of {wrong[0]!r}")
    gone = _importance(work, work.forget, batch, labelled)
    whole = stored or _importance(work, join([work.forget, work.retain]), batch, labelled)
    marked = {name: gone[name] > alpha * whole[name] for name in weights}  # so gone > 0 where it is divided by
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(torch.where(marked[name], p * (lam * whole[name] / gone[name]).clamp(max=1), p))
    chosen, total = (sum(int(count(m)) for m in marked.values()) for count in (torch.sum, torch.numel))
    work.note(dampened=chosen, weights=total)
