"""A system small enough to audit in a CI job: three classes of points in 32 dimensions, 2 shards of 3 slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from s3t_ext.models.folder import build, save_model
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.fit import fit

SCHEMA = Schema(classes=("red", "green", "blue"), shape=(32,))
CONFIG = Config(shards=2, slices=3, steps=60, batch=8, rank=8)


def table(people: int, name: str, seed: int) -> Table:
    """Give two records a person."""
    rng = np.random.default_rng([seed, len(name)])
    labels = rng.integers(0, 3, 2 * people)
    centres = np.random.default_rng(0).normal(size=(3, 32)) / 2
    inputs = (centres[labels] + rng.normal(size=(2 * people, 32))).astype(np.float32)
    return Table([(f"{name} {i // 2}",) for i in range(2 * people)], inputs, labels)


def store(folder: Path, records: Table, seed: int = 0) -> Path:
    arguments = {"shape": [32], "width": 64, "depth": 3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_model(folder / "base", build("mlp", arguments), "mlp", arguments)
    fit(folder / "store", records, SCHEMA, folder / "base", CONFIG, key=bytes([seed]) * 32, progress=False)
    return folder / "store"
