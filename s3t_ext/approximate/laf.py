"""Label-Agnostic Forgetting: representations of forgotten records leave their own density, those of others stay."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.approximate.work import Records, Work


def laf(
    work: Work,
    *,
    latent: int = 16,
    density_epochs: int = 10,
    density_learning_rate: float = 1e-3,
    epochs: int = 40,
    batch: int = 32,
    unlearning_rate: float = 1e-5,
    alignment_rate: float = 4e-5,
    temperature: float = 20.0,
) -> None:
    """Unlearn representations by two densities and a contrast; no label is looked at.

    Fit two variational autoencoders to the representations before unlearning: V of all records, V_f of the forgotten.
    Then, for each pair of batches, a step down ``unlearning_loss`` of the squared errors with which V reconstructs
    retained representations and V_f forgotten ones, and a step down ``alignment_loss`` of the cosine distances of both
    to what they were. The head is not trained.

    Args:
        latent: numbers that an autoencoder keeps: 16, in the authors' code 8 for small networks.
        density_epochs, density_learning_rate: of the autoencoders, by Adam.
        epochs: each as long as the shorter of the two sets, as in the authors' code; 20 there for small networks.
        unlearning_rate, alignment_rate: of Adam on the two losses; for small networks 5e-5 and 1e-4, and 5e-5 for the
            alignment where a large one forgets a class. LoRA adapters need more: 5e-4 and 1e-3 for a class of digits.
        temperature: 20; in the code 5 for random records of MNIST and for noisy labels of CIFAR-10.

    Notes:
        "Label-agnostic forgetting" (ICLR 2024, arXiv 2404.00506), algorithm 1; rates and sizes are those of its code.
        The decoder ends linearly: the code's sigmoid cannot reach representations outside (0, 1).
    """
    before = work.on(model=copy.deepcopy(work.model).requires_grad_(False))
    gone, kept = _represented(before, work.forget, batch), _represented(before, work.retain, batch)
    densities = (
        _density(work, Records(torch.cat([kept, gone])), latent, density_epochs, batch, density_learning_rate),
        _density(work, Records(gone), latent, density_epochs, batch, density_learning_rate),
    )
    unlearning = torch.optim.Adam(work.weights().values(), unlearning_rate)
    alignment = torch.optim.Adam(work.weights().values(), alignment_rate)
    for epoch in range(epochs):
        found = []
        batches = zip(work.batches(work.retain, batch), work.batches(work.forget, batch), strict=False)
        for (kept_inputs, _), (gone_inputs, _) in batches:
            both = work.features(kept_inputs), work.features(gone_inputs)
            if not both[0].requires_grad:
                raise ValueError(
                    "model: laf changes representations, which none of the weights that may change reaches"
                )
            apart = [density.distance(e) for density, e in zip(densities, both, strict=True)]
            first = work.step(unlearning, unlearning_loss(*apart))
            turned = [1 - F.cosine_similarity(work.features(x), before.features(x)) for x in (kept_inputs, gone_inputs)]
            found.append((first, work.step(alignment, alignment_loss(turned[0], turned[1], temperature))))
        means = [sum(each) / len(found) for each in zip(*found, strict=True)]
        work.note(epoch=epoch, unlearning=means[0], alignment=means[1])


def laf_repair(
    work: Work, *, repair_epochs: int = 1, repair_learning_rate: float = 1e-4, batch: int = 32, **settings: Any
) -> None:
    """Follow ``laf`` by training the head with the retained records, by Adam; where it is frozen, all that may change.

    Args:
        repair_epochs, repair_learning_rate: short, as the paper says; it gives no numbers, nor does its code.
        batch: of both; ``settings``: the others of ``laf``.

    Notes:
        LAF+R of the same paper.
    """
    laf(work, batch=batch, **settings)
    head: nn.Module = work.model.head  # type: ignore[assignment]
    weights = [p for p in head.parameters() if p.requires_grad] or list(work.weights().values())
    optimizer = torch.optim.Adam(weights, repair_learning_rate)
    work.descend(optimizer, work.retain, lambda kept: work.losses(kept).mean(), repair_epochs, batch, repair=True)


# --- losses ----------------------------------------------------------------------------------------------------------


def unlearning_loss(kept: Tensor, gone: Tensor) -> Tensor:
    """Give ``sum_r exp(d_r / (d_r + 1)) - sum_f exp(d_f / (d_f + 1))`` of reconstruction errors d (n,)."""
    kept, gone = (torch.exp(d / (d + 1)).sum() for d in (kept, gone))
    return kept - gone


def alignment_loss(kept: Tensor, gone: Tensor, temperature: float) -> Tensor:
    """Give ``sum_r (c_r - log sum_f exp(c_f / T))`` of cosine distances c (n,) to what representations were."""
    return (kept - torch.logsumexp(gone / temperature, 0)).sum()


class Autoencoder(nn.Module):
    """A variational autoencoder of representations (n, F), of layers F, 128, 32, latent and back, with ReLU."""

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 2 * latent)
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, features)
        )

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give a reconstruction (n, F) from a drawn code, and the code's mean and log variance (n, latent)."""
        mean, log_variance = self.encode(e).chunk(2, 1)
        return self.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean)), mean, log_variance

    def distance(self, e: Tensor) -> Tensor:
        """Give each representation's squared reconstruction error (n,)."""
        return (self(e)[0] - e).square().sum(1)

    def loss(self, e: Tensor, divergence: float = 0.025) -> Tensor:
        """Give the mean squared error plus the weighted divergence of codes from a standard normal distribution."""
        out, mean, log_variance = self(e)
        apart = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return ((out - e).square().sum(1) + divergence * apart).mean()


def _density(work: Work, represented: Records, latent: int, epochs: int, batch: int, rate: float) -> Autoencoder:
    density = Autoencoder(represented.inputs.shape[1], latent).to(represented.inputs)
    optimizer = torch.optim.Adam(density.parameters(), rate)
    work.descend(optimizer, represented, lambda part: density.loss(part[0]), epochs, batch, density=len(represented))
    return density.requires_grad_(False)


def _represented(work: Work, records: Records, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([work.features(x) for x, _ in work.batches(records, batch, shuffle=False)])  # (n, F)
