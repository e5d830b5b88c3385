"""The reference points that every table needs: retraining, fine-tuning, gradient ascent and NegGrad+."""

from __future__ import annotations

import torch

from s3t_ext.approximate.work import Work


def retrain(work: Work, *, epochs: int = 10, batch: int = 32, learning_rate: float = 1e-3) -> None:
    """Train the model as it was before it met any record, on the retained records alone.

    Args:
        learning_rate: of Adam, constant.
    """
    assert work.initial is not None
    work.model.load_state_dict(work.initial.state_dict())
    fine_tune(work, epochs=epochs, batch=batch, learning_rate=learning_rate)


def fine_tune(work: Work, *, epochs: int = 5, batch: int = 32, learning_rate: float = 1e-3) -> None:
    """Train on with the retained records, by Adam, and hope that the others fade."""
    optimizer = torch.optim.Adam(work.weights().values(), learning_rate)
    work.descend(optimizer, work.retain, lambda kept: work.losses(kept).mean(), epochs, batch)


def gradient_ascent(work: Work, *, epochs: int = 5, batch: int = 32, learning_rate: float = 1e-4) -> None:
    """Climb the loss of the forgotten records, by Adam; nothing holds the others."""
    optimizer = torch.optim.Adam(work.weights().values(), learning_rate)
    for epoch in range(epochs):
        found = [work.step(optimizer, -work.losses(gone).mean()) for gone in work.batches(work.forget, batch)]
        work.note(epoch=epoch, loss=-sum(found) / len(found))


def neggrad_plus(
    work: Work, *, alpha: float = 0.99, epochs: int = 5, batch: int = 32, learning_rate: float = 0.01
) -> None:
    """Descend ``alpha * loss(retain) - (1 - alpha) * loss(forget)`` by SGD.

    Notes:
        NegGrad+ as in "Towards unbounded machine unlearning" (arXiv 2302.09880).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a share from 0 to 1, got {alpha}")
    optimizer = torch.optim.SGD(work.weights().values(), learning_rate)
    for epoch in range(epochs):
        found = []
        for kept, gone in work.pairs(batch):
            loss = alpha * work.losses(kept).mean() - (1 - alpha) * work.losses(gone).mean()
            found.append(work.step(optimizer, loss))
        work.note(epoch=epoch, loss=sum(found) / len(found))
