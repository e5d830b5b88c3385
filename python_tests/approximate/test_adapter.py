"""An adapter folder in and out: it answers as PEFT does, goes out as it came in, and begins again as PEFT begins it."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from s3t_ext.approximate.adapter import AdaptedModel, before_training
from s3t_ext.approximate.folder import load_adapter, save_adapter
from s3t_ext.models.folder import build, load_model, save_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KINDS = {  # where the head is, the base's class, its task, inputs
    "vit, head beside": ("vit", "", "classification", False),
    "bert, head beside": ("bert", "", "regression", True),
    "bert": ("bert", "SequenceClassification", "classification", True),
    "roberta": ("roberta", "SequenceClassification", "regression", True),
    "llama": ("llama", "SequenceClassification", "classification", True),
    "gpt2": ("gpt2", "SequenceClassification", "classification", True),
    "images": ("vit", "ImageClassification", "classification", False),
    "causal": ("llama", "CausalLM", "causal", True),
}
TARGETS = {"vit": ["qkv", "fc1"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
OUTPUTS = 3


def drawn(shape: tuple[int, ...], text: bool) -> torch.Tensor:
    torch.manual_seed(1)
    if not text:
        return torch.randn(5, *shape)
    x = torch.randint(2, tiny_models.WORDS, (5, 16))
    return x.masked_fill(torch.arange(16) >= torch.tensor([16, 3, 7, 1, 12])[:, None], -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the folders of a kind's base and adapter, as PEFT writes it, with weights as trained ones are."""
    folders: dict[str, tuple] = {}

    def give(kind: str) -> tuple:
        if kind in folders:
            return folders[kind]
        family, named, task, text = KINDS[kind]
        root = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        if "vit" in kind:
            arguments = {"shape": [1, 8, 8], "patch": 4, "width": 16, "depth": 2, "heads": 2}
            save_model(root / "base", build("vit", arguments), "vit", arguments)
            inner = load_model(root / "base")
        else:
            tiny_models.save(family, root / "base", "ForCausalLM" * (task == "causal"), pad_token_id=1)
            inner = getattr(transformers, f"AutoModel{'For' * bool(named)}{named}").from_pretrained(
                root / "base", **({"num_labels": OUTPUTS} if task != "causal" else {})
            )
        targets = ["query", "value"] if kind in ("roberta", "images") else TARGETS[family]
        if kind == "images":
            targets = [n for n, m in inner.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
        config = peft.LoraConfig(
            r=2,
            target_modules=targets,
            task_type={"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}.get(named),
            modules_to_save=["classifier"] if kind == "images" else None,
        )
        model = peft.get_peft_model(inner, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(root / "adapter", save_embedding_layers=False)
        if not named:
            width = 16 if "vit" in kind else 32
            save_file(
                {"weight": torch.randn(OUTPUTS, width), "bias": torch.randn(OUTPUTS)}, root / "adapter/head.safetensors"
            )
        folders[kind] = root / "base", root / "adapter", model.eval(), task, text
        return folders[kind]

    return give


def loaded(made, kind: str, folder=None) -> AdaptedModel:
    base, adapter, _, task, text = made(kind)
    return load_adapter(folder or adapter, base, task, OUTPUTS if task != "causal" else 0, text)


def by_peft(made, kind: str, x: torch.Tensor) -> torch.Tensor:
    """Give what PEFT's own model answers, one record at a time: no padding."""
    _, adapter, model, task, text = made(kind)
    rows = [model(input_ids=row[row >= 0][None]) if text else model(row[None]) for row in x]
    if task == "causal":
        return torch.stack([row.logits[0, -1] for row in rows])
    if not KINDS[kind][1]:
        head = load_file(adapter / "head.safetensors")
        rows = [row.last_hidden_state.mean(1) if text else row for row in rows]
        return torch.cat(rows) @ head["weight"].T + head["bias"]
    return torch.cat([row.logits for row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_it_answers_as_peft_and_goes_out_as_it_came(made, kind, tmp_path) -> None:
    _, adapter, _, task, text = made(kind)
    model = loaded(made, kind)
    x = drawn((1, 12, 12) if kind == "images" else (1, 8, 8), text)
    with torch.no_grad():
        said, want = model(x), by_peft(made, kind, x)
        torch.testing.assert_close(model.head(model.features(x)), said)
    if task == "causal":
        said = said[torch.arange(len(x)), (x >= 0).sum(1) - 1]
    torch.testing.assert_close(said, want, rtol=1e-4, atol=1e-4)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or "head" in n or "modules_to_save" in n for n in weights)
    first = torch.autograd.grad(model(x).square().mean(), list(weights.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(weights.values()))
    assert all(g.isfinite().all() for g in second)
    assert sum(g.abs().sum() for g in second) > 0
    with torch.no_grad():
        for parameter in weights.values():
            parameter.mul_(1.5)
    save_adapter(model, adapter, tmp_path / "out", {"guarantee": "approximate"})
    assert (tmp_path / "out/adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    for file in (p.name for p in adapter.glob("*.safetensors")):
        then, now = load_file(adapter / file), load_file(tmp_path / "out" / file)
        assert set(then) == set(now)
        assert all(torch.equal(now[n], 1.5 * then[n]) for n in then)
    with torch.no_grad():
        torch.testing.assert_close(loaded(made, kind, tmp_path / "out")(x), model(x))


@pytest.mark.parametrize("kind", ["vit, head beside", "bert"])
def test_before_training_the_base_answers(made, kind) -> None:
    base, _, _, _, text = made(kind)
    model = loaded(made, kind)
    fresh, again, other = (before_training(model, seed) for seed in (3, 3, 4))
    x = drawn((1, 8, 8), text)
    assert all(not p.any() for n, p in fresh.named_parameters() if "lora_B" in n)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), other.parameters()))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        if text:
            with fresh.peft.disable_adapter():
                want = fresh.peft(input_ids=x[:1]).logits
            torch.testing.assert_close(fresh(x[:1]), want)
        else:
            assert torch.equal(fresh.features(x), load_model(base)(x))
        assert not torch.equal(fresh(x), model(x))
    assert not torch.equal(fresh.head.weight, model.head.weight)


@pytest.mark.parametrize("kind", ["vit, head beside", "bert"])
def test_a_copy_has_its_own_adapter_and_shares_the_base(made, kind) -> None:
    model = loaded(made, kind)
    twin, x = copy.deepcopy(model), drawn((1, 8, 8), made(kind)[4])
    with torch.no_grad():
        before = model(x)
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (ours is theirs) == (not ours.requires_grad), name
            if theirs.requires_grad:
                theirs.add_(1)
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)


def test_types_are_kept_and_nothing_else_goes_along(made, tmp_path) -> None:
    _, adapter, *_ = made("bert, head beside")
    half = tmp_path / "half"
    half.mkdir()
    for file in adapter.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, half / file.name)
    (half / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (half / "tokenizer.json").write_text("{}")
    (half / "optimizer.pt").write_bytes(b"moments of the forgotten")
    save_adapter(loaded(made, "bert, head beside", half), half, tmp_path / "out", {})
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "tokenizer.json",
        "unlearned.json",
    }
    for file in half.glob("*.safetensors"):
        now = load_file(tmp_path / "out" / file.name)
        assert all(torch.equal(now[n], t) and now[n].dtype == t.dtype for n, t in load_file(file).items())


def test_a_write_that_fails_leaves_nothing(made, tmp_path, monkeypatch) -> None:
    _, adapter, *_ = made("vit, head beside")
    model = loaded(made, "vit, head beside")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3t_ext.approximate.folder.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, adapter, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(made, tmp_path) -> None:
    base, adapter, _, task, text = made("vit, head beside")
    other, theirs, *_ = made("bert")

    def changed(**more) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for file in adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((adapter / "adapter_config.json").read_text()) | more
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(folder)

    for name, size in (("wide", {"width": 32}), ("deep", {"depth": 3}), ("flat", {"depth": 1})):
        arguments = {"shape": [1, 8, 8], "patch": 4, "width": 16, "depth": 2, "heads": 2, **size}
        save_model(tmp_path / name, build("vit", arguments), "vit", arguments)
    biased = tmp_path / "biased"
    config = peft.LoraConfig(r=2, target_modules=["qkv"], bias="lora_only")
    peft.get_peft_model(load_model(base), config).save_pretrained(biased)
    (biased / "head.safetensors").write_bytes((adapter / "head.safetensors").read_bytes())
    for folder, says in (
        (changed(peft_type="IA3"), "expected plain LoRA .peft_type LORA., got IA3"),
        (changed(use_dora=True), "got DoRA"),
        (changed(init_lora_weights="pissa"), "began as 'pissa', which changed the base weights"),
        (biased, "expected plain LoRA and at most a head, got one that trains .*bias"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            load_adapter(folder, base, task, 3, text)
    for folder, over, outputs, says in (
        (tmp_path / "none", base, 3, "ADAPTER: expected a folder with adapter_config.json"),
        (adapter, tmp_path / "wide", 3, "--base: expected the model that the adapter in .* was trained on"),
        (adapter, tmp_path / "deep", 3, "--base: .* got .*deep: 4 weights that differ"),
        (adapter, tmp_path / "flat", 3, "--base: .* got .*flat: 4 weights that differ"),
        (adapter, other, 3, "--base: expected the model that the adapter in"),
        (adapter, base, 4, r"head.safetensors: expected weight \[4, 16\]"),
        (theirs, base, 3, "ADAPTER: expected head.safetensors beside an adapter over"),
    ):
        with pytest.raises(ValueError, match=says):
            load_adapter(folder, over, task, outputs, text)
    config = json.loads((theirs / "adapter_config.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    weights = load_file(theirs / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "classifier" not in n}, bare / "adapter_model.safetensors")
    (bare / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None, "task_type": None}))
    with pytest.raises(ValueError, match="a head in its modules_to_save or in the base, got no classifier"):
        load_adapter(bare, other, "classification", 3, True)
