"""The model that ``from_peft`` gives: what it holds and shows, which adapters are active, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
from peft_models import MODELS, NAMES, adapted, inputs, one_thread, peft, run
from torch import nn

from s3t_ext import from_peft
from s3t_ext.lora.peft.layers import AdaptersLinear

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
every_model = pytest.mark.parametrize("kind", MODELS)
TYPES = (torch.float32, torch.bfloat16)


@every_model
@pytest.mark.parametrize("trains", [False, True])
def test_weights_are_packed_and_held_once(kind, trains) -> None:
    """While the caller still holds PEFT's model, and with nothing collected: plain weights are gone."""
    model = adapted(kind, 3).requires_grad_(False)
    for name in NAMES[:3] if trains else ():
        model.set_requires_grad(name)
    gc.collect()
    gc.disable()
    try:
        bases = [m.get_base_layer() for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        sizes, storages = [m.weight.nbytes for m in bases], [weakref.ref(m.weight.untyped_storage()) for m in bases]
        del bases
        ours = from_peft(model)
        assert [ref() for ref in storages] == [None] * len(sizes)
    finally:
        gc.enable()
    packed = [m.packed for m in ours.modules() if isinstance(m, AdaptersLinear)]
    assert [p.turned is not None for p in packed] == [trains and i > 0 for i in range(len(packed))]
    assert sum(p.panels.untyped_storage().nbytes() for p in packed) == sum(
        -(-p.out_features // 32) * 32 * size // p.out_features for p, size in zip(packed, sizes)
    )


@torch.no_grad()
def test_activate_rewrites_the_table_only() -> None:
    model = adapted("bert", 3)
    want = {}
    for name in NAMES[:3]:
        model.base_model.set_adapter(name)
        want[name] = run(model, "bert")
    with model.disable_adapter():
        want[""] = run(model, "bert")
    ours = from_peft(model)
    before = {name: (p.data_ptr(), p._version) for name, p in ours.named_parameters()}
    address = ours.routing.table.data_ptr()
    for name in ("bob", "", "ann", "cat"):
        ours.activate(*filter(None, [name]))
        torch.testing.assert_close(run(ours, "bert"), want[name], rtol=1e-5, atol=1e-5)
    assert before == {name: (p.data_ptr(), p._version) for name, p in ours.named_parameters()}
    assert address == ours.routing.table.data_ptr()


@torch.no_grad()
def test_an_adapter_that_is_not_active_is_not_read() -> None:
    ours = from_peft(adapted("llama", 3))
    ours.activate("bob")
    clean = run(ours, "llama")
    for layer in ours.modules():
        if isinstance(layer, AdaptersLinear):
            for pool in layer.train_pool:
                pool[[0, 2]] = torch.nan
    assert torch.equal(run(ours, "llama"), clean)
    ours.activate("ann")
    assert run(ours, "llama").isnan().any()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.activate("zoe"), ValueError, r"\['zoe'\]"),
        (lambda m: m.activate("ann", "ann"), ValueError, "different adapters"),
        (lambda m: m(inputs("bert"), adapter_names=["ann", "zoe", "ann", "bob"]), ValueError, r"bob.*\['zoe'\]"),
        (lambda m: m(inputs("bert"), adapter_names=["ann"] * 3), ValueError, "4 samples, got 3 names"),
        (
            lambda m: m(inputs("bert"), adapter_names="ann"),
            ValueError,
            "adapter_names: expected a list of names, got 'ann'",
        ),
        (lambda m: m.train()(inputs("bert"), adapter_names=["ann"] * 4), ValueError, "training mode"),
    ],
    ids=["unknown", "twice", "unknown sample", "too few", "string", "training"],
)
def test_wrong_names(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(from_peft(adapted("bert", 2)))


def test_two_adapters_with_one_module() -> None:
    model = adapted("bert", 1)
    model.add_adapter("bob", copy.deepcopy(model.peft_config["ann"]))
    ours = from_peft(model)
    with pytest.raises(ValueError, match=r"modules_to_save, got \['ann', 'bob'\]"):
        ours.activate("ann", "bob")
    assert ours.active == ("ann",), "nothing was changed"


def test_state_dict_copy_and_type() -> None:
    ours = from_peft(adapted("bert", 3))
    want = run(ours, "bert")
    other = adapted("bert", 3)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again = from_peft(other)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(run(again, "bert"), want)
    assert torch.equal(run(copy.deepcopy(ours), "bert"), want)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), "bert"), want)
    scales = [m.scale.clone() for m in ours.modules() if isinstance(m, AdaptersLinear)]
    half = ours.bfloat16()
    for layer, scale in zip([m for m in half.modules() if isinstance(m, AdaptersLinear)], scales):
        assert layer.a1.dtype == torch.bfloat16
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.scale, scale)
    torch.testing.assert_close(run(half, "bert").float(), want, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_second_conversion_is_refused_and_the_first_goes_on() -> None:
    model = adapted("bert", 2)
    ours = from_peft(model)
    ours.activate("bob")
    want = run(ours, "bert")
    with pytest.raises(ValueError, match="already converted; use the model that from_peft returned"):
        from_peft(model)
    ours.activate("ann")
    assert not torch.equal(run(ours, "bert"), want)
    ours.activate("bob")
    assert torch.equal(run(ours, "bert"), want)


@torch.no_grad()
def test_a_model_without_lora_layers_is_refused() -> None:
    model = adapted("llama", 1)
    model.unload()
    with pytest.raises(ValueError, match="model: expected LoRA layers, got none"):
        from_peft(model)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("save_pretrained", r"to_peft\(model, folder\)"),
        ("set_adapter", "activate"),
        ("disable_adapters", "activate"),
        ("add_adapter", "before from_peft"),
        ("merge_and_unload", "to_peft"),
        ("print_trainable_parameters", "numel"),
    ],
)
def test_what_would_pass_the_adapters_by_says_what_to_use(name, instead) -> None:
    ours = from_peft(adapted("bert", 1))
    assert not hasattr(ours, name)
    with pytest.raises(AttributeError, match=f"^{name}: .*use .*{instead}"):
        getattr(ours, name)


@torch.no_grad()
def test_disable_adapter_as_in_peft() -> None:
    model = adapted("bert", 2)
    with model.disable_adapter():
        want = run(model, "bert")
    ours = from_peft(model)
    summed = run(ours, "bert")
    with ours.disable_adapter():
        torch.testing.assert_close(run(ours, "bert"), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(ours, "bert"), summed)


def test_layers_print_their_adapters() -> None:
    model = adapted("llama", 3)
    model.set_requires_grad("ann", requires_grad=False)
    printed = {place: m.extra_repr() for place, m in from_peft(model).named_modules() if isinstance(m, AdaptersLinear)}
    assert "rank=4, adapters=2 (ann, cat), mode=fast, packed=True" in printed["model.model.layers.0.self_attn.q_proj"]
    assert "adapters=1 (bob)" in printed["model.model.layers.0.mlp.gate_proj"]


def test_the_wrapped_model_shows_through() -> None:
    ours = from_peft(adapted("bert", 1))
    assert ours.config.num_labels == 3
    assert ours.classifier.out_features == 3, "of the saved copy"
    assert ours.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="nothing"):
        _ = ours.nothing


def test_adapters_of_another_type_become_fp32() -> None:
    model = adapted("llama", 2)
    want = run(model, "llama")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()  # of which these values lose nothing
    ours = from_peft(model)
    assert {layer.a1.dtype for layer in ours.modules() if isinstance(layer, AdaptersLinear)} == {torch.float32}
    torch.testing.assert_close(run(ours, "llama"), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_graph_serves_every_choice_of_adapters() -> None:
    ours = from_peft(adapted("llama", 2))
    batches = [None, ["ann", "bob", "__base__", "ann"], ["bob", "bob", "ann", "ann"]]
    want = [run(ours, "llama", adapter_names=names) for names in batches]
    ours.model.compile(backend="aot_eager", fullgraph=True)
    for names in batches[:2]:
        run(ours, "llama", adapter_names=names)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names, expected in zip(batches, want):
            assert torch.equal(run(ours, "llama", adapter_names=names), expected)
        ours.activate("bob")
        torch.testing.assert_close(run(ours, "llama")[:2], want[2][:2], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_dropout_in_training_only() -> None:
    plain, model = from_peft(adapted("llama", 2)), from_peft(adapted("llama", 2, lora_dropout=0.5))
    assert torch.equal(run(model, "llama"), run(plain, "llama"))
    model.train()
    torch.manual_seed(5)
    first, second = run(model, "llama"), run(model, "llama")
    torch.manual_seed(5)
    assert torch.equal(run(model, "llama"), first)
    assert not torch.equal(first, second)
    layer = next(m for m in model.modules() if isinstance(m, AdaptersLinear) and m.ranks[0])
    model.activate("ann")
    x = torch.randn(1, 1, layer.in_features)
    with torch.no_grad():
        base = nn.functional.linear(x, layer.weight)
        mean = torch.stack([layer(x) - base for _ in range(2000)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x) - base, rtol=0, atol=0.15)


def test_different_dropout_is_refused_in_training() -> None:
    model = adapted("llama", 1, lora_dropout=0.5)
    model.add_adapter("bob", copy.deepcopy(model.peft_config["ann"]))
    for layer in model.modules():
        if hasattr(layer, "lora_dropout") and "bob" in layer.lora_dropout:
            layer.lora_dropout["bob"].p = 0.25
    ours = from_peft(model)
    ours.train()
    run(ours, "llama")
    ours.activate("ann", "bob")
    with pytest.raises(NotImplementedError, match="lora_dropout"):
        run(ours, "llama")
    run(ours.eval(), "llama")


def test_without_peft_the_error_says_what_to_install() -> None:
    check = (
        "import sys; sys.modules['peft'] = None; import s3t_ext\n"
        "for call in (lambda: s3t_ext.from_peft(None), lambda: s3t_ext.to_peft(None, 'x')):\n"
        "    try: call()\n"
        "    except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.count('pip install "s3t-ext[peft]"') == 2
