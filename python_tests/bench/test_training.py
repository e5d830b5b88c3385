"""The benchmark of training: its rows and its sums, on tiny data."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import training
from bench.datasets import Data, Training
from bench.training_baselines import WARM, Stages
from s3t_ext import Config, Schema
from s3t_ext.models.folder import build, save_model
from s3t_ext.plan import build as build_tree
from s3t_ext.system.data.tables import Table

CONFIG = Config(shards=2, slices=2, strategy="rotation", budget=2, placement="layers", steps=9, batch=4, rank=2)


@pytest.fixture
def data(tmp_path) -> Data:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 1, 8, 8)).astype(np.float32)
    table = Table([(f"person {i}",) for i in range(60)], inputs, rng.integers(0, 2, 60))
    arguments = {"shape": [1, 8, 8], "width": 16, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    save_model(tmp_path / "base", build("vit", arguments), "vit", arguments)
    schema = Schema(classes=("a", "b"), shape=(1, 8, 8))
    configs = {"layers": CONFIG, "stack": replace(CONFIG, placement="stack")}
    return Data(
        "tiny",
        None,
        table,
        table,
        schema,
        None,
        tmp_path / "base",
        configs,
        None,
        Training(1, 1e-3),
        {},
        evaluation=0.0,
    )


@pytest.mark.parametrize("placement", ["layers", "stack"])
def test_every_provider_is_timed_at_every_depth(data, tmp_path, placement) -> None:
    names = [*training.ours(2)]
    if placement == "layers":
        pytest.importorskip("peft")
        names += ["trainer-tuned"]
    wanted = argparse.Namespace(threads=2, steps=2, rounds=1, nodes=4)
    rows = list(training.measure(data, tmp_path / "base", data.configs[placement], names, wanted, tmp_path))
    times = {(r["provider"], r["depth"], r["metric"]): float(r["p50"]) for r in rows}
    assert len(rows) == len(times) == len(names) * 2 * 4
    assert all(times[name, depth, "step"] > 0 for name in names for depth in (1, 2))
    assert (times["s3t", 1, "record"] > 0) == (placement == "layers"), "a trunk below the highest group alone"
    assert times["s3t-kernels", 1, "record"] == times["s3t", 2, "record"] == 0
    told = training.summary(rows, data.configs[placement], 60)
    assert told.count("rotation") == 2 * len(names)


def test_timed_batches_of_the_tuned_trainer_are_a_fair_sample() -> None:
    pytest.importorskip("transformers")
    lengths = np.random.default_rng(0).integers(3, 60, 400)
    stages = Stages.__new__(Stages)
    stages.config, stages.rows = replace(CONFIG, batch=16), [{"input_ids": [0] * n} for n in lengths]
    drawn = [lengths[stages._order(8, seed)[WARM * 16 :]].reshape(8, 16) for seed in range(16)]
    assert abs(np.mean(drawn) / lengths.mean() - 1) < 0.03, "not the longest ones"
    assert np.median(np.ptp(drawn, axis=2)) < 12, "each of nearly one length"


def test_a_plan_is_the_sum_of_its_stages() -> None:
    at = {"data": "x", "placement": "layers", "provider": "s3t"}
    rows = [
        {**at, "depth": depth, "metric": metric, "p50": str(ms)}
        for depth, step in ((1, 10), (2, 30))
        for metric, ms in (("step", step), ("record", 2 if depth == 1 else 0))
    ]
    found = training.totals(rows, CONFIG, 100, "", by_depth=False)
    counts = build_tree("subsets", 2).stages_by_depth
    seconds = 2 * 9 * sum(n * (0.01, 0.03)[depth - 1] for depth, n in counts.items()) + 100 * 0.002
    assert found["s3t", "subsets"] == pytest.approx(seconds)
    deep = training.totals(rows, CONFIG, 100, "", by_depth=True)["s3t", "subsets"]
    assert deep == pytest.approx(seconds - 2 * 9 * counts[1] * 0.01 / 2), "half the steps at half the depth"
