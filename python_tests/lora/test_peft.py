"""``from_peft``: outputs, gradients, training and mixed batches as in PEFT, on models of ``transformers``."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from numerics import assert_error
from peft_models import MODELS, NAMES, SAVED, adapted, inputs, one_thread, run
from torch import Tensor, nn

from s3t_ext import from_peft
from s3t_ext.lora.peft.layers import AdaptersLinear

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
every_model = pytest.mark.parametrize("kind", MODELS)
TYPES = (torch.float32, torch.bfloat16)


def hold(got: list[dict[str, Tensor]], peer: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> None:
    """Guarantee 6 with PEFT as the peer: our error against fp64 is at most twice its own, plus rounding.

    Logits and the whole gradient, one vector each over all draws: in layers so small, the error of a single one is
    often that of a few cancelling sums.
    """
    for draws in zip(got, peer, exact):
        assert draws[0].keys() == draws[1].keys() == draws[2].keys()
        assert all(draws[0][name].shape == value.shape for name, value in draws[2].items())
    for names in (["logits"], [name for name in exact[0] if name != "logits"]):
        lists = [[draw[name] for draw in draws for name in names] for draws in (got, peer, exact)]
        if names:
            assert_error(*lists, max(float(t.abs().max()) for t in lists[2]))


def peft_gradients(model: nn.Module, kind: str, **more) -> dict[str, Tensor]:
    """Give logits, and gradients by the names of PEFT's parameters."""
    y = run(model, kind, **more)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), **grads}


def our_values(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Take ``grad`` or ``data`` of the trainable pools apart, by the names of PEFT's parameters."""
    found = {}
    for place, layer in model.model.named_modules():
        if isinstance(layer, AdaptersLinear) and layer.train_pool is not None:
            a, b = (getattr(t, what) for t in layer.train_pool)
            for n, rank in enumerate(layer.ranks[len(layer.a) :]):
                name = model.adapters[len(layer.a) + n]
                if rank:
                    found[f"{place}.lora_A.{name}.weight"] = a[n, :rank]
                    found[f"{place}.lora_B.{name}.weight"] = b[n, :rank].t()
                assert not a[n, rank:].any(), "padding stays zero"
                assert not b[n, rank:].any(), "padding stays zero"
    for name, p in model.model.named_parameters():
        if ".modules_to_save." in name and p.requires_grad:
            found[name] = getattr(p, what)
    return found


def our_gradients(model: nn.Module, kind: str, **more) -> dict[str, Tensor]:
    y = run(model, kind, **more)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    return {"logits": y.detach(), **our_values(model, "grad")}


@every_model
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outputs_and_gradients(kind, count, dtype) -> None:
    ours, peer, exact = [], [], []
    for seed in range(2):
        model = adapted(kind, count, dtype, seed)
        exact.append(peft_gradients(copy.deepcopy(model).double(), kind))
        peer.append(peft_gradients(copy.deepcopy(model).to(dtype), kind))
        converted = from_peft(model)
        assert converted.active == NAMES[:count]
        pools = {m.a1.dtype for m in converted.modules() if isinstance(m, AdaptersLinear)}
        assert torch.float32 in pools, "as PEFT made them"
        ours.append(our_gradients(converted, kind))
    hold(ours, peer, exact)


@every_model
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@torch.no_grad()
def test_mixed_batches(kind, dtype) -> None:
    model = adapted(kind, 3, dtype)
    model.base_model.set_adapter("ann")
    names = ["cat", "__base__", "ann", "bob", "ann"]
    if SAVED[kind]:  # PEFT itself fails on samples of adapters without a copy of a saved module
        names = ["ann", "__base__", "ann", "ann", "__base__"]
    exact = run(copy.deepcopy(model).double(), kind, 5, adapter_names=names)
    peer = run(copy.deepcopy(model).to(dtype), kind, 5, adapter_names=names)
    ours = from_peft(model, mode="exact")
    hold([{"logits": run(ours, kind, 5, adapter_names=names)}], [{"logits": peer}], [{"logits": exact}])


@every_model
@torch.no_grad()
def test_a_sample_is_as_if_its_adapter_were_active(kind) -> None:
    names = ["cat", "__base__", "ann", "bob", "ann"]
    ours = from_peft(adapted(kind, 3), mode="exact")
    mixed = run(ours, kind, 5, adapter_names=names)
    for i, name in enumerate(names):
        ours.activate(*([] if name == "__base__" else [name]))
        torch.testing.assert_close(mixed[i], run(ours, kind, 5)[i], rtol=1e-5, atol=1e-5)
    assert (mixed[2] - mixed[3]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generate(kind, beams) -> None:
    model, x = adapted(kind, 3), inputs(kind)
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    names, alone = ["bob", "__base__", "ann", "cat"], []
    summed = model.generate(input_ids=x, **how)
    for i, name in enumerate(names):
        model.base_model.set_adapter("ann" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            alone.append(model.generate(input_ids=x[i : i + 1], **how))
    model.base_model.set_adapter(list(NAMES[:3]))
    ours = from_peft(model)
    assert torch.equal(ours.generate(input_ids=x, adapter_names=names, **how), torch.cat(alone))
    assert torch.equal(ours.generate(x, **how), summed)
    assert not torch.equal(torch.cat(alone), summed)


@pytest.mark.parametrize(
    ("kind", "optimizer", "lr"),
    [("bert", torch.optim.AdamW, 0.01), ("vit", torch.optim.SGD, 1), ("llama", torch.optim.AdamW, 0.01)],
)
def test_training_steps(kind, optimizer, lr) -> None:
    def steps(model: nn.Module) -> nn.Module:
        optim = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(3):
            optim.zero_grad()
            run(model, kind).square().mean().backward()
            optim.step()
        return model

    theirs = dict(steps(adapted(kind, 3).train()).named_parameters())
    ours = our_values(steps(from_peft(adapted(kind, 3).train())), "data")
    start = dict(adapted(kind, 3).named_parameters())
    assert len(ours) == sum(p.requires_grad for p in theirs.values())
    names = [f"base_model.model.{name}" for name in ours]
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in names]).detach()
    apart = torch.cat([(theirs[name] - value).flatten() for name, value in zip(names, ours.values())]).detach()
    assert moved.norm() > 0.01
    assert apart.norm() < 0.01 * moved.norm()


def test_frozen_and_trainable_adapters_in_one_layer() -> None:
    model = adapted("llama", 3)
    model.set_requires_grad("ann", requires_grad=False)
    exact = peft_gradients(copy.deepcopy(model).double(), "llama")
    peer = peft_gradients(copy.deepcopy(model), "llama")
    ours = from_peft(model)
    assert ours.adapters == ("ann", "bob", "cat"), "frozen first"
    assert ours.active == ("ann", "bob", "cat")
    trained = {name.rsplit(".", 1)[1] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {"a1", "b1"}
    hold([our_gradients(ours, "llama")], [peer], [exact])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing(kind, reentrant) -> None:
    """Same bits: what the backward pass computes again is what the forward pass computed."""
    plain, ours = (from_peft(adapted(kind, 3).train()) for _ in range(2))
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    runs: list[nn.Module] = []
    next(m for m in ours.modules() if isinstance(m, AdaptersLinear)).register_forward_pre_hook(
        lambda m, _: runs.append(m)
    )
    want, got = our_gradients(plain, kind), our_gradients(ours, kind)
    assert len(runs) == 2, "computed again"
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_autocast() -> None:
    model = adapted("llama", 3)
    exact = peft_gradients(copy.deepcopy(model).double(), "llama")
    with torch.autocast("cpu", torch.bfloat16):
        peer = peft_gradients(copy.deepcopy(model), "llama")
        ours = our_gradients(from_peft(model), "llama")
    hold([ours], [peer], [exact])
