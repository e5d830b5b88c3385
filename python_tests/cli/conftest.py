from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny as tiny_system

SETTINGS = ["--shards", "2", "--slices", "3", "--steps", "3", "--batch", "4", "--rank", "2"]


@pytest.fixture(autouse=True)
def fresh_processes(warm_processes) -> None:
    """What verifies and audits is forked; test_readme and system/ start it as a user does."""


@pytest.fixture
def files(tmp_path) -> Path:
    """Give a folder with table.jsonl, schema.json, key and a base model."""
    tiny = tiny_system.make(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps({"classes": ["red", "green", "blue"], "shape": [6]}))
    (tmp_path / "key").write_text("ab" * 32)
    with (tmp_path / "table.jsonl").open("w") as out:
        for names, x, y in zip(tiny.table.subjects, tiny.table.inputs, tiny.table.labels):
            row = {"subject": names[0], "input": x.tolist(), "label": tiny.schema.classes[y]}
            out.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def fit_words(files) -> list[str]:
    return [
        "fit",
        str(files / "store"),
        str(files / "table.jsonl"),
        "--schema",
        str(files / "schema.json"),
        "--model",
        str(files / "base"),
        "--key",
        str(files / "key"),
        *SETTINGS,
    ]
