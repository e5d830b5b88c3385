"""``to_peft``: adapters written by this package and loaded by PEFT; and what ``from_peft`` refuses, by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft_models import MODELS, NAMES, adapted, adapter_config, base, inputs, one_thread, peft, run, transformers
from torch import nn

from s3t_ext import adapt, from_peft, to_peft
from s3t_ext.lora.nn import adapted_layers
from s3t_ext.lora.peft import files

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def reloaded(kind: str, folder, **more) -> nn.Module:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(kind), folder, **more)
    assert not [str(w.message) for w in seen if "key" in str(w.message)], "no missing, no unexpected keys"
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:2], NAMES[:3]], ids=",".join)
@torch.no_grad()
def test_round_trip(kind, names, tmp_path) -> None:
    model = adapted(kind, 3)
    model.base_model.set_adapter(list(names))
    want = run(model, kind)
    ours = from_peft(model)
    to_peft(ours, tmp_path / "a")
    again = reloaded(kind, tmp_path / "a")
    torch.testing.assert_close(run(again, kind), want, rtol=1e-4, atol=1e-5)
    with again.disable_adapter():
        torch.testing.assert_close(run(again, kind), run(base(kind), kind), rtol=1e-4, atol=1e-5)
    ours.activate()
    to_peft(ours, tmp_path / "b", adapters=names)
    again = from_peft(reloaded(kind, tmp_path / "b", low_cpu_mem_usage=True))
    torch.testing.assert_close(run(again, kind), want, rtol=1e-4, atol=1e-5)
    layers = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert layers == set(), "the PEFT model was converted in place"


@torch.no_grad()
def test_bf16_adapters_lose_nothing(tmp_path) -> None:
    model = adapted("llama", 2).to(torch.bfloat16)
    ours = from_peft(model)
    want = [t.clone() for layer in ours.modules() if hasattr(layer, "ranks") for t in (layer.a1, layer.b1)]
    assert {t.dtype for t in want} == {torch.bfloat16}
    to_peft(ours, tmp_path / "a", ["ann"])
    again = from_peft(reloaded("llama", tmp_path / "a"))
    layers = [m for m in ours.modules() if hasattr(m, "ranks") and m.ranks[0]]
    others = [m for m in again.modules() if hasattr(m, "ranks")]
    assert len(layers) == len(others) > 0
    for layer, other in zip(layers, others):
        rank = layer.ranks[0]
        assert torch.equal(other.a[0], layer.a1[0, :rank].float())
        assert torch.equal(other.b[0], layer.b1[0, :rank].float() * layer.scale[0])


class Nested(nn.Module):
    """Names of which some end on others, and one that a regular expression would read otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.in_proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"proj": nn.Linear(4, 4), "in_proj": nn.Linear(4, 4)})

    def forward(self, x):
        return self.block["in_proj"](self.block["proj"](self.in_proj(self.proj(x))))


@torch.no_grad()
def test_names_do_not_collide(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Nested(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r"proj", init_lora_weights=False))
    made.add_adapter("more", peft.LoraConfig(r=3, target_modules=r"proj|block\..*proj", init_lora_weights=False))
    made.base_model.set_adapter(["default", "more"])
    want = made(x)
    to_peft(from_peft(made), tmp_path / "a")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
    torch.testing.assert_close(again(x), want, rtol=1e-5, atol=1e-6)
    found = {name.split(".lora_A")[0] for name, _ in again.named_parameters() if ".lora_A" in name}
    assert found == {f"base_model.model.{name}" for name in ("proj", "block.proj", "block.in_proj")}
    ranks = {name: m.r["default"] for name, m in again.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {"proj": 5, "block.proj": 3, "block.in_proj": 3}


@pytest.mark.parametrize("placed", [False, True], ids=["stack", "layers"])
@torch.no_grad()
def test_live_adapters_of_an_adapted_model(placed, tmp_path) -> None:
    model = base("bert")
    targets = [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    stage_of = {name: i for i, name in enumerate(targets)} if placed else None
    routing = adapt(model, targets, stages=2, groups=2, rank=3, scale=1.5, stage_of=stage_of)
    for layer in adapted_layers(model).values():
        layer.a, layer.b = torch.randn(3, 3, layer.in_features), torch.randn(3, 3, layer.out_features)
        layer.train_pool = (torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features))
    routing.table.copy_(torch.tensor([[2, -1], [4, 0]]))
    for group, live in enumerate(([2, -1], [4, 0])):
        with routing.batch([4, 0], torch.tensor([live, live], dtype=torch.int32)):
            want = run(model, "bert")
        folder = tmp_path / str(group)
        to_peft(model, folder, routing=routing, group=group)
        torch.testing.assert_close(run(reloaded("bert", folder), "bert"), want, rtol=1e-4, atol=1e-5)
    routing.table.fill_(-1)
    with pytest.raises(ValueError, match="live adapter"):
        to_peft(model, tmp_path / "none", routing=routing)
    with pytest.raises(ValueError, match=r"group: expected a row 0\.\.1"):
        to_peft(model, tmp_path / "none", routing=routing, group=2)
    assert not (tmp_path / "none").exists()


def test_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    ours = from_peft(adapted("llama", 2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="new or empty"):
        to_peft(ours, tmp_path / "full")
    (tmp_path / "empty").mkdir()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        to_peft(ours, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "full", "mine"]
    monkeypatch.undo()
    to_peft(ours, tmp_path / "empty")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_cannot_be_written(tmp_path) -> None:
    ours = from_peft(adapted("llama", 2))
    ours.activate()
    for more, words in (
        ({}, "live adapter"),
        ({"adapters": ["zoe"]}, r"adapters: .*\['zoe'\]"),
        ({"adapters": "ann"}, "adapters: expected a list of names, got 'ann'"),
    ):
        with pytest.raises(ValueError, match=words):
            to_peft(ours, tmp_path / "x", **more)
    with pytest.raises(ValueError, match="routing: expected"):
        to_peft(base("bert"), tmp_path / "x")
    with pytest.raises(ValueError, match="routing: expected None for a model of from_peft"):
        to_peft(ours, tmp_path / "x", routing=ours.routing)
    ours = from_peft(adapted("llama", 1, init_lora_weights="pissa"))
    with pytest.raises(NotImplementedError, match="'ann' began as 'pissa'"):
        to_peft(ours, tmp_path / "x")
    model = adapted("bert", 1)
    model.add_adapter("bob", copy.deepcopy(model.peft_config["ann"]))
    with pytest.raises(ValueError, match=r"modules_to_save, got \['ann', 'bob'\]"):
        to_peft(from_peft(model), tmp_path / "x", ["ann", "bob"])
    assert not any(tmp_path.iterdir())


# --- what from_peft refuses ------------------------------------------------------------------------------------------


def made(kind: str, **config):
    return lambda: peft.get_peft_model(base(kind), adapter_config(kind, 0, **config), "ann")


def other(kind: str, config_class: str, **config):
    return lambda: peft.get_peft_model(base(kind), getattr(peft, config_class)(**config), "ann")


def merged():
    model = adapted("llama", 2)
    model.merge_adapter(["bob"])
    return model


def changed(kind: str, change):
    def make():
        model = adapted(kind, 2)
        change(model)
        return model

    return make


def first(model):
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))


class Linear4bit(nn.Linear):
    """As bitsandbytes names its layer."""


def quantised(model) -> None:
    first(model).base_layer.__class__ = Linear4bit


def lora_a_only(model) -> None:
    first(model).lora_B["ann"].requires_grad_(False)


def attention():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    return peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["attention"]))


REFUSED = {
    "dora": (made("llama", use_dora=True), "use_dora of adapter 'ann'.*plain LoRA"),
    "activated": (
        made("llama", alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "ALoraLinearVariant of adapter 'ann' at 'model.layers.0.*plain LoRA",
    ),
    "lora_bias": (made("bert", lora_bias=True), "lora_bias of adapter"),
    "bias": (made("bert", bias="all"), "bias='all'.*bias='none'"),
    "merged": (merged, "merged adapters.*unmerge_adapter"),
    "embedding": (made("llama", target_modules=["embed_tokens"]), "Embedding over Embedding at 'model.embed_tokens'"),
    "convolution": (made("vit", target_modules=["projection"]), "Conv2d over Conv2d"),
    "attention": (attention, "MultiheadAttention.*target_modules"),
    "parameters": (
        made("llama", target_parameters=["q_proj.weight"], target_modules=[], rank_pattern={}),
        "target_parameters of adapter",
    ),
    "tokens": (made("llama", trainable_token_indices=[1, 2]), "trainable_token_indices.*modules_to_save"),
    "replication": (made("llama", layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "quantised": (changed("llama", quantised), r"Linear4bit at 'model.layers.0.*target_modules"),
    "type": (changed("llama", lambda m: first(m).base_layer.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "devices": (changed("llama", lambda m: first(m).to("meta")), "several devices.*load it on one"),
    "hook": (changed("llama", lambda m: first(m).register_forward_hook(print)), "a hook on Linear"),
    "mixed": (changed("llama", lora_a_only), "adapter 'ann', frozen in one part and trainable in another"),
    "active": (changed("llama", lambda m: first(m).set_adapter("bob")), "different active adapters"),
    "ia3": (other("llama", "IA3Config", target_modules=["q_proj"], feedforward_modules=[]), "of method IA3.*only LoRA"),
    "prompts": (other("llama", "PromptTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name) -> None:
    make, words = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    before = [(place, type(m)) for place, m in model.named_modules()]
    with pytest.raises(NotImplementedError, match=words):
        from_peft(model)
    assert before == [(place, type(m)) for place, m in model.named_modules()], "nothing was changed"


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="model: expected a PeftModel, got BertForSequenceClassification"):
        from_peft(base("bert"))
    with pytest.raises(ValueError, match="mode: expected one of"):
        from_peft(adapted("bert", 1), mode="quick")
    model = adapted("bert", 1)
    first(model).base_layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen weights under adapters, got a trainable one"):
        from_peft(model)


@torch.no_grad()
def test_beams_of_an_encoder_and_decoder_are_refused() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "wo"], init_lora_weights=False)).eval()
    x, names = inputs("bert"), ["default", "__base__", "default", "__base__"]
    want = model.generate(input_ids=x, adapter_names=names, max_new_tokens=5)
    ours = from_peft(model)
    assert torch.equal(ours.generate(input_ids=x, adapter_names=names, max_new_tokens=5), want)
    with pytest.raises(NotImplementedError, match="beam search"):
        ours.generate(input_ids=x, adapter_names=names, max_new_tokens=5, num_beams=2)
