"""Supervised training of a base model on public data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from s3t_ext.models.base import BaseModel


def pretrain(
    model: BaseModel,
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    epochs: int = 30,
    lr: float = 2e-3,
    batch: int = 64,
    weight_decay: float = 0.01,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> float:
    """Train a feature extractor and a linear head, which is dropped, by AdamW with a cosine schedule.

    Args:
        model: maps (n, *shape) to (n, ``model.features``); trained in place.
        inputs: (n, *shape) float32; ``labels``: (n,) integers below ``classes``, or (n, ``classes``) float32 values.
        tell: is told, after each epoch, its number from 1 and what is returned after the last.

    Returns:
        Accuracy on these data in the last epoch, or, of values, the mean square error.
    """
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(model.features, classes)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
        model.train()
        for epoch in range(epochs):
            told = 0.0
            for rows in torch.randperm(len(x)).split(batch):
                out = head(model(x[rows]))  # (b, classes)
                loss = F.mse_loss(out, y[rows]) if y.is_floating_point() else F.cross_entropy(out, y[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                right = float(loss.detach()) if y.is_floating_point() else (out.argmax(-1) == y[rows]).double().mean()
                told += float(right) * len(rows)
            if tell:
                tell(epoch + 1, told / len(x))
        model.eval()
    return told / len(x)
