"""Configurations: what is taken where nothing is said, what is refused, and what a node's identity holds of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from s3t_ext.store.files import canonical_json
from s3t_ext.system.config import Config


def test_the_usual_strategy_is_affordable() -> None:
    assert (Config().strategy, Config(slices=6).strategy) == ("subsets", "subsets")
    assert (Config(slices=7).strategy, Config(budget=3).strategy) == ("rotation", "rotation")
    assert len(Config(slices=8).tree().sequences) == 8
    assert Config.from_dict({"slices": 8, "strategy": "subsets"}).strategy == "subsets"


@pytest.mark.parametrize(
    "config", [Config(), Config(slices=3, steps=(6, 3, 2), targets=("q", "v"), precision="bfloat16", head="trained")]
)
def test_a_configuration_survives_its_json(config) -> None:
    again = Config.from_dict(json.loads(canonical_json(dataclasses.asdict(config))))
    assert again == config
    assert canonical_json(again.identity()) == canonical_json(config.identity())


def test_an_identity_holds_what_shapes_weights_and_nothing_else() -> None:
    plain = Config()
    for change in ({"combine": "vote"}, {"ensemble": "maximal"}, {"strategy": "rotation", "budget": 3}):
        assert dataclasses.replace(plain, **change).identity() == plain.identity()
    shapes = {
        "shards": 6, "slices": 5, "placement": "layers", "targets": "q", "rank": 4, "scale": 1.0, "lr": 1e-3,
        "weight_decay": 0.1, "dropout": 0.1, "steps": 3, "batch": 8, "accumulate": 2, "clip": 1.0, "head": "trained",
        "precision": "bfloat16",
    }  # fmt: skip
    for name, value in shapes.items():
        assert dataclasses.replace(plain, **{name: value}).identity() != plain.identity(), name
    said = {field.name for field in dataclasses.fields(Config)}
    assert said - shapes.keys() == {"combine", "ensemble", "strategy", "budget"}, (
        "a new field belongs to one of the two"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 0}, {"rank": 1.5}, {"steps": 0}, {"steps": (1, 2)}, {"accumulate": 3}, {"lr": 0}, {"clip": -1.0},
        {"clip": float("nan")}, {"dropout": 1.0}, {"placement": "rows"}, {"combine": "median"}, {"ensemble": "all"},
        {"head": "linear"}, {"precision": "float16"}, {"weight_decay": -0.1}, {"strategy": "best"}, {"colour": 1},
    ],
)  # fmt: skip
def test_bad_configurations_are_refused_by_name(change) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        Config.from_dict(change)
