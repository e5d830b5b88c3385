"""The serving benchmark, on models and stores of a second: what it checks before it times, and the rows it writes."""

from __future__ import annotations

import csv

import pytest
import tiny_models
import torch

from bench import deletion, serving


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(deletion, "SHARDS", 2)
    monkeypatch.setattr(deletion, "SLICES", 2)
    monkeypatch.setattr(deletion, "PEOPLE", 30)
    model = tiny_models.save("bert", tmp_path / "model", vocab_size=5000)
    words = ("--rows", "2", "--tokens", "8", "--seconds", "0.02", "--stores", "1", "--dtype", "float32")
    status = serving.main(["--model", str(model), "--shards", "2", *words, "--out", str(tmp_path)])
    with (tmp_path / "serving.csv").open() as lines:
        found = list(csv.DictReader(lines))
    missed = any(row["provider"] == "together" and float(row["over_floor"]) > serving.GOAL for row in found)
    assert status == missed
    return found


def test_rows_of_passes_and_of_deletions(rows) -> None:
    passes = [row for row in rows if row["case"] == "pass"]
    assert {row["provider"] for row in passes} == {"plain", "together", "one by one", "peft"}
    assert {(row["depth"], row["floor"]) for row in passes} == {("1", "1.333"), ("2", "1.667"), ("3", "2.0")}
    others = [(row["case"], row["metric"], row["repeats"]) for row in rows if row["case"] != "pass"]
    metrics = ("effect", "acknowledgement", "ideal")
    assert others == [(f"deletion, memory {m}", name, "3") for m in ("least", "half", "all") for name in metrics]
    assert all(float(row["p50"]) > 0 for row in rows)


def test_answers_that_differ_are_not_timed(tmp_path, monkeypatch) -> None:
    bench = serving.Bench(tiny_models.save("bert", tmp_path / "model", vocab_size=5000), 2, 3, torch.float32)
    right = serving.outputs
    monkeypatch.setattr(serving, "outputs", lambda *args: right(*args) + 1e-3)
    with pytest.raises(RuntimeError, match="depth 1: together is not, bit for bit, one by one"):
        next(serving.costs(bench, tmp_path, 2, 8, 0.01))
    monkeypatch.setattr(serving, "outputs", right)
    peft = bench.peft
    monkeypatch.setattr(bench, "peft", lambda *args: lambda x: peft(*args)(x) * 1.01)
    with pytest.raises(RuntimeError, match="depth 1: PEFT answers otherwise"):
        next(serving.costs(bench, tmp_path / "again", 2, 8, 0.01))
