"""Groups by parsed index, heads, batches, model folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s3t_ext.models.batches import batch_order
from s3t_ext.models.folder import ARCHITECTURES, build, load_model, model_hash, save_model
from s3t_ext.models.groups import layer_index, stages_by_layer
from s3t_ext.models.heads import orthonormal
from s3t_ext.models.pretrain import pretrain


def test_layer_index_is_parsed() -> None:
    assert layer_index("encoder.layer.11.attention.query") == 11
    assert layer_index("encoder.layer.1.fc1") == 1
    assert layer_index("embed") is None
    assert layer_index("layer1.fc2") is None, "a digit inside a word is no index"
    assert layer_index("towers.1.layer.11.fc1", "towers.1.layer") == 11
    assert layer_index("towers.1.layer.1.fc1", "towers.1.layer") == 1
    assert layer_index("towers.1.layers.3.fc1", "towers.1.layer") is None
    assert layer_index("towers.1.embed", "towers.1.layer") is None, "outside of the list, whatever number it holds"


def test_stage_0_is_nearest_the_output() -> None:
    names = [f"layer.{i}.{part}" for i in range(12) for part in ("q", "fc1")]
    stage = stages_by_layer(names, 5)
    by_layer = [stage[f"layer.{i}.q"] for i in range(12)]
    assert by_layer == [4, 4, 3, 3, 2, 2, 1, 1, 1, 0, 0, 0]
    assert all(stage[f"layer.{i}.q"] == stage[f"layer.{i}.fc1"] for i in range(12))
    with pytest.raises(ValueError, match="layer index"):
        stages_by_layer(["embed"], 1)
    with pytest.raises(ValueError, match="at least as many layers"):
        stages_by_layer(["layer.0"], 2)


def test_head_is_orthonormal_and_fixed_by_its_key() -> None:
    head = orthonormal(bytes(32), 5, 64)
    torch.testing.assert_close(head @ head.t(), torch.eye(5))
    assert torch.equal(head, orthonormal(bytes(32), 5, 64))
    assert not torch.equal(head, orthonormal(bytes([1] * 32), 5, 64))
    with pytest.raises(ValueError, match="classes"):
        orthonormal(bytes(32), 65, 64)


def test_batches_are_epochs_in_an_order_of_their_own() -> None:
    records = [bytes([i]) * 32 for i in range(7)]
    order = batch_order(b"k" * 32, records, 30)
    assert len(order) == 30
    for epoch in range(4):
        assert sorted(order[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert list(order[:7]) != list(order[7:14])
    less = batch_order(b"k" * 32, records[1:], 6)
    assert [i + 1 for i in less] == [i for i in order[:7] if i != 0], "the order of two never depends on a third"
    assert len(batch_order(b"k" * 32, [], 30)) == 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_model_folder_gives_back_the_model(tmp_path, architecture) -> None:
    model = build(architecture, {})
    save_model(tmp_path / "base", model, architecture, {})
    again = load_model(tmp_path / "base")
    assert model_hash(model) == model_hash(again)
    assert not any(p.requires_grad for p in again.parameters())
    x = torch.randn(3, *model.shape)
    assert torch.equal(model(x), again(x))
    assert again(x).shape == (3, again.features)
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-3
    assert model_hash(model) != model_hash(again)


def test_bad_folders_and_models_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="model: expected a folder"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="expected one of"):
        build("gpt", {})
    with pytest.raises(ValueError, match="arguments"):
        build("mlp", {"colour": 1})
    with pytest.raises(ValueError, match="patch"):
        build("vit", {"patch": 3})
    with pytest.raises(ValueError, match="heads"):
        build("vit", {"heads": 5})
    save_model(tmp_path / "base", build("mlp", {}), "mlp", {"width": 32})
    with pytest.raises(ValueError, match=r"weights.safetensors: expected the weights of .*embed.weight of shape"):
        load_model(tmp_path / "base")


def test_pretraining_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    inputs = (np.eye(3)[labels] + 0.1 * rng.normal(size=(120, 3))).astype(np.float32)
    torch.manual_seed(0)
    model = build("mlp", {"shape": [3], "width": 16, "depth": 2})
    assert pretrain(model, inputs, labels, 3, epochs=20) > 0.95
