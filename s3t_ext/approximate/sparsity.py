"""Sparsity: fewer weights have less to forget. Prune first and then unlearn, or fine-tune towards zeros."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.approximate.work import Work


def prune_first(
    work: Work, *, then: str = "fine-tune", sparsity: float = 0.95, settings: Mapping[str, Any] | None = None
) -> None:
    """Set the smallest weights of the model to 0, once, and unlearn by another method that leaves them there.

    Args:
        then: any other of ``METHODS``; ``settings``: its own.
        sparsity: share of the weights to be 0; 0.95 as published.

    Notes:
        "Model Sparsity Can Simplify Machine Unlearning" (NeurIPS 2023; arXiv 2304.04934), with one-shot
        magnitude pruning over all matrices together. The paper prunes when it trains; here it costs utility that the
        method must win back. Of LoRA, B alone is pruned.
    """
    from s3t_ext.approximate.methods import check_inside, run_inside  # the table names this file

    if then == "prune-first":
        raise ValueError(f"then: expected another method, got {then!r}")
    settings = {} if settings is None else settings
    check_inside(work, then, settings)
    masks = magnitude_masks(work, sparsity)
    weights, initial = work.weights(), copy.deepcopy(work.initial)
    hooks = [weights[name].register_hook(mask.mul) for name, mask in masks.items()]  # no gradient: no step
    try:
        for model in (work.model, initial):
            if model is not None:
                _apply(model, masks)
        run_inside(work.on(initial=initial), then, **settings)
        _apply(work.model, masks)  # what a method did beside gradients
    finally:
        for hook in hooks:
            hook.remove()


def magnitude_masks(work: Work, sparsity: float) -> dict[str, Tensor]:
    """Choose what stays, 1, and what is pruned, 0: the ``sparsity`` smallest of all matrices' weights by magnitude."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a share from 0 to less than 1, got {sparsity}")
    matrices = {name: p.detach().abs() for name, p in work.weights(scale_free=True).items() if p.ndim > 1}
    count = int(sparsity * sum(p.numel() for p in matrices.values()))
    order = torch.cat([p.flatten() for p in matrices.values()]).argsort(stable=True)
    flat = torch.ones(len(order), device=order.device)
    flat[order[:count]] = 0
    parts = flat.split([p.numel() for p in matrices.values()])
    return {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(matrices.items(), parts)}


@torch.no_grad()
def _apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weights[name].mul_(mask)


def l1_sparse(
    work: Work,
    *,
    gamma: float = 5e-4,
    epochs: int = 10,
    batch: int = 32,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> None:
    """Descend ``loss(retain) + gamma (1 - t / T) |theta|_1`` by SGD, t the epoch of T.

    Args:
        gamma: 5e-4, about as published; ``momentum``, ``weight_decay``: as in the authors' code.

    Notes:
        arXiv 2304.04934, sparsity-aware unlearning, with the falling schedule of the authors. Of LoRA, the norm of B
        alone counts.
    """
    optimizer = torch.optim.SGD(work.weights().values(), learning_rate, momentum, weight_decay=weight_decay)
    sparse = list(work.weights(scale_free=True).values())
    for epoch in range(epochs):
        strength, found = gamma * (1 - epoch / epochs), []
        for kept in work.batches(work.retain, batch):
            loss = work.losses(kept).mean()
            found.append(work.step(optimizer, loss + strength * sum(p.abs().sum() for p in sparse)))
        work.note(epoch=epoch, loss=sum(found) / len(found))
