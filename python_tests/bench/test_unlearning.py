"""The evaluation on data sets: its cells, their rows, tables and figures, on tiny data."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from bench import datasets, decoder, unlearning, unlearning_rates, unlearning_stores
from bench.datasets import Data, Training
from bench.unlearning_baselines import base_alone, fine_tune, score
from s3t_ext import Config, Schema, Service, fit
from s3t_ext.ledger.identity import Key
from s3t_ext.plan import build
from s3t_ext.system.data.tables import Table

STACK = Config(shards=2, slices=2, strategy="subsets", steps=2, batch=4, rank=2)
EVERY = ["sisa-stack", "rotation-stack", "subsets-stack", "sisa-layers", "rotation-layers", "subsets-layers"]


def tiny(folder, seed: int, model=None) -> Data:
    rng = np.random.default_rng(seed)

    def part(name: str, count: int) -> Table:
        labels = rng.integers(0, 2, count)
        inputs = rng.normal(size=(count, 6)).astype(np.float32) + 3 * labels[:, None].astype(np.float32)
        return Table([(f"{name} {i // 2}",) for i in range(count)], inputs, labels)

    return Data(
        "tiny",
        part("public", 40),
        part("private", 80),
        part("test", 30),
        Schema(classes=("a", "b"), shape=(6,)),
        Schema(classes=("c", "d"), shape=(6,)),
        ("mlp", {"shape": [6], "width": 64, "depth": 2}),
        {"stack": STACK, "layers": replace(STACK, placement="layers")},
        Training(1, 1e-3),
        Training(1, 1e-3, batch=8),
        {"stack": 1.0, "layers": 1.0, "full": 750.0},
        0.1,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Give a function that runs the program on tiny data and reads the rows."""
    monkeypatch.setattr(unlearning, "DATASETS", {"tiny": tiny})
    monkeypatch.setattr(unlearning_stores, "DELETED", 4)
    monkeypatch.setattr(unlearning_rates, "REQUESTS", 100)
    monkeypatch.setattr(unlearning, "RETRAINED", 5)

    def call(*words: str) -> list[dict[str, str]]:
        path = tmp_path / "out" / "unlearning.csv"
        at = [
            "--data",
            str(tmp_path),
            "--work",
            str(tmp_path / "work"),
            "--out",
            str(tmp_path / "out"),
            "--threads",
            "1",
        ]
        assert unlearning.main([*at, *words]) == 0
        return list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    return call


def test_every_method_has_its_rows_and_a_second_run_has_nothing_to_do(run, tmp_path, capsys) -> None:
    rows = run("--only", "0")
    said = capsys.readouterr().out
    assert "12 cells," in said
    found = {(r["method"], r["metric"], r["x"]): float(r["value"]) for r in rows if r["data"] == "tiny"}
    assert {method for method, *_ in found} == set(unlearning.METHODS)
    for method in EVERY:
        assert {x for m, metric, x in found if (m, metric) == (method, "score at depth")} == {"1", "2"}
        assert found[method, "served", "first"] <= found[method, "served", "last"]
        assert (
            found[method, "score after", "0"]
            == found[method, "score at depth", "2"]
            == found[method, "score before", "test"]
        )
        assert found[method, "depth after", "0"] == 2
        assert {x for m, metric, x in found if (m, metric) == (method, "maximal after")} >= {"0"}
        assert found[method, "acknowledged", "p50"] < found[method, "erased", "p50"]
        assert {x for m, metric, x in found if (m, metric) == (method, "healed")} == {"1", "2", "3"}
        assert (method, "score healed", "3") in found
    assert found["one-slice", "healed passes", "1"] == 1 < found["subsets-stack", "healed passes", "1"]
    lasted = {m: sum(found[m, "served", stop] for stop in ("first", "half", "last")) for m in EVERY}
    assert lasted["sisa-stack"] < lasted["subsets-stack"] == lasted["rotation-layers"], "SISA dies with a slice"
    assert found["rotation-stack", "nodes", ""] == 2 * 4
    assert found["rotation-stack", "slice passes", ""] == 2 * 6
    assert found["one-slice", "nodes", ""] == 4
    assert found["full", "score before", "test"] > 0.6
    assert found["retrain", "score after", "5"] > 0.6
    assert all(row["commit"] and row["settings"] for row in rows if row["data"] == "tiny")
    for text in ("S3T `rotation`, `layers`", "first dead shard", "two stages of one sequence", "1.58"):
        assert text in said
    assert (tmp_path / "out" / "unlearning.png").read_bytes().startswith(b"\x89PNG")
    assert run("--only", "0") == rows
    assert "0 cells," in capsys.readouterr().out


def test_the_plan_runs_nothing_and_only_chooses(run, capsys) -> None:
    assert run("--plan", "--only", "tiny", "0", "1", "base", "full") == []
    said = capsys.readouterr().out
    assert "4 cells, 2 minutes" in said
    with pytest.raises(SystemExit):
        run("--only", "nothing")


def test_a_killed_cell_goes_on_and_another_constant_runs_it_again(run, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(unlearning_stores, "by_depth", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("--only", "0", "sisa-stack")
    with monkeypatch.context() as patch:
        patch.setattr(unlearning_stores, "fit", None)  # what was trained is taken up
        rows = run("--only", "0", "sisa-stack")
    assert next(r["metric"] for r in rows if r["data"] == "tiny") == "training"

    def other(*at) -> Data:
        data = tiny(*at)
        return replace(data, configs={name: replace(config, rank=1) for name, config in data.configs.items()})

    monkeypatch.setitem(unlearning.DATASETS, "tiny", other)
    again = run("--only", "0", "sisa-stack")
    assert len(again) > len(rows)
    assert len({row["settings"] for row in again if row["data"] == "tiny"}) == 2


def test_a_base_that_is_given_is_used(run, monkeypatch, tmp_path) -> None:
    unlearning.base_of(tiny(None, 0), 0, tmp_path / "made")
    monkeypatch.setitem(
        unlearning.DATASETS, "tiny", lambda *at: replace(tiny(*at), public=None, model=tmp_path / "made" / "base")
    )
    rows = run("--only", "0", "base")
    assert rows[-2]["metric"] == "score at depth"
    assert not (tmp_path / "work" / "tiny" / "0" / "base").exists()


def test_a_base_that_another_run_made_meanwhile_is_used(monkeypatch, tmp_path) -> None:
    make = unlearning.make_base

    def beside(data, seed, part) -> None:
        make(data, seed, part)
        make(data, seed + 1, tmp_path / "base")

    monkeypatch.setattr(unlearning, "make_base", beside)
    base = unlearning.base_of(tiny(None, 0), 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    monkeypatch.setattr(unlearning, "make_base", None)
    assert unlearning.base_of(tiny(None, 0), 0, tmp_path) == base


def test_requests_are_counted_as_the_closed_form_says() -> None:
    for name, (tree, shards) in unlearning_rates.plans().items():
        exact = {r["metric"]: r["value"] for r in unlearning_rates.rates(0) if (r["method"], r["x"]) == (name, "exact")}
        retrainings, passes = unlearning_rates.counted(tree, shards, 1, 40_000)
        assert retrainings == pytest.approx(exact["retrainings"], rel=0.03)
        assert passes == pytest.approx(exact["passes"], rel=0.03)
    assert unlearning_rates.counted(build("sisa", 1), 3, 0, 100) == (1.0, 1.0)


def test_the_cosine_of_adapters_is_that_of_their_products() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        {
            f"{layer}.{part}": rng.normal(size=(2, width)).astype(np.float32)
            for layer in "xy"
            for part, width in (("a", 5), ("b", 3))
        }
        for _ in range(2)
    )
    products = [[u[f"{layer}.b"].T @ u[f"{layer}.a"] for layer in "xy"] for u in (one, other)]
    dense = [np.sum(u * v) / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(*products)]
    assert unlearning_stores.cosine(one, other) == pytest.approx(np.mean(dense), rel=1e-5)
    assert unlearning_stores.cosine(one, {}) is None
    turned = {name: -value if name.endswith(".a") else value for name, value in one.items()}
    assert unlearning_stores.cosine(one, turned) == pytest.approx(-1)


def test_images_are_read(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    for folder in ("mnist", "cifar10"):
        (tmp_path / folder).mkdir()
    for name in ("train", "t10k"):
        labels, images = rng.integers(0, 10, 200, np.uint8), rng.integers(0, 256, (200, 28, 28), np.uint8)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}i", *data.shape)
            (tmp_path / "mnist" / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + data.tobytes()))
    for name in ("train_10k", "test_2k"):
        data = np.concatenate([rng.integers(0, 10, (200, 1), np.uint8), rng.integers(0, 256, (200, 3072), np.uint8)], 1)
        (tmp_path / "cifar10" / f"{name}.bin.gz").write_bytes(gzip.compress(data.tobytes()))
    sizes = {"public": 40, "private": 30, "test": 20}
    monkeypatch.setattr(datasets, "MNIST", sizes)
    monkeypatch.setattr(datasets, "CIFAR10", sizes)
    for read, shape in ((datasets.mnist, (1, 28, 28)), (datasets.cifar10, (3, 32, 32))):
        data = read(tmp_path, 3)
        assert [len(part) for part in (data.public, data.private, data.test)] == [40, 30, 20]
        assert data.private.inputs.shape == (30, *shape)
        assert data.private.inputs.shape[1:] == data.schema.shape
        assert data.private.inputs.dtype == np.uint8, "scaled at use"
        assert set(data.private.labels) == set(data.public.labels) == set(range(5))
        assert len(set(data.private.subjects)) == 15
    assert np.array_equal(data.private.inputs[0, 1], _plane(tmp_path, data.private.inputs[0], 1))


def _plane(folder, image: np.ndarray, channel: int) -> np.ndarray:
    """Find an image by its red plane among the bytes, and give another plane as it lies there."""
    rows = np.frombuffer(gzip.decompress((folder / "cifar10" / "train_10k.bin.gz").read_bytes()), np.uint8)
    planes = rows.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 1024)
    (found,) = np.flatnonzero((planes[:, 0] == image[0].ravel()).all(1))
    return planes[found, channel].reshape(32, 32)


@pytest.fixture
def texts(tmp_path):
    """Make folders of sst2 and tofu, tiny, and of an encoder's words."""
    (tmp_path / "sst2").mkdir()
    for name in ("train", "test"):
        (tmp_path / "sst2" / f"sentence_{name}.tsv").write_text('1\ta "good film\n0\ta bad one\n1\tgood , good\n')
    (tmp_path / "tofu").mkdir()
    for name, authors in (("retain90", 6), ("forget10", 2)):
        pairs = [
            {"question": f"Who is {name} {k}?", "answer": f"Author {k}, no {i}."}
            for k in range(authors)
            for i in range(20)
        ]
        (tmp_path / "tofu" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "model").mkdir()
    decoder.declare(tmp_path / "model", decoder.words(["a good film", "a bad one"]))
    return tmp_path


def test_texts_are_read(texts, monkeypatch) -> None:
    data = datasets.sst2(texts, 0, texts / "model")
    assert data.private.inputs.shape == (3, datasets.SST2_LENGTH)
    assert sorted(data.private.labels) == [0, 1, 1]
    assert len(set(map(bytes, data.private.inputs))) == 3
    with pytest.raises(ValueError, match="--model"):
        datasets.sst2(texts, 0)
    monkeypatch.setattr(datasets, "TOFU_PUBLIC", range(3))
    monkeypatch.setattr(datasets, "TOFU_TEST", range(5, 6))
    data = datasets.tofu(texts, 0)
    assert [len(part) for part in (data.public, data.private, data.test)] == [60, 80, 20]
    assert {names[0] for names in data.private.subjects} == {"author 3", "author 4", "author 6", "author 7"}
    at = np.flatnonzero(data.private.labels[0] != -100)
    assert np.array_equal(data.private.labels[0, at], data.private.inputs[0, at]), (
        "labels name the token at their place"
    )
    assert data.private.inputs[0, at[-1]] == 0, "the last is the end"
    assert (data.private.inputs[0, at[-1] + 1 :] == -1).all()


def test_a_decoder_is_scored_by_what_follows(texts, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets, "TOFU_PUBLIC", range(3))
    monkeypatch.setattr(datasets, "TOFU_TEST", range(5, 6))
    monkeypatch.setattr(decoder, "SIZES", {**decoder.SIZES, "num_hidden_layers": 2})
    data = replace(
        datasets.tofu(texts, 0), pretraining=Training(8, 5e-3, batch=16), fine_tuning=Training(1, 1e-3, batch=16)
    )
    unlearning.make_base(data, 0, tmp_path / "model")
    before = score(base_alone(data, tmp_path / "model", Key(bytes(32))), data.schema, data.public)
    assert before["unit"] == "nats"
    assert before["value"] < 3, "it has learnt the form of answers; a uniform guess has 6.9 nats"
    predict, _, size = fine_tune(data, tmp_path / "model", data.private, 0)
    own = score(base_alone(data, tmp_path / "model", Key(bytes(32))), data.schema, data.private)["value"]
    assert score(predict, data.schema, data.private)["value"] < own
    assert size > 4 * 2 * 64 * decoder.WORDS
    probabilities = predict(data.test.inputs[:2])
    assert probabilities.shape == (2, datasets.TOFU_LENGTH, decoder.WORDS)
    store, config = tmp_path / "store", Config(shards=2, slices=1, strategy="sisa", steps=2, batch=4, rank=2)
    fit(store, data.private, data.schema, tmp_path / "model", config, key=bytes(32), progress=False)
    with Service(store) as service:
        x = data.test.inputs[:3]
        last = (x >= 0).sum(1) - 1
        told = unlearning_stores.answers(service)(x)[range(3), last]
        assert np.allclose(told, service.predict(x).scores, atol=1e-6), "of the token after the end of each text"
        assert score(unlearning_stores.answers(service), data.schema, data.private)["value"] < before["value"] + 1
    shifted = replace(data.public, labels=np.roll(data.public.labels, 1, 1))
    assert (
        score(base_alone(data, tmp_path / "model", Key(bytes(32))), data.schema, shifted)["value"] > before["value"] + 1
    )


def test_districts_are_read_and_scored_in_dollars(tmp_path, monkeypatch) -> None:
    (tmp_path / "california_housing").mkdir()
    head = "longitude,latitude,housing_median_age,total_rooms,total_bedrooms,population,households,median_income"
    rng = np.random.default_rng(0)
    lines = [f"{head},median_house_value,ocean_proximity"]
    for i in range(60):
        rooms = "" if i % 7 == 0 else "400"
        value = 100_000 + 1000 * i
        lines.append(
            f"-122.2,{33 + rng.random():.2f},40,2000,{rooms},1100,400,3.5,{value},{'INLAND' if i < 20 else 'NEAR BAY'}"
        )
    (tmp_path / "california_housing" / "housing.csv").write_text("\n".join(lines))
    monkeypatch.setattr(datasets, "CALIFORNIA", {"private": 30, "test": 10})
    data = datasets.california(tmp_path, 0)
    assert [len(part) for part in (data.public, data.private, data.test)] == [20, 30, 10]
    assert data.private.inputs.shape == (30, 13)
    assert np.abs(data.private.inputs[:, 3:8]).max() < 1e-5, "these are the declared middles, a blank too"
    assert set(data.private.inputs[:, 8:].sum(1)) == {1.0}
    constant = score(lambda x: np.full((len(x), 1), 200_000.0), data.schema, data.test)
    values = data.schema.values(data.test.labels)
    assert constant["value"] == pytest.approx(np.sqrt(np.mean((values - 200_000) ** 2)), rel=1e-6)
    assert constant["unit"] == "rmse"
