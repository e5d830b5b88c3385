"""A plain module of the user's own, with a description."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s3t_ext.lora.nn import adapted_layers
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.system.config import Config
from s3t_ext.system.network import adapt_base


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
