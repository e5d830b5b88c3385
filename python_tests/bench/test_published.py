"""Published claims beside ours: every method has one, comparisons can say no, rows and table; on tiny data."""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import published, published_measures
from bench.published_cases import CASES, Check, verdict
from bench.published_measures import World, memorised
from s3t_ext.approximate import METHODS, Records
from s3t_ext.approximate.memorisation import PROXIES


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Give images of ten classes, each a bright column, in idx files."""
    for name, count in {"IMAGES": 150, "SINGLE": 60, "TEST": 100, "DIGITS": 80, "SUBSETS": 6}.items():
        monkeypatch.setattr(published_measures, name, count)
    (tmp_path / "mnist").mkdir()
    for name in ("train", "t10k"):
        labels = np.arange(150, dtype=np.uint8) % 10
        images = np.random.default_rng(len(name)).integers(0, 40, (150, 28, 28)).astype(np.uint8)  # none twice
        images[np.arange(150), :, 2 * labels] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / "mnist" / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return tmp_path


def test_every_method_has_a_claim_and_a_figure_or_the_reason_why_none_is_given() -> None:
    assert set(CASES) == {*METHODS, *(f"proxy {proxy}" for proxy in PROXIES)} - {"retrain"}
    for case in CASES.values():
        assert case.checks
        assert "arXiv" in case.source
        assert case.published


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([(0.04, 0.94), (0.00, 0.99)], "yes"),
        ([(0.04, 0.94), (0.06, 0.94)], "in part"),  # the claim for one seed
        ([(0.04, 0.90), (0.00, 0.90)], "in part"),  # the claim, but at a cost
        ([(0.06, 0.94), (0.30, 0.99)], "no"),  # nothing is forgotten, and nothing is harmed
    ],
)
def test_a_claim_is_reproduced_in_part_or_not(found, said) -> None:
    checks = (Check("forget", "<=", 0.05), Check("rest", ">=", "before", -0.03))
    assert [str(check) for check in checks] == ["forget <= 0.05", "rest >= before - 0.03"]
    case = replace(CASES["neggrad-plus"], checks=checks)
    assert verdict(case, [{"forget": f, "rest": r, "before": 0.96} for f, r in found]) == said


def test_rows_are_appended_and_the_table_has_the_newest(folder, capsys) -> None:
    words = ["--data", str(folder), "--seeds", "0", "1", "--out", str(folder)]
    assert published.main([*words, "--only", "gradient-ascent", "proxy confidence"]) == 0
    assert published.main([*words, "--only", "gradient-ascent"]) == 0
    with (folder / "published.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == published.COLUMNS
    assert [row["method"] for row in rows] == ["gradient-ascent", "proxy confidence", "gradient-ascent"]
    assert rows[0]["seeds"] == "0 1"
    assert rows[0]["mean"] == rows[2]["mean"]  # a seed gives what it gave
    assert float(rows[0]["min"]) <= float(rows[0]["mean"]) <= float(rows[0]["max"])
    capsys.readouterr()
    assert published.main(["--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("`gradient-ascent`") == said.count("`proxy confidence`") == 1


def test_a_class_is_removed_on_test_images_and_steps_are_held_against_the_oracle(folder) -> None:
    world = World(folder, 0)
    untouched = world.removed("fine-tune", epochs=0)
    assert untouched["rest"] == untouched["before"]
    found = world.removed("fine-tune", epochs=20, learning_rate=3e-3)
    assert found["forget"] <= 0.2
    assert found["rest"] >= 0.8
    assert set(world.dampened("ssd")) == {"works", "forgotten", "worst"}
    assert world.stepped("iau-released").keys() >= {"gap", "half of gap before", "lost", "time"}


def test_wrong_labels_are_memorised(folder, monkeypatch) -> None:
    monkeypatch.setattr(published_measures, "SUBSETS", 40)
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    inputs = torch.randn(120, 40, generator=chance) + 3 * torch.eye(3, 40)[labels]
    wrong = torch.arange(120) < 10
    truth = memorised(Records(inputs, torch.where(wrong, (labels + 1) % 3, labels)), 0)
    assert truth[wrong].mean() > truth[~wrong].mean() + 0.3
