"""Stores of any task over tiny models, random numbers in their nodes: what they answer matters, not what it means."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import tiny_models
import torch

from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.store.files import exclusive
from s3t_ext.system.config import Config
from s3t_ext.system.creation import admit, creating
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.network import declare_head, load_network

KEY = Key(bytes(range(32)))
LENGTH = 24
SCHEMAS = {
    "classification": Schema(classes=("red", "green", "blue"), max_length=LENGTH),
    "regression": Schema(task="regression", targets=(Column("u", 5.0, 0.5), Column("v", -1.0, 2.0)), max_length=LENGTH),
    "causal": Schema(task="causal", max_length=LENGTH),
    "image": Schema(classes=("red", "green", "blue"), shape=(1, 12, 12)),
}


def texts(count: int, seed: int = 0, longest: int = LENGTH) -> np.ndarray:
    """Draw texts (n, longest) of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    x = rng.integers(2, tiny_models.WORDS, (count, longest)).astype(np.int32)
    lengths = np.concatenate([[1, longest, 8], rng.integers(1, longest + 1, count)])[:count]
    return np.where(np.arange(longest) < lengths[:, None], x, -1).astype(np.int32)


def base(folder: Path, family: str, task: str) -> Path:
    """Write a tiny random model."""
    return tiny_models.save(family, folder, "ForCausalLM" if task == "causal" else "")


def store(path: Path, family: str, task: str, people: int = 18, **config) -> Path:
    """Make a store with random nodes; weights large enough to matter."""
    schema, model = SCHEMAS[task], base(path.parent / f"{path.name} base", family, task)
    settings = Config(**{"shards": 2, "slices": 3, "rank": 2, "scale": 1.0, **config})
    rng = np.random.default_rng(1)
    inputs = texts(people) if schema.is_text else rng.normal(size=(people, *schema.shape)).astype(np.float32)
    labels = {
        "regression": rng.normal(size=(people, 2)).astype(np.float32),
        "causal": np.full((people, LENGTH), -100),
    }.get(task, rng.integers(0, 3, people))
    table = Table([(f"person {i}",) for i in range(people)], inputs, labels)
    loaded = load_model(model)
    head = declare_head(KEY, schema, settings, loaded)
    layout = lay_out(table, KEY, settings.shards, settings.slices)
    with creating(path, schema, settings, KEY, model, model_hash(loaded), head) as folder:
        admit(folder, layout, {})
    with StoreFolder(path) as folder, exclusive(path):
        train(folder)
    return path


def train(folder: StoreFolder, seed: int = 0) -> int:
    """Put random weights where live nodes are missing; return how many."""
    network, slices = load_network(folder, 1), folder.ledger.slices()
    ids, done = folder.identities(slices), 0
    for (shard, path), name in ids.items():
        if folder.nodes.has(name):
            continue
        torch.manual_seed(zlib.crc32(f"{shard} {path} {seed}".encode()))
        weights = {}
        for key, layer in network.layers.items():
            if len(path) - 1 in layer.stages:
                weights[f"{key}.a"] = (torch.randn(layer.rank, layer.in_features) * 0.3).numpy()
                weights[f"{key}.b"] = (torch.randn(layer.rank, layer.out_features) * 0.3).numpy()
        if network.kind == "trained":
            weights["head.weight"] = torch.randn(network.head.outputs, network.head.features).numpy()
            weights["head.bias"] = torch.randn(network.head.outputs).numpy()
        folder.nodes.put(folder.identity(shard, path, slices, ids.get((shard, path[:-1]), "")), weights, {})
        done += 1
    return done


def people_by_cell(path: Path, people: int = 18) -> dict[tuple[int, int], list[str]]:
    with StoreFolder(path) as folder:
        return {c: sorted(n[0] for n in folder.records.get(*c).subjects) for c in folder.ledger.slices()}
