"""Quantised frozen layers: left to their own forward pass, adapters on top."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from s3t_ext.lora.nn import MaskedLoRALinear, adapt, adapted_layers, pack_layers
from s3t_ext.lora.routing import Routing


class Linear8bit(nn.Linear):
    """What a layer with int8 weights is to those around it: of `nn.Linear`'s kind, with a weight of another type."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        rows = plain.weight.detach().abs().amax(1, keepdim=True) / 127  # (O, 1)
        self.weight = nn.Parameter((plain.weight.detach() / rows).round().to(torch.int8), requires_grad=False)
        self.register_buffer("rows", rows)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.rows.to(x.dtype), self.bias)


def quantise(layer: nn.Linear, kind: str) -> nn.Linear:
    """Give a quantised copy: by its weight's type, or, as a layer of bitsandbytes before it is moved, by its module."""
    if kind == "int8":
        return Linear8bit(layer)
    own = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(16, 16)
    own.load_state_dict(layer.state_dict())
    return own


@pytest.fixture(params=["int8", "bitsandbytes"])
def models(request) -> tuple[nn.Module, nn.Module, Routing]:
    """Give a quantised model alone, and with adapters of two stages and two groups."""
    torch.manual_seed(0)
    base = nn.Sequential(quantise(nn.Linear(16, 16), request.param), nn.ReLU(), nn.Linear(16, 16))
    model = copy.deepcopy(base)
    routing = adapt(model, stages=2, groups=2, rank=3)
    for layer in adapted_layers(model).values():
        layer.a, layer.b = torch.randn(4, 3, 16), torch.randn(4, 3, 16)
    return base, model, routing


def test_a_quantised_layer_keeps_its_forward_pass_and_gets_adapters(models) -> None:
    base, model, routing = models
    x = torch.randn(6, 5, 16)
    with routing.batch([2, 4]):
        assert torch.equal(model[0](x), base[0](x)), "all masked: the layer itself"
    routing.table.copy_(torch.tensor([[3, -1], [1, 0]], dtype=torch.int32))
    with routing.batch([2, 4]):
        y = model[0](x)
    layer = model[0]
    product = layer.a.mT @ layer.b  # (N, K, O)
    more = torch.cat([x[:2] @ product[3], x[2:] @ (product[1] + product[0])]) * 2.0
    torch.testing.assert_close(y, base[0](x) + more)
    layer.a[2], layer.b[2] = torch.nan, torch.nan
    with routing.batch([2, 4]):
        assert torch.equal(model[0](x), y), "a dead adapter is not read"


def test_gradients_reach_adapters_and_inputs_and_no_frozen_weight(models) -> None:
    _, model, routing = models
    pools = [(torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)) for _ in range(2)]
    for layer, pool in zip(adapted_layers(model).values(), pools, strict=True):
        layer.train_pool = pool
    x = torch.randn(6, 16, requires_grad=True)
    with routing.batch([2, 4], torch.tensor([[0, 4], [-1, 5]], dtype=torch.int32)):
        model(x).sum().backward()
    assert x.grad is not None
    assert all(t.grad is not None and t.grad[j].any() for pool in pools for t in pool for j in range(2))
    assert not any(p.requires_grad for p in model.parameters())


def test_packing_and_state_leave_it_alone(models) -> None:
    base, model, _ = models
    weight = model[0].weight
    pack_layers(model, backward=True)
    assert model[0].weight is weight
    assert model[2].packed is not None
    state = model.state_dict()
    assert {f"0.layer.{k}" for k in base[0].state_dict()} == {k for k in state if k.startswith("0.")}
    model.load_state_dict(state)
    assert isinstance(model[0], MaskedLoRALinear)
    assert "stages=[0, 1]" in repr(model[0])
