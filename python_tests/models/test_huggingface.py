"""Folders of the transformers library as base models: what is taken, dropped and refused."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import tiny_models
import torch
from torch import nn

from s3t_ext.lora.nn import adapt, adapted_layers
from s3t_ext.models.folder import base_files, load_model, model_hash
from s3t_ext.models.groups import stages_by_layer
from s3t_ext.models.tokens import tokenizer

FAMILIES = tiny_models.FAMILIES


@pytest.fixture
def copied(folder, tmp_path):
    """Give a copy of a family's folder that a test may change."""
    return lambda family, task="": shutil.copytree(folder(family, task), tmp_path / family)


def theirs(path, x: torch.Tensor, kind: str = "AutoModel") -> torch.Tensor:
    """Run the library's own model in its own attention: hidden states or logits."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(path, attn_implementation="eager").eval()
    if x.is_floating_point():
        return model(x).last_hidden_state
    out = model(x.clamp(min=0).long(), attention_mask=(x >= 0).long())
    return out.logits if kind == "AutoModelForCausalLM" else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unpads", [True, False], ids=["as it is", "padded"])
def test_features_are_those_of_the_library(family, unpads, folder) -> None:
    model = load_model(folder(family))
    model._unpads &= unpads
    assert model.features == 32
    assert not model.causal
    x = tiny_models.records(model, 9)
    hidden = theirs(folder(family), x)
    if family == "vit":
        want = hidden[:, 0]
    elif family in ("bert", "roberta"):
        want = torch.stack([h[: (row >= 0).sum()].mean(0) for h, row in zip(hidden, x, strict=True)])
    else:
        want = torch.stack([h[(row >= 0).sum() - 1] for h, row in zip(hidden, x, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_of_a_model_have_its_bits(family, folder) -> None:
    model = load_model(folder(family))
    x = tiny_models.records(model, 5, 16)
    whole = model(x)
    for block in range(tiny_models.DEPTH):
        assert torch.equal(model.above(model.below(x, block), x, block), whole)
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_groups_are_told_by_parsed_index(family, tmp_path) -> None:
    depth = {"n_layer": 12} if family == "gpt2" else {"num_hidden_layers": 12}
    if family in ("qwen2", "qwen3"):
        depth["layer_types"] = ["full_attention"] * 12
    model = load_model(tiny_models.save(family, tmp_path, **depth))
    names = [name for name in model.adaptable() if name.startswith(model.blocks)]
    stage_of = stages_by_layer(names, 12, model.blocks)
    assert sorted(set(stage_of.values())) == list(range(12))
    for name, stage in stage_of.items():
        assert f".{11 - stage}." in name
    assert len({sum(s == stage for s in stage_of.values()) for stage in range(12)}) == 1, "as many of each layer"
    adapt(model, names, stages=12, stage_of=stage_of)
    assert list(adapted_layers(model)) == names
    assert not any(isinstance(m, nn.Conv2d) or type(m).__name__ == "Conv1D" for m in model.modules())


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "ForSequenceClassification"), ("roberta", "ForSequenceClassification"), ("vit", "ForImageClassification"),
     ("llama", "ForSequenceClassification"), ("gpt2", "ForCausalLM")],
)  # fmt: skip
def test_the_head_of_a_folder_is_dropped(family, task, folder) -> None:
    path = folder(family, task)
    model = load_model(path, causal=False)
    assert model.output is None
    assert not any(part in name for name in model.state_dict() for part in ("classifier", "score", "lm_head", "pooler"))
    x = tiny_models.records(model, 3)
    assert model(x).shape == (3, 32)
    assert model_hash(model) == model_hash(load_model(path, causal=False)), "nothing in it is drawn anew"


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_causal_folder_gives_hidden_states_and_its_output_layer(family, folder) -> None:
    path = folder(family, "ForCausalLM")
    model = load_model(path)
    assert model.causal
    assert model.vocabulary == tiny_models.WORDS
    x = tiny_models.records(model, 4, 13)
    hidden = model(x)
    assert hidden.shape == (4, 13, 32)
    logits, own = model.output(hidden), x >= 0
    torch.testing.assert_close(logits[own], theirs(path, x, "AutoModelForCausalLM")[own], rtol=2e-5, atol=2e-5)
    assert "output" not in model.adaptable()
    embedding = model.backbone.get_input_embeddings().weight
    assert model.output.weight is not embedding, "untied"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_frequencies_of_positions_are_not_rounded(family, folder) -> None:
    model = load_model(folder(family, "ForCausalLM"))
    exact = model.backbone.rotary_emb.inv_freq.clone()
    nn.Sequential(model).to(torch.bfloat16)
    assert model.output.weight.dtype == next(model.backbone.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.backbone.rotary_emb.inv_freq, exact)
    assert model(tiny_models.records(model, 4)).dtype == torch.bfloat16


def test_a_name_is_looked_up_on_the_hub(folder, monkeypatch) -> None:
    asked = []
    hub = types.SimpleNamespace(snapshot_download=lambda name, **how: asked.append((name, how)) or str(folder("bert")))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert base_files("somebody/something") == base_files(folder("bert"))
    ((name, how),) = asked
    assert name == "somebody/something"
    assert "*.safetensors" in how["allow_patterns"]
    assert not any("bin" in pattern or "*.py" in pattern for pattern in how["allow_patterns"]), "nothing that runs"


def test_who_sees_all_is_no_causal_model(folder) -> None:
    with pytest.raises(ValueError, match="expected a decoder for a causal task, got 'bert'"):
        load_model(folder("bert"), causal=True)


def test_pooling_is_declared(copied) -> None:
    path = copied("bert")
    x = tiny_models.records(load_model(path), 4)
    mean, hidden = load_model(path)(x), theirs(path, x)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = load_model(path)(x)
    torch.testing.assert_close(first, hidden[:, 0], rtol=2e-5, atol=2e-5)
    (path / "model.json").write_text(json.dumps({"pooling": "mean"}))
    assert torch.equal(load_model(path)(x), mean), "model.json has the last word"
    (path / "model.json").write_text(json.dumps({"pooling": "max"}))
    with pytest.raises(ValueError, match=r"pooling: expected one of \('mean', 'cls', 'last'\), got 'max'"):
        load_model(path)


def test_another_family_is_declared(tmp_path) -> None:
    import transformers

    torch.manual_seed(0)
    settings = transformers.DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    transformers.DistilBertModel(settings).eval().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"one of the families \['bert', .*got 'distilbert'; .*blocks.*pooling.*sees"):
        load_model(tmp_path)
    declared = {"blocks": "layers.layer", "pooling": "mean", "sees": "all"}
    (tmp_path / "model.json").write_text(json.dumps(declared))
    with pytest.raises(ValueError, match=r"blocks: .*\['backbone.transformer.layer'\], got 'backbone.layers.layer'"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(declared | {"blocks": "transformer.layer"}))
    model = load_model(tmp_path)
    x = tiny_models.records(model, 4)
    want = torch.stack([h[: (row >= 0).sum()].mean(0) for h, row in zip(theirs(tmp_path, x), x, strict=True)])
    torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)
    whole = model(x)
    assert torch.equal(model.above(model.below(x, 1), x, 1), whole)


def test_what_a_model_may_not_do_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="intermediate size that is a multiple of 8, got 60"):
        load_model(tiny_models.save("bert", tmp_path / "bert", intermediate_size=60))
    with pytest.raises(ValueError, match="intermediate size that is a multiple of 64, got 96"):
        load_model(tiny_models.save("vit", tmp_path / "vit", intermediate_size=96))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="hang on no other text, got the rope type 'dynamic'"):
        load_model(tiny_models.save("llama", tmp_path / "llama", rope_parameters=rope))
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    path = tiny_models.save("qwen2", tmp_path / "qwen2", layer_types=kinds, sliding_window=8)
    with pytest.raises(ValueError, match="sliding window"):
        load_model(path)


def test_a_folder_that_lacks_something_says_what(copied, tmp_path, monkeypatch) -> None:
    path = copied("bert")
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    more = {"encoder.layer.1.attention.self.distance_embedding.weight": torch.zeros(3, 8)}
    save_file(weights | more, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights that transformers' model reads, got others .*distance_embedding"):
        load_model(path)
    config = json.loads((path / "config.json").read_text())
    for wrong, says in (
        ("{", "config.json: expected JSON, got Expecting"),
        ("[1]", r"config.json: expected a JSON object, got \[1\]"),
        (
            json.dumps(config | {"vocab_size": 99}),
            r"that fit its config.json, got .*word_emb.* \[97, 32\] for \[99, 32\]",
        ),
        (
            json.dumps(config | {"hidden_size": "a"}),
            "that transformers loads, got .* of which it says: .*'hidden_size'",
        ),
    ):
        (path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match=says):
            load_model(path)
    (path / "config.json").write_text(json.dumps(config))
    gone = next(k for k in weights if "query.weight" in k)
    save_file({k: v for k, v in weights.items() if k != gone}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected all weights .*query.weight"):
        load_model(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights as \*.safetensors .*save_pretrained"):
        base_files(path)
    with pytest.raises(ValueError, match="model: expected"):
        load_model(path)
    with pytest.raises(ValueError, match="model: expected a folder with a model"):
        load_model(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="no such folder, and the hub says"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("call", [load_model, tokenizer])
def test_without_transformers_an_error_says_what_to_install(call, copied, monkeypatch) -> None:
    path = copied("bert")
    (path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="install it: pip install"):
        call(path)


def test_an_older_transformers_is_refused(folder, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"transformers 5 or newer, got 4\.57\.1"):
        load_model(folder("bert"))


def words(path) -> None:
    """Write a tokenizer of whole words beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(("[UNK]", "[PAD]", "[CLS]", "[SEP]", "a", "good", "bad", "film"))}
    made = Tokenizer(models.WordLevel(ids, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(path / "tokenizer.json"))


def test_texts_become_ids_by_the_folders_own_tokenizer(copied) -> None:
    path = copied("bert")
    with pytest.raises(ValueError, match=r"tokenizer: expected tokenizer.json .*save_pretrained"):
        tokenizer(path)
    before = model_hash(load_model(path))
    words(path)
    assert "tokenizer.json" in base_files(path)
    assert model_hash(load_model(path)) != before, "another tokenizer makes another model of the same weights"
    found = tokenizer(path)
    texts = ["a good film", "", "a bad bad bad film of it"]
    assert found.encode(texts, 6) == [[2, 4, 5, 7, 3], [2, 3], [2, 4, 6, 6, 6, 3]]
    assert found.encode(texts[:1], 6, special=False) == [[4, 5, 7]]
    assert found.encode([], 6) == []
    assert found.decode([4, 5, 7, -1, -1]) == "a good film"
    assert found.vocabulary >= 8
    assert found.end is None
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: expected one that transformers reads"):
        tokenizer(path)
