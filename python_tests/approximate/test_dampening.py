"""Selective Synaptic Dampening where the factor is a number known beforehand."""

from __future__ import annotations

import pytest
import torch
from small import Adapted, Net, blobs, linear, trained
from torch import nn

from s3t_ext.approximate import Records, unlearn
from s3t_ext.approximate.dampening import importance
from s3t_ext.approximate.work import join, utility

GONE = Records(torch.tensor([[0.0, 1.0]]).repeat(4, 1), torch.full((4, 1), 5.0))  # only the second weight sees them


def kept(count: int) -> Records:
    return Records(torch.tensor([[1.0, 0.0]]).repeat(count, 1), torch.full((count, 1), 3.0))


@pytest.fixture
def model() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.75)
    return model


@pytest.mark.parametrize(("batches", "factor"), [(15, 1 / 16), (7, 1.0)])
def test_the_factor_is_the_share_of_batches_that_a_weight_is_in(model, batches, factor) -> None:
    """I_D of the second weight is I_f over all batches, of which one is forgotten: 16 > alpha = 10 > 8."""
    found = unlearn("ssd", model, GONE, kept(4 * batches), seed=0, batch=4)
    assert found.model.weight.tolist() == [[0.75, 0.75 * factor]]
    assert found.trace == [{"dampened": int(factor < 1), "weights": 2}]
    half = unlearn("ssd", model, GONE, kept(60), seed=0, batch=4, lam=0.5)
    assert half.model.weight.tolist() == [[0.75, 0.75 / 32]]
    most = unlearn("ssd", model, GONE, kept(60), seed=0, batch=4, lam=32.0)
    assert most.model.weight.tolist() == [[0.75, 0.75]], "nothing grows"


def test_what_never_mattered_is_zeroed_exactly_and_nothing_else() -> None:
    """A stored I_D of 0 on marked weights, and no retained record."""
    model = trained(blobs(60))
    gone = blobs(60)[torch.arange(10)]
    stored = {name: torch.full_like(p, torch.inf) for name, p in model.named_parameters()}
    moving = importance(model, gone)
    for name, far in stored.items():
        far[moving[name] > moving[name].quantile(0.7)] = 0
    found = unlearn("ssd", model, gone, seed=0, stored=stored).model
    for name, p in found.named_parameters():
        marked = stored[name] == 0
        assert marked.any()
        assert not p[marked].any()
        assert torch.equal(p[~marked], dict(model.named_parameters())[name][~marked])


def test_importance_of_a_batch_is_that_of_its_mean_gradient() -> None:
    """One weight at 0, squared error: gradients -2 y x of each record, which cancel in a batch."""
    both = Records(torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]))
    model = linear(1)
    assert importance(model, both, batch=2)["weight"].item() == 0
    assert importance(model, both, batch=1)["weight"].item() == 4
    model.bias.data.fill_(3.0)  # f = 3: d f^2 / d weight = 2 f x
    assert importance(model, Records(both.inputs), labelled=False)["weight"].item() == 6


def test_stored_importance_stands_in_for_the_retained() -> None:
    data = blobs(200)
    model = trained(data)
    gone, rest = data[data.labels == 0], data[data.labels != 0]
    for method, labelled in (("ssd", True), ("ssd-label-free", False)):
        stored = importance(model, join([gone, rest]), batch=10, labelled=labelled)
        settings = {"alpha": 1.1, "batch": 10}
        a = unlearn(method, model, gone, rest, seed=0, **settings)
        b = unlearn(method, model, gone, seed=0, stored=stored, **settings)
        assert a.trace[0]["dampened"] > 0
        assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
    with pytest.raises(ValueError, match="retain: ssd needs records that are kept, got none; give them, or stored"):
        unlearn("ssd", model, gone, seed=0)
    del stored["head.bias"]
    with pytest.raises(ValueError, match=r"stored: expected an importance of each weight, .*'head.bias'"):
        unlearn("ssd", model, gone, seed=0, stored=stored)


def test_a_class_goes_and_the_others_stay() -> None:
    """The published behaviour on a class that is well apart: accuracy 0 of it, the others' as before."""
    data = blobs(400, classes=4, width=8, seed=3)
    model = trained(data, Net(8, 64, 4))
    away = data.labels == 1
    found = unlearn("ssd", model, data[away], data[~away], seed=0, alpha=2.0).model
    assert utility(found, data[away]) < 0.05
    assert utility(found, data[~away]) > 0.95


def test_of_an_adapter_b_alone_is_dampened() -> None:
    data = blobs(100)
    model = trained(data, Adapted(4, 16, 3))
    found = unlearn("ssd", model, data[torch.arange(10)], data[torch.arange(10, 100)], seed=0, alpha=1.0).model
    moved = [n for n, p in found.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert moved == ["lora_B"]
    texts = nn.Embedding(3, 2)
    padded = Records(torch.tensor([[0, 1, -1], [0, 1, 2]]))
    read = nn.Sequential(Clamped(), texts)
    first = importance(read, padded[torch.tensor([0])], labelled=False)["1.weight"]
    assert first[2].abs().sum() == 0
    assert first[0].abs().sum() > 0
    assert importance(read, padded, labelled=False)["1.weight"][2].abs().sum() > 0


class Clamped(nn.Module):
    """Padding read as the last token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, 2, x)
