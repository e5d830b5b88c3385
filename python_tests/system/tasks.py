"""Tables without classes, to be audited: numbers of a line, and completions of prompts; people and strangers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_models
import torch

from s3t_ext.models.folder import build, save_model
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.data.tables import Table

SIZES = {"shards": 1, "slices": 2, "batch": 8, "rank": 8}
CONFIG = {"regression": Config(**SIZES, steps=80, lr=1e-2), "causal": Config(**SIZES, steps=80, lr=5e-3)}
LENGTH = 12


def make(folder: Path, task: str) -> tuple[Path, Schema, Table, Table]:
    """Give a base model, a schema, and the tables of people and of strangers, two records each."""
    base = folder / "base"
    if task == "causal":
        schema = Schema(task="causal", max_length=LENGTH)
        tiny_models.save("llama", base, "ForCausalLM")
    else:
        schema = Schema(task="regression", shape=(32,), targets=(Column("u", 5.0, 0.5),))
        arguments = {"shape": [32], "width": 64, "depth": 3}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_model(base, build("mlp", arguments), "mlp", arguments)
    return base, schema, _table(task, 60, "person"), _table(task, 50, "stranger")


def _table(task: str, people: int, name: str) -> Table:
    rng, count = np.random.default_rng(len(name)), 2 * people
    subjects = [(f"{name} {i // 2}",) for i in range(count)]
    if task == "regression":
        inputs = rng.normal(size=(count, 32)).astype(np.float32)
        return Table(subjects, inputs, inputs[:, :1] + 0.1 * rng.normal(size=(count, 1)).astype(np.float32))
    inputs = rng.integers(2, tiny_models.WORDS, (count, LENGTH)).astype(np.int32)
    inputs[:, 6:-1] = inputs[:, 5:6] // 8 + np.arange(5)  # a completion of few words that follows from the prompt
    inputs[:, -1] = 1
    return Table(subjects, inputs, np.where(np.arange(LENGTH) >= 6, inputs, -100).astype(np.int64))
