"""Influence approximation on a quadratic, where one step is exact, and the training loss that prepares for it."""

from __future__ import annotations

import pytest
import torch
from small import linear
from torch import Tensor, nn

from s3t_ext.approximate import Records, unlearn
from s3t_ext.approximate.influence import gradient_restricted

TARGETS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
GONE, KEPT = (Records(torch.zeros(len(t), 1), t, tuple(map(str, range(n, n + len(t)))))
              for n, t in ((0, TARGETS[:10]), (10, TARGETS[10:])))  # fmt: skip


@pytest.fixture
def mean() -> nn.Module:
    """Only its bias is trained, on mean squared errors over 3 targets: the minimum is the mean, the curvature 2 / 3."""
    model = linear(1, 3)
    model.weight.requires_grad_(False)
    model.bias.data.copy_(TARGETS.mean(0))
    return model


@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_the_step_is_exact_on_a_quadratic(mean, correction) -> None:
    eta = 3 / 2 / (1 + correction)
    found = unlearn("iau", mean, GONE, KEPT, seed=0, learning_rate=eta, correction=correction, batch=7)
    assert (found.model.bias - TARGETS[10:].mean(0)).abs().max() < 1e-6
    assert (mean.bias - TARGETS[10:].mean(0)).abs().max() > 0.05
    assert found.cost["steps"] == 1


def test_the_released_step_is_one_of_signs(mean) -> None:
    """Of means, however many records a side has: from 0, where sums would go another way for many a target."""
    mean.bias.data.zero_()
    found = unlearn("iau-released", mean, GONE, KEPT, seed=0, batch=7)
    towards = torch.sign(TARGETS[10:].mean(0) - TARGETS[:10].mean(0))
    assert torch.allclose(found.model.bias - mean.bias, 1e-3 * towards, atol=1e-6)
    assert not torch.equal(towards, torch.sign(TARGETS[10:].sum(0) - TARGETS[:10].sum(0)))
    assert torch.equal(found.model.weight, mean.weight)


@pytest.mark.parametrize("each", [False, True])
def test_the_restricted_loss_and_its_gradient_have_closed_forms(each) -> None:
    """l = (a^2 + b^2) / 2: its gradient is (a, b), of norm 5, or 3 + 4 one by one."""
    a, b = (nn.Parameter(torch.tensor(x)) for x in (3.0, 4.0))
    loss = gradient_restricted((a * a + b * b) / 2, [a, b], 0.1, each)
    assert loss.item() == pytest.approx(12.5 + 0.1 * (7 if each else 5))
    loss.backward()
    assert a.grad.item() == pytest.approx(3 + 0.1 * (1 if each else 3 / 5))


def test_training_under_the_restricted_loss_leaves_smaller_gradients() -> None:
    x, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3

    def train(strength: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        weights = list(model.parameters())
        optimizer = torch.optim.Adam(weights, 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            gradient_restricted(nn.functional.cross_entropy(model(x), y), weights, strength).backward()
            optimizer.step()
        found = torch.autograd.grad(nn.functional.cross_entropy(model(x[:1]), y[:1]), weights)
        return torch.cat([grad.flatten() for grad in found]).norm()

    assert train(2.0) < 0.7 * train(0.0)
