"""A plain module of the user's own, with a description."""

from __future__ import annotations

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save
from torch import nn

import s3t_ext
from s3t_ext.lora.nn import adapted_layers
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.models.mlp import MLP
from s3t_ext.models.trial import TOLERANCE, apart, probe
from s3t_ext.store.files import StoreError
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.network import adapt_base
from s3t_ext.system.verify import compare


class Residual(nn.Module):
    def __init__(self, width: int, inside: bool, act: str) -> None:
        super().__init__()
        self.fc, self.inside, self.act = nn.Linear(width, width), inside, getattr(torch.nn.functional, act)

    def forward(self, x):
        return self.act(self.fc(x)) + (x if self.inside else 0)


class Towers(nn.Module):
    """A list of lists: the blocks that count are those of one of them."""

    def __init__(self, width: int, depth: int, inside: bool = True, act: str = "relu") -> None:
        super().__init__()
        self.inside = inside
        self.towers = nn.ModuleList(
            [nn.ModuleList([Residual(width, inside, act) for _ in range(depth)]) for _ in range(2)]
        )

    def forward(self, x):
        for tower in self.towers:
            for block in tower:
                x = block(x) if self.inside else x + block(x)
        return x


SPEC = {
    "architecture": "test_described:Towers",
    "arguments": {"width": 8, "depth": 3},
    "shape": [8],
    "features": 8,
    "blocks": "towers.1",
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_file(Towers(8, 3).state_dict(), tmp_path / "weights.safetensors")

    def describe(*gone: str, **more):
        spec = {k: v for k, v in (SPEC | more).items() if k not in gone}
        (tmp_path / "model.json").write_text(json.dumps(spec))
        return tmp_path

    return describe


def test_a_module_with_a_description_is_a_base_model(folder) -> None:
    model = load_model(folder())
    assert (model.shape, model.features, model.blocks, model.vocabulary) == ((8,), 8, "module.towers.1", 0)
    x = torch.randn(5, 8)
    whole = model(x)
    for block in range(3):
        assert torch.equal(model.above(model.below(x, block), x, block), whole)
    assert model_hash(model) == model_hash(load_model(folder()))
    assert model_hash(model) != model_hash(load_model(folder(arguments={"depth": 3, "width": 8}))), "it was declared"
    adapt_base(model, Config(shards=1, slices=3, strategy="sisa", placement="layers"), 1)
    stages = {name: list(layer.stages) for name, layer in adapted_layers(model).items()}
    assert stages == {f"module.towers.1.{k}.fc": [2 - k] for k in range(3)}, "the other tower's numbers are none of it"


def test_a_description_that_lacks_something_says_what(folder) -> None:
    for gone in ("features", "blocks"):
        with pytest.raises(ValueError, match=f"model.json: expected '{gone}'"):
            load_model(folder(gone))
    for wrong, says in (
        ({"features": "eight"}, "model.json: features: expected a whole number of at least 1, got 'eight'"),
        ({"features": 8.5}, "model.json: features: expected a whole number of at least 1, got 8.5"),
        ({"shape": 8}, "model.json: shape: expected a list of whole numbers of at least 1, got 8"),
        ({"shape": [-8]}, r"model.json: shape: expected a list of whole numbers of at least 1, got \[-8\]"),
        (
            {"shape": [8, 1, 3]},
            r"shape: expected inputs that the module takes, got \(33, 8, 1, 3\) torch.float32, on wh",
        ),
        ({"arguments": [1]}, r"model.json: arguments: expected an object, got \[1\]"),
        ({"arguments": {"hue": 1}}, "model.json: arguments: test_described:Towers does not take .*'hue'"),
        ({"architecture": 3}, "model.json: architecture: expected a text, got 3"),
        ({"blocks": ["towers"]}, "model.json: blocks: expected a text"),
        ({"colour": "red"}, "model.json: expected keys of .*'features'.* got 'colour'"),
        ({"architecture": "lstm"}, r"model.json: model: expected one of \['mlp', 'vit'\]"),
        (
            {"architecture": "vit", "arguments": {"shape": [6]}},
            "model.json: .*shape: expected .channels, height, width",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            load_model(folder(**wrong))
    for text, says in (
        ("{", "model.json: expected JSON, got Expecting"),
        ("[1]", "model.json: expected a JSON object"),
    ):
        at = folder()
        (at / "model.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            load_model(at)
    with pytest.raises(ValueError, match=r"'shape' .* or 'vocabulary'"):
        load_model(folder("shape"))
    with pytest.raises(ValueError, match=r"blocks: expected .*'module.towers.1'.* got 'module.tower'"):
        load_model(folder(blocks="tower"))
    with pytest.raises(ValueError, match=r"importable 'package.module:factory'"):
        load_model(folder(architecture="no.such:thing"))
    with pytest.raises(ValueError, match=r"importable 'package.module:factory'"):
        load_model(folder(architecture="test_described:Spires"))
    with pytest.raises(ValueError, match=r"features of shape \(33, 9\) from the module, got \(33, 8\)"):
        load_model(folder(features=9))
    with pytest.raises(ValueError, match=r"blocks: expected blocks that run one after the other.*before block 1"):
        load_model(folder(arguments={"width": 8, "depth": 3, "inside": False}))
    with pytest.raises(ValueError, match="the same bits alone and in a batch, got others"):
        load_model(folder(arguments={"width": 8, "depth": 3, "act": "silu"}))
    unfit = r"weights.safetensors: .* in model.json, got towers.0.0.fc.weight of shape \[8, 8\] for \[16, 16\]"
    with pytest.raises(ValueError, match=unfit + ".* and 9 more"):
        load_model(folder(arguments={"width": 16, "depth": 3}))
    with pytest.raises(ValueError, match=r"weights.safetensors: .* got none for towers.0.3.fc.weight; none for"):
        load_model(folder(arguments={"width": 8, "depth": 4}))
    with pytest.raises(ValueError, match=r"weights.safetensors: .* got towers.0.2.fc.bias, which the model lacks"):
        load_model(folder(arguments={"width": 8, "depth": 2}))
    with pytest.raises(ValueError, match="expected a decoder"):
        load_model(folder(), causal=True)
    (folder() / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights.safetensors: expected weights as safetensors' save_file writes"):
        load_model(folder())
    (folder() / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights.safetensors: expected weights as safetensors' save_file writes"):
        load_model(folder())


def test_a_store_refuses_other_code_over_its_weights(folder, tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    table = Table([(f"person {i}",) for i in range(30)], rng.normal(size=(30, 8)).astype("f"), rng.integers(0, 2, 30))
    schema, base, store = Schema(classes=("red", "blue"), shape=(8,)), folder(), tmp_path / "store"
    plan = Config(shards=1, slices=2, steps=1, batch=2, rank=1)

    def go_on() -> dict:
        return s3t_ext.fit(store, table, schema, base, plan, progress=False)

    assert go_on()["trained"] == 3
    s3t_ext.Service(store).close()
    s3t_ext.delete(store, ["person 3"])
    code = importlib.import_module("test_described").Residual  # as the factory's module was
    with monkeypatch.context() as changed:
        changed.setattr(code, "forward", lambda self, x: x + self.act(self.fc(x)) * 1.01)
        for work in (
            lambda: s3t_ext.Service(store),
            lambda: s3t_ext.heal(store, progress=False),
            go_on,
            lambda: compare(str(store), [table], "all", 0, False, str(tmp_path / "fresh")),
        ):
            with pytest.raises(
                StoreError, match=r"code gives other features than it did when the store was made, .*e-0"
            ):
                work()
    assert s3t_ext.heal(store, progress=False)["nodes"] == 2, "nothing was lost"
    assert compare(str(store), [table], "all", 0, False, str(tmp_path / "again"))["mismatched"] == 0


def test_a_probe_tells_code_from_rounding() -> None:
    torch.manual_seed(0)
    model = MLP(shape=[6], width=64, depth=3)
    before = probe(model)
    assert probe(model) == before
    turned, weights = copy.deepcopy(model), dict(model.state_dict())
    for name in weights:  # the hidden units in another order: the same function, whose sums round otherwise
        if ".fc1." in name or name.endswith(".fc2.weight"):
            weights[name] = weights[name].flip(1 if ".fc2." in name else 0)
    turned.load_state_dict(weights)
    assert 0 < apart(before, probe(turned)) < TOLERANCE / 10
    other = copy.deepcopy(model)
    other.layers[2].fc1.register_forward_hook(lambda _, args, given: given * 1.01)
    assert apart(before, probe(other)) > TOLERANCE
    model.layers[0].register_forward_hook(lambda _, args, given: given * torch.nan)
    with pytest.raises(ValueError, match="expected finite features"):
        probe(model)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_a_probe_sees_every_block_of_every_family(family, tmp_path) -> None:
    pytest.importorskip("transformers")
    save(family, tmp_path, "ForCausalLM" if family in ("llama", "gpt2") else "")
    model = load_model(tmp_path)
    before = probe(model)
    for block in model.block_list():
        hook = block.register_forward_hook(lambda _, args, given: args[0] + (given - args[0]) * 1.05)
        assert apart(before, probe(model)) > TOLERANCE
        hook.remove()
    assert probe(model) == before
