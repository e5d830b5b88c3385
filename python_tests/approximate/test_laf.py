"""Label-Agnostic Forgetting: its losses in closed form, its densities, and a class that goes without a label."""

from __future__ import annotations

import math

import pytest
import torch
from small import Net, blobs, trained
from torch import nn

from s3t_ext.approximate import Records, unlearn
from s3t_ext.approximate.laf import Autoencoder, alignment_loss, unlearning_loss
from s3t_ext.approximate.work import utility

ALL = blobs(200)
GONE, KEPT = ALL[ALL.labels == 2], ALL[ALL.labels != 2]
SETTINGS = {"seed": 0, "latent": 4, "epochs": 60, "unlearning_rate": 3e-3, "alignment_rate": 3e-3}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(ALL)


def bare(records: Records) -> Records:
    return Records(records.inputs)


def test_losses_in_closed_form() -> None:
    kept, gone = torch.tensor([0.0, 3.0]), torch.tensor([1.0])
    assert unlearning_loss(kept, gone).item() == pytest.approx(1 + math.exp(0.75) - math.exp(0.5))
    still = torch.zeros(32)
    assert alignment_loss(still, still, 20).item() == pytest.approx(-32 * math.log(32))  # where the authors' log begins
    moved = alignment_loss(torch.tensor([0.5]), torch.tensor([2.0, 0.0]), 4.0)
    assert moved.item() == pytest.approx(0.5 - math.log(math.exp(0.5) + 1))


def test_an_autoencoders_loss_in_closed_form() -> None:
    density, e = Autoencoder(3, 2), torch.randn(5, 3)
    for p in density.parameters():
        nn.init.zeros_(p)
    assert density.loss(e).item() == pytest.approx(e.square().sum(1).mean().item())  # a standard normal code is free
    with torch.no_grad():
        density.encode[-1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 2.0]))  # means, log variances
    apart = 0.5 * (1 + math.exp(2) - 1 - 2)
    assert density.loss(e).item() - density.distance(e).mean().item() == pytest.approx(0.025 * apart, rel=1e-4)


def test_a_class_goes_without_a_label_and_the_others_stay(model) -> None:
    found = unlearn("laf", model, bare(GONE), bare(KEPT), **SETTINGS)
    assert utility(model, GONE) > 0.99
    assert utility(found.model, GONE) < 0.1
    assert utility(found.model, KEPT) > 0.95
    assert torch.equal(found.model.head.weight, model.head.weight)


def test_alignment_holds_what_unlearning_moves(model) -> None:
    alone = unlearn("laf", model, bare(GONE), bare(KEPT), **SETTINGS | {"alignment_rate": 0.0})
    down = [told["unlearning"] for told in alone.trace if "unlearning" in told]
    assert down[-1] < down[0] - 5
    loose = alone.model
    held = unlearn("laf", model, bare(GONE), bare(KEPT), **SETTINGS).model
    turned = [
        1 - torch.cosine_similarity(each.features(KEPT.inputs), model.features(KEPT.inputs)).mean().item()
        for each in (loose, held)
    ]
    assert turned[1] < 0.5 * turned[0]


def test_repair_trains_the_head_alone_where_it_may(model) -> None:
    few = SETTINGS | {"epochs": 5}
    plain = unlearn("laf", model, GONE, KEPT, **few).model
    mended = unlearn("laf-repair", model, GONE, KEPT, **few, repair_epochs=3, repair_learning_rate=0.01)
    assert [told["repair"] for told in mended.trace if "repair" in told] == [True] * 3
    assert torch.equal(mended.model.first.weight, plain.first.weight)
    assert not torch.equal(mended.model.head.weight, plain.head.weight)
    frozen = trained(ALL)
    frozen.head.requires_grad_(False)
    mended = unlearn("laf-repair", frozen, GONE, KEPT, **few, repair_epochs=3).model
    assert torch.equal(mended.head.weight, frozen.head.weight)
    assert not torch.equal(mended.first.weight, unlearn("laf", frozen, GONE, KEPT, **few).model.first.weight)


def test_what_does_not_fit_is_refused(model) -> None:
    head_only = trained(ALL)
    head_only.first.requires_grad_(False)
    with pytest.raises(ValueError, match="model: laf changes representations, which none of the weights"):
        unlearn("laf", head_only, GONE, KEPT, seed=0, density_epochs=0)
    with pytest.raises(ValueError, match="model: laf needs a model with `features` and `head`, got Linear"):
        unlearn("laf", nn.Linear(4, 3), GONE, KEPT, seed=0)
    with pytest.raises(ValueError, match="labels: laf-repair needs labels"):
        unlearn("laf-repair", Net(4, 16, 3), bare(GONE), bare(KEPT), seed=0)
