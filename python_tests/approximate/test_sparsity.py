"""Sparsity: what is pruned stays 0 under any method, and the penalty takes the steps that a sum foretells."""

from __future__ import annotations

import pytest
import torch
from small import Adapted, Net, blobs, trained
from torch import nn
from torch.func import functional_call

from s3t_ext.approximate import METHODS, Method, Records, unlearn
from s3t_ext.approximate.work import Work, losses, utility

DATA = blobs(200)
GONE, KEPT = DATA[torch.arange(20)], DATA[torch.arange(20, 200)]


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("method", ["fine-tune", "neggrad-plus", "ssd", "iau-released", "l1-sparse"])
def test_the_smallest_are_zero_before_and_after_any_method(method) -> None:
    model = trained(DATA, Net(4, 16, 3))
    found = unlearn("prune-first", model, GONE, KEPT, seed=0, then=method, sparsity=0.75).model
    every = torch.cat([p.detach().abs().flatten() for p in (model.first.weight, model.head.weight)])
    least = every.sort().values[: int(0.75 * len(every))]
    gone = torch.cat([m.flatten() for m in zeros(found).values()])
    assert gone.sum() == len(least)
    assert every[gone].sort().values.tolist() == least.tolist()
    others = [n for n, p in found.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert "head.bias" in others or method == "ssd"
    assert not any(p._backward_hooks for p in found.parameters())


def test_the_method_never_sees_a_pruned_weight_again() -> None:
    """Three steps of SGD by hand on what is left."""
    model = trained(DATA, Net(4, 16, 3))
    settings = {"alpha": 1.0, "epochs": 3, "batch": len(KEPT), "learning_rate": 0.5}
    found = unlearn("prune-first", model, GONE, KEPT, seed=0, then="neggrad-plus", sparsity=0.5, settings=settings)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: ~zero for name, zero in zeros(found.model).items()}
    for step in range(4):
        weights = {name: p * masks.get(name, 1) for name, p in weights.items()}
        if step < 3:
            weights = {name: p.requires_grad_() for name, p in weights.items()}
            loss = losses("classification", functional_call(model, weights, (KEPT.inputs,)), KEPT.labels).mean()
            grads = torch.autograd.grad(loss, [*weights.values()])
            weights = {name: (p - 0.5 * grad).detach() for (name, p), grad in zip(weights.items(), grads)}
    for name, p in found.model.named_parameters():
        assert torch.allclose(p, weights[name], atol=1e-5)


def test_retraining_begins_pruned_too_and_leaves_its_beginning_alone() -> None:
    settings, initial = {"epochs": 1, "batch": len(KEPT), "learning_rate": 0.0}, Net(4, 16, 3)
    before = [p.clone() for p in initial.parameters()]
    done = unlearn("prune-first", trained(DATA), GONE, KEPT, initial=initial, seed=0, then="retrain", settings=settings)
    assert sum(int(zero.sum()) for zero in zeros(done.model).values()) == int(0.95 * 7 * 16)
    loss = losses("classification", done.model(KEPT.inputs), KEPT.labels).mean().item()
    assert done.trace[0]["loss"] == pytest.approx(loss, rel=1e-5), "what it ends with it began with"
    assert all(torch.equal(a, b) for a, b in zip(before, initial.parameters(), strict=True))


def test_what_a_method_does_beside_gradients_is_pruned_too(monkeypatch) -> None:
    def spy(work: Work) -> None:
        for p in work.model.parameters():
            p.data.fill_(1.0)

    monkeypatch.setitem(METHODS, "spy", Method(spy))
    found = unlearn("prune-first", trained(DATA), GONE, KEPT, seed=0, then="spy").model
    assert sum(int(zero.sum()) for zero in zeros(found).values()) == int(0.95 * 7 * 16)


def test_settings_reach_the_method_and_are_checked() -> None:
    model = trained(DATA)
    one = unlearn("prune-first", model, GONE, KEPT, seed=0, sparsity=0.5, settings={"epochs": 1})
    assert [note["epoch"] for note in one.trace] == [0]
    for settings, says in (
        ({"settings": {"alfa": 1}}, "alfa: no setting of fine-tune"),
        ({"then": "retrain"}, "initial: retrain needs the model as it was"),
        ({"then": "magic"}, "method: expected one of .*, got 'magic'"),
        ({"sparsity": 1.0}, "sparsity: expected a share from 0 to less than 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=says):
            unlearn("prune-first", model, GONE, KEPT, seed=0, **settings)


def test_of_an_adapter_b_alone_is_pruned() -> None:
    model = trained(DATA, Adapted(4, 16, 3))
    found = unlearn("prune-first", model, GONE, KEPT, seed=0, sparsity=0.5).model
    assert (found.lora_B == 0).sum() == found.lora_B.numel() // 2
    assert not (found.lora_A == 0).any()


def test_the_penalty_takes_known_steps_down_to_the_last_epoch() -> None:
    """A weight that no record sees, lr 1 / 4, 2 epochs of one batch: 4 (1 + 1 / 2) / 4 less in all."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    seen = Records(torch.tensor([[1.0, 0.0]] * 3), torch.full((3, 1), 5.0), ("a", "b", "c"))
    other = Records(torch.tensor([[1.0, 0.0]]), torch.full((1, 1), 5.0), ("d",))
    settings = {"gamma": 1.0, "epochs": 2, "learning_rate": 0.25, "momentum": 0.0, "weight_decay": 0.0}
    found = unlearn("l1-sparse", model, other, seen, seed=0, **settings).model
    assert found.weight[0, 1].item() == 2 - 0.25 * (1 + 0.5)


def test_the_penalty_leaves_smaller_weights_and_the_answers() -> None:
    model = trained(DATA)
    settings = {"learning_rate": 0.05, "weight_decay": 0.0, "epochs": 20}
    sparse, plain = (
        unlearn("l1-sparse", model, GONE, KEPT, seed=0, gamma=gamma, **settings).model for gamma in (5e-3, 0.0)
    )
    near = [sum((p.abs() < 0.01).sum() for p in m.parameters()) for m in (sparse, plain)]
    assert near[0] > 2 * near[1]
    assert utility(sparse, KEPT) > 0.95
