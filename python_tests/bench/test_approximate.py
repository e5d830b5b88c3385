"""The table of approximate methods beside S3T: its cases, figures of a model, cells, rows and report, on tiny data."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import approximate, approximate_cases, approximate_models, approximate_report, approximate_store
from bench.approximate_cases import Setting, case, kinds
from bench.approximate_models import adapted, records, said_by
from bench.approximate_scores import Judged, Seen, interval, judge, scores, see, tug_of_war, utility
from bench.datasets import Data, Training
from bench.unlearning import make_base
from s3t_ext import Config, Schema
from s3t_ext.approximate import METHODS
from s3t_ext.ledger.partition import place
from s3t_ext.system.data.schema import Column
from s3t_ext.system.data.tables import Table

CONFIG = Config(shards=2, slices=2, strategy="subsets", steps=4, batch=4, rank=2)


def tiny(_=None, seed: int = 0, __=None) -> Data:
    """Give points of three classes; the test part has others."""
    rng = np.random.default_rng(seed)

    def part(name: str, count: int) -> Table:
        labels = rng.integers(0, 3, count)
        inputs = rng.normal(size=(count, 6)).astype(np.float32) + 2 * np.eye(3, 6, dtype=np.float32)[labels]
        return Table([(f"{name} {i // 2}",) for i in range(count)], inputs, labels)

    return Data(
        "tiny", part("public", 40), part("private", 90), part("test", 60),
        Schema(classes=("a", "b", "c"), shape=(6,)), Schema(classes=("d", "e", "f"), shape=(6,)),
        ("mlp", {"shape": [6], "width": 64, "depth": 2}), {"stack": CONFIG},
        Training(1, 1e-3), Training(1, 1e-3), {"stack": 1.0}, 0.1,
    )  # fmt: skip


def housing(_=None, seed: int = 0, __=None) -> Data:
    data, target = tiny(None, seed), Column("value", 200_000, 1e-5)
    schema = Schema(task="regression", shape=(6,), targets=(target,))

    def part(table: Table) -> Table:
        return replace(table, labels=table.inputs[:, :1] + table.labels[:, None].astype(np.float32))

    parts = {name: part(getattr(data, name)) for name in ("public", "private", "test")}
    return replace(data, name="housing", **parts, schema=schema, public_schema=schema)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    training = {"epochs": 3, "batch": 8, "learning_rate": 5e-3}
    both = Setting(("people", "class", "noisy"), 80, 50, training, CONFIG, 1.0, {"neggrad-plus": {"epochs": 1}})
    there = {"tiny": both, "housing": replace(both, scenarios=("region",), settings={})}
    monkeypatch.setattr(approximate_cases, "SETTINGS", there)
    monkeypatch.setattr(approximate, "SETTINGS", there)
    monkeypatch.setattr(approximate_cases, "READ", {"tiny": tiny, "housing": housing})
    monkeypatch.setattr(approximate_cases, "PEOPLE", 8)


def data_of(name: str = "tiny") -> Data:
    return approximate_cases.read(name, None, 0, None)


@pytest.fixture
def run(tmp_path):
    def call(*words: str, status: int = 0) -> list[dict[str, str]]:
        at = [f"--{name}={tmp_path / name}" for name in ("data", "work", "out")]
        assert approximate.main([*at, *words]) == status
        path = tmp_path / "out" / "approximate.csv"
        return list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    return call


# --- cases ---


def test_what_is_forgotten_is_whole_people_and_what_the_scenario_says() -> None:
    data = data_of()
    people = case(data, "people", 0)
    cells = {place(people.key, names[0], 2, 2) for names in people.forget.subjects}
    assert len(cells) <= 2
    assert len({shard for shard, _ in cells}) == len(cells), "one slice of a shard at most"
    assert 8 <= len(people.forget) <= 16
    of_class = case(data, "class", 0)
    assert set(of_class.forget.labels) == set(of_class.others.labels) == {2}
    assert set(of_class.retain.labels) == set(of_class.test.labels) == {0, 1}
    region = case(data_of("housing"), "region", 0)
    assert region.forget.labels.min() > 1.5 >= region.retain.labels.max()
    assert region.others.labels.min() > 1.5 >= region.test.labels.max()
    for made in (people, of_class, region, case(data, "noisy", 0)):
        assert len(made.forget) + len(made.retain) == 80
        gone, kept = ({names[0] for names in part.subjects} for part in (made.forget, made.retain))
        assert gone.isdisjoint(kept)


def test_noisy_labels_are_all_wrong_in_training_and_beside_it() -> None:
    data = data_of()
    noisy = case(data, "noisy", 0)
    true = {row.tobytes(): label for row, label in zip(data.private.inputs, data.private.labels)}
    assert all(true[x.tobytes()] != y for x, y in zip(noisy.forget.inputs, noisy.forget.labels))
    assert all(true[x.tobytes()] == y for x, y in zip(noisy.retain.inputs, noisy.retain.labels))
    assert (noisy.others.labels != data.test.labels).all()
    assert np.array_equal(noisy.test.labels, data.test.labels)
    trained_on = {x.tobytes(): y for x, y in zip(noisy.data.private.inputs, noisy.data.private.labels)}
    assert all(trained_on[x.tobytes()] == y for x, y in zip(noisy.forget.inputs, noisy.forget.labels))


def test_a_question_gets_the_answer_of_another() -> None:
    ask = Table([("a",)], np.array([[5, 6, 7, 8, -1, -1]], np.int32), np.array([[-100, -100, 7, 8, -100, -100]]))
    told = np.array([[1, 2, 3, 9, 9, 9, 9, 0]], np.int32)
    other = Table([("b",)], told, np.array([[-100, -100, -100, 9, 9, 9, 9, 0]]))
    made = approximate_cases._answered(ask, other, [0])
    assert made["inputs"].tolist() == [[5, 6, 9, 9, 9, 9]]
    assert made["labels"].tolist() == [[-100, -100, 9, 9, 9, 9]]


# --- figures of a model ---


def seen(*means: float, loss: float = 1.0) -> Seen:
    each = {
        name: Judged(np.full(4, mean), loss * np.arange(4.0), np.zeros((4, 0)))
        for name, mean in zip(("forget", "retain", "test", "others"), (*means, 0.0))
    }
    return Seen(each, np.zeros(0))


def test_tug_of_war_and_interval_have_their_closed_forms() -> None:
    oracle = seen(0.5, 1.0, 0.75)
    assert tug_of_war(oracle, oracle) == 1
    assert tug_of_war(seen(0.75, 0.9, 0.65), oracle) == pytest.approx(0.75 * 0.9 * 0.9)
    assert tug_of_war(seen(2.5, 1.0, 0.75), oracle) == 0, "an error, of a regression, may be further off"
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert math.isnan(interval([1.0])[1])


def test_losses_are_those_of_each_task() -> None:
    schema = Schema(classes=("a", "b"), shape=(1,))
    two = Table([("x",)] * 2, np.zeros((2, 1), np.float32), np.array([0, 1]))
    found = judge(lambda x: np.array([[0.9, 0.1]] * len(x)), two, schema)
    assert found.score.tolist() == [1, 0]
    assert found.loss == pytest.approx([-math.log(0.9), -math.log(0.1)])
    money = Schema(task="regression", shape=(1,), targets=(Column("v", 200_000, 1e-5),))
    house = replace(two, labels=np.array([[0.5], [-1.0]], np.float32))
    found = judge(lambda x: np.full((len(x), 1), 300_000.0), house, money)
    assert found.score == pytest.approx([0.5, 2])
    assert found.loss == pytest.approx([0.25, 4])
    assert found.values[:, 0] == pytest.approx([1, 1])
    text = Schema(task="causal", max_length=4)
    lines = Table([("x",)], np.array([[0, 1, 1, -1]], np.int32), np.array([[-100, 1, 1, -100]]))
    said = np.array([[[0.25, 0.75], [0.6, 0.4], [0.5, 0.5], [0.5, 0.5]]])
    found = judge(lambda x: said, lines, text)
    assert found.score == pytest.approx([0.5])
    assert found.loss == pytest.approx([-(math.log(0.75) + math.log(0.4)) / 2])


def test_membership_is_read_off_losses_and_forget_quality_off_truth_ratios() -> None:
    leaky, oracle = seen(1, 1, 1), seen(1, 1, 1)
    leaky.parts["forget"].loss[:] = -1
    row = scores(leaky, oracle)
    assert (row["auc"], row["tpr"]) == (1, 1)
    assert scores(oracle, oracle)["auc"] == 0.5
    ratios = [leaky._replace(ratio=np.linspace(start, start + 1, 50)) for start in (0, 0, 5)]
    assert scores(ratios[0], ratios[1])["quality"] == 1
    assert scores(ratios[2], ratios[1])["quality"] < 1e-20


def test_the_adapter_is_plain_lora_that_begins_as_the_base_under_the_stores_head(tmp_path) -> None:
    data = data_of()
    make_base(data, 0, tmp_path / "base")
    made = case(data, "people", 0)
    model = adapted(data, tmp_path / "base", CONFIG, made.key, 0)
    changing = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changing
    assert all("lora_A" in name or "lora_B" in name for name in changing)
    with torch.no_grad():
        weight = model.head.weight
        assert torch.allclose(weight @ weight.t(), torch.eye(3), atol=1e-5)
    answers = said_by(model, data.schema)(data.test.inputs)
    kept = records(data.test, data.schema)
    with torch.no_grad():
        assert np.allclose(answers, model(kept.inputs).softmax(-1).numpy(), atol=1e-6)
    regression = adapted(data_of("housing"), tmp_path / "base", CONFIG, made.key, 0)
    assert regression.head.weight.requires_grad


# --- cells ---


def test_every_method_has_a_row_and_a_second_run_has_nothing_to_do(run, tmp_path, capsys, monkeypatch) -> None:
    methods = ("s3t", "nothing", "retrain", "neggrad-plus", "gradient-ascent")
    rows = run("--only", "tiny", "people", "0", *methods)
    said = capsys.readouterr().out
    assert "5 cells," in said
    found = {row["method"]: row for row in rows}
    assert sorted(found) == sorted(methods)
    s3t = found["s3t"]
    assert s3t["guarantee"] == "exact deactivation"
    assert s3t["auc"] == s3t["oracle_auc"]
    assert s3t["tpr"] == s3t["oracle_tpr"]
    assert s3t["tow"] == "1.0", "against its own oracle, as all that is said of it"
    assert found["nothing"]["collapsed"] == ""
    assert json.loads(s3t["note"])["depths"] == [1, 1]
    assert found["retrain"]["guarantee"] == "exact retrain"
    assert found["nothing"]["guarantee"] == "none"
    assert found["nothing"]["auc"] == found["nothing"]["control_auc"] != ""
    assert len({found[m]["oracle_auc"] for m in methods[1:]}) == 1
    assert len({found[m]["forget_loss"] for m in methods}) == 5, "each has a model of its own"
    assert json.loads(found["neggrad-plus"]["changed"]) == {"epochs": 1}
    assert all(float(row["seconds"]) >= 0 and row["commit"] and row["settings"] for row in rows)
    assert not sys.platform.startswith("linux") or float(s3t["megabytes"]) < 100, "the deletion's, not the training's"
    for text in ("**S3T**", "ToW", "tiny, people"):
        assert text in said
    assert (tmp_path / "out" / "approximate.png").read_bytes().startswith(b"\x89PNG")
    assert run("--only", "tiny", "people", "0", *methods) == rows
    assert "0 cells," in capsys.readouterr().out
    monkeypatch.setattr(approximate_models, "trained", None)  # what all methods share is taken up
    more = run("--only", "tiny", "people", "0", "iau-released")[-1]
    columns = ("oracle_auc", "control_auc", "oracle_test")
    assert [more[name] for name in columns] == [found["nothing"][name] for name in columns]


@pytest.mark.parametrize(("data", "scenario"), [("tiny", "class"), ("tiny", "noisy"), ("housing", "region")])
def test_what_kills_a_shard_is_healed(data, scenario, run) -> None:
    (row,) = run("--only", data, scenario, "0", "s3t")
    told = json.loads(row["note"])
    assert (row["guarantee"], told["served"]) == ("exact retrain", "healed")
    assert told["depths"] == [2, 2]
    assert row["auc"] == row["oracle_auc"]


def test_a_store_that_answers_otherwise_than_its_oracle_has_no_row(run, monkeypatch, capsys) -> None:
    honest = approximate_store._oracle

    def of_all(made, store, healed):
        return honest(made._replace(retain=made.data.private), store, healed)

    monkeypatch.setattr(approximate_store, "_oracle", of_all)
    assert run("--only", "tiny", "class", "0", "s3t", status=1) == []
    assert "answers otherwise than its oracle" in capsys.readouterr().out


def test_the_plan_says_what_is_left_out_and_runs_nothing(run, capsys) -> None:
    assert run("--plan", "--only", "housing", "0") == []
    said = capsys.readouterr().out
    apart = [name for name, method in METHODS.items() if "regression" not in method.tasks]
    assert said.count("left out: ") >= len(apart)
    assert "fine-tune" in said
    with pytest.raises(SystemExit):
        run("--only", "magic")


def test_a_method_that_fails_is_told_and_another_setting_runs_it_again(run, monkeypatch, capsys) -> None:
    def chosen(given: dict) -> None:
        there = replace(approximate_cases.SETTINGS["tiny"], settings={"neggrad-plus": given})
        monkeypatch.setitem(approximate_cases.SETTINGS, "tiny", there)

    chosen({"learning_rate": 1e38})
    words = ("--only", "tiny", "people", "0", "neggrad-plus", "fine-tune")
    assert [row["method"] for row in run(*words, status=1)] == ["fine-tune"]
    assert "neggrad-plus 0: FAILED: Diverged: " in capsys.readouterr().out
    for rate in (0.01, 0.02):
        chosen({"learning_rate": rate})
        row = run(*words)[-1]
        assert "1 cells," in capsys.readouterr().out, "fine-tuning is as it was"
        assert json.loads(row["changed"]) == {"learning_rate": rate}


def test_means_are_over_the_newest_row_of_each_seed(tmp_path) -> None:
    path = tmp_path / "approximate.csv"
    blank = dict.fromkeys(approximate.COLUMNS, "") | {"data": "tiny", "scenario": "people", "guarantee": "g"}
    blank |= {"unit": "accuracy"} | dict.fromkeys(
        ("forget", "retain", "test", "auc", "oracle_auc", "control_auc", "tpr"), "0.5"
    )
    blank |= {"seconds": "1", **{f"oracle_{part}": "0.5" for part in ("forget", "retain", "test")}}
    lines = [("0", "0.1"), ("0", "0.4"), ("1", "0.6")]
    rows = [blank | {"method": "rum", "seed": seed, "tow": tow} for seed, tow in lines]
    rows.append(blank | {"method": "s3t", "seed": "0", "tow": "1", "test": "0.7", "oracle_test": "0.7"})
    approximate.append(path, rows, approximate.COLUMNS)
    text = approximate_report.table(path)
    assert "| 0.500 ± 1.271 |" in text
    assert text.index("**S3T**") < text.index("`rum`")
    assert "this attack sees little" in text
    approximate.append(path, [rows[0] | {"seed": "2", "collapsed": "collapsed"}], approximate.COLUMNS)
    assert "| `rum`, 1 of 3 collapsed |" in approximate_report.table(path)
    short = approximate_report.summary(path).splitlines()
    assert short[0] == "| method | people | test | collapsed |"
    assert short[2] == "| **S3T** | 1.00, 0.00, 1 s | +0.200 | 0 of 1 |", "0.7 where the adapters' oracle has 0.5"
    assert short[3] == "| `rum` | 0.37, 0.00, 1 s | +0.000 | 1 of 3 |"


def test_a_collapse_is_told_by_what_is_kept(run, monkeypatch) -> None:
    there = replace(approximate_cases.SETTINGS["tiny"], settings={"gradient-ascent": {"learning_rate": 1.0}})
    monkeypatch.setitem(approximate_cases.SETTINGS, "tiny", there)
    rows = {row["method"]: row for row in run("--only", "tiny", "class", "0", "gradient-ascent", "nothing")}
    assert float(rows["gradient-ascent"]["retain"]) < 0.9 * float(rows["nothing"]["retain"])
    assert {name: row["collapsed"] for name, row in rows.items()} == {"gradient-ascent": "collapsed", "nothing": ""}
    made = case(data_of("housing"), "region", 0)
    spread = float(made.retain.labels.var())
    errors = Judged(np.zeros(1), np.array([spread / 4]), np.zeros((1, 1)))
    assert utility(Seen({"retain": errors}, np.zeros(0)), made) == pytest.approx(0.75), "R^2"


@pytest.mark.parametrize("name", ["tiny", "housing"])
def test_a_model_is_seen_on_four_parts(name, tmp_path) -> None:
    data = data_of(name)
    make_base(data, 0, tmp_path / "base")
    made = case(data, approximate_cases.SETTINGS[name].scenarios[0], 0)
    found = see(said_by(adapted(data, tmp_path / "base", CONFIG, made.key, 0), data.schema), made)
    assert [len(part.loss) for part in found.parts.values()] == [
        len(getattr(made, part)) for part in ("forget", "retain", "test", "others")
    ]
    assert len(kinds(data, data.private)) == 80
