"""Schemas: what is taken, what is refused, and that they survive their way through a store's JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from s3t_ext.store.files import canonical_json
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.folder import schema_dict

SCHEMAS = {
    "images": {"classes": ["a", 1], "shape": [3, 8, 8], "numbers": "uint8", "scale": 0.5, "blank": 3},
    "columns": {
        "task": "regression",
        "shape": [4],
        "input": ["a", {"column": "b", "offset": 1, "scale": 2, "blank": 0}, {"column": "c", "values": ["x", "y"]}],
        "targets": ["u", {"column": "v", "offset": -1.5, "scale": 0.1}],
    },
    "texts": {"classes": ["a", "b"], "max_length": 32, "subject": "who", "input": "sentence", "normalise": "exact"},
    "rated texts": {"task": "regression", "targets": ["stars"], "max_length": 32},
    "prompts": {"task": "causal", "max_length": 8, "input": "question", "label": "answer"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_survives_its_json(tmp_path, name) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMAS[name]))
    schema = Schema.load(tmp_path / "schema.json")
    again = Schema.from_dict(json.loads(canonical_json(schema_dict(schema))))
    assert again == schema
    assert canonical_json(schema_dict(again)) == canonical_json(schema_dict(schema))
    assert schema.is_text == ("max_length" in SCHEMAS[name])
    assert schema.outputs == {"images": 2, "columns": 2, "texts": 2, "rated texts": 1, "prompts": 0}[name]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task": "ranking", "shape": [2]}, "schema.task"),
        ({"shape": [2]}, "schema.classes: expected at least two"),
        ({"classes": ["a", "a"], "shape": [2]}, "schema.classes: expected at least two distinct"),
        ({"classes": ["a", "b"]}, "schema.shape"),
        ({"classes": ["a", "b"], "shape": [2.0]}, "schema.shape"),
        ({"classes": ["a", "b"], "shape": [2], "max_length": 8}, "schema.max_length: expected 0 with shape"),
        ({"classes": ["a", "b"], "max_length": 1}, "schema.max_length: expected at least 2"),
        ({"classes": ["a", "b"], "max_length": True}, "schema.max_length"),
        ({"classes": ["a", "b"], "max_length": 8, "input": "x*"}, "schema.max_length"),
        ({"classes": ["a", "b"], "max_length": 8, "blank": 0}, "schema.max_length"),
        ({"task": "regression", "shape": [2]}, "schema.targets: expected at least one"),
        (
            {"task": "regression", "shape": [2], "classes": ["a", "b"], "targets": ["y"]},
            "schema.classes: expected none",
        ),
        ({"task": "regression", "shape": [2], "targets": ["y", "y"]}, "distinct columns"),
        ({"task": "regression", "shape": [2], "targets": [{"column": "y", "scale": 0}]}, "column 'y': scale"),
        ({"task": "regression", "shape": [2], "targets": [{"column": "y", "offset": "1"}]}, "column 'y': offset"),
        ({"task": "regression", "shape": [2], "targets": [{"column": "y", "values": ["a", "b"]}]}, "schema.targets"),
        ({"task": "regression", "shape": [2], "targets": [{"column": "y", "blank": 1}]}, "schema.targets"),
        ({"task": "regression", "shape": [2], "targets": [{"name": "y"}]}, "keys among"),
        ({"task": "regression", "shape": [2], "targets": "y"}, "schema.targets: expected a list"),
        ({"task": "causal", "shape": [2]}, "schema.max_length: expected tokens for the task 'causal'"),
        ({"task": "causal", "max_length": 8, "classes": ["a", "b"]}, "schema.classes: expected none"),
        ({"classes": ["a", "b"], "max_length": 8, "targets": ["y"]}, "schema.targets: expected none"),
        ({"classes": ["a", "b"], "shape": [3], "input": ["x", "y"]}, "schema.shape: expected 2 numbers"),
        ({"classes": ["a", "b"], "shape": [1], "input": ["label"]}, "distinct columns"),
        ({"classes": ["a", "b"], "shape": [2], "input": [{"column": "x", "values": ["p", "p"]}]}, "distinct words"),
        (
            {"classes": ["a", "b"], "shape": [2], "input": [{"column": "x", "values": ["p", "q"], "scale": 2}]},
            "not offset, scale or blank with words",
        ),
        ({"classes": ["a", "b"], "shape": [2], "numbers": "float16"}, "schema.numbers"),
        ({"classes": ["a", "b"], "shape": [2], "numbers": "uint8", "blank": 0.5}, "schema.blank"),
        ({"classes": ["a", "b"], "shape": [2], "blank": float("nan")}, "schema.blank"),
        ({"classes": ["a", "b"], "shape": [2], "scale": float("inf")}, "schema.scale"),
    ],
)
def test_bad_schemas_are_refused(values, says) -> None:
    with pytest.raises(ValueError, match=says):
        Schema.from_dict(json.loads(json.dumps(values)))


def test_outputs_come_back_in_the_columns_own_units() -> None:
    schema = Schema(task="regression", shape=(1,), targets=(Column("u", 200.0, 0.25), Column("v")))
    assert schema.values(np.array([[1.0, 2.0], [-2.0, 0.0]], np.float32)).tolist() == [[204.0, 2.0], [192.0, 0.0]]


def test_a_schema_is_declared_without_numpy() -> None:
    """Every command reads this module before it parses its words."""
    script = "import sys, s3t_ext.system.data.schema; assert not {'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
