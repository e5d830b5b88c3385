"""Models and records small enough to know the answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s3t_ext.approximate import Records


class Net(nn.Module):
    """A representation and a linear head, as methods that look inside expect them."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, outputs)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Adapted(Net):
    """The same with a LoRA adapter beside its first layer, which alone may change, and PEFT's names for it."""

    def __init__(self, width: int, hidden: int, outputs: int, rank: int = 2) -> None:
        super().__init__(width, hidden, outputs)
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(hidden, rank))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x) + x @ self.lora_A.t() @ self.lora_B.t())


def blobs(count: int, classes: int = 3, width: int = 4, seed: int = 0) -> Records:
    """Draw clouds of points, one a class, that a linear layer tells apart."""
    chance = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=chance)
    return Records(centres[labels] + 0.5 * torch.randn(count, width, generator=chance), labels)


def line(count: int, width: int = 3, seed: int = 0, noise: float = 0.1) -> Records:
    """Draw points on a plane, with noise: a regression of one target."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=chance)
    y = x @ torch.arange(1.0, width + 1) + noise * torch.randn(count, generator=chance)
    return Records(x, y[:, None])


def linear(width: int, outputs: int = 1) -> nn.Linear:
    """Make a linear model that answers 0."""
    model = nn.Linear(width, outputs)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def least_squares(records: Records) -> tuple[Tensor, Tensor]:
    """Solve a regression in closed form: weight (C, F), bias (C,)."""
    x = torch.cat([records.inputs, torch.ones(len(records), 1)], 1).double()
    assert records.labels is not None
    found = torch.linalg.lstsq(x, records.labels.double()).solution.t().float()  # (C, F + 1)
    return found[:, :-1], found[:, -1]


def trained(records: Records, model: nn.Module | None = None, steps: int = 300) -> nn.Module:
    """Train a model on all records at once."""
    from s3t_ext.approximate.work import losses

    torch.manual_seed(0)
    model = model or Net(records.inputs.shape[1], 16, 3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    assert records.labels is not None
    for _ in range(steps):
        optimizer.zero_grad()
        losses(str(records.task), model(records.inputs), records.labels).mean().backward()
        optimizer.step()
    return model
