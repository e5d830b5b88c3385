"""fit, predict, delete and verify from the command line, on texts, prompts, columns and images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import texts
from tiny import weights

from s3t_ext.system.data.tables import read_table
from s3t_ext.system.serve import Service
from s3t_ext.system.verify import _sha256

from .test_cli import ask, call, refused

SETTINGS = ["--shards", "2", "--slices", "2", "--steps", "2", "--batch", "4", "--rank", "2", "--lr", "1e-3"]


def fit_words(folder: Path, table: object, schema: dict, model: object, *more: object) -> list[object]:
    (folder / "schema.json").write_text(json.dumps(schema))
    (folder / "key").write_text("ab" * 32)
    words = ["fit", folder / "store", table, "--schema", folder / "schema.json", "--model", model]
    words += ["--key", folder / "key", *SETTINGS, *more]
    return [str(word) for word in words]


def forget(capsys, folder: Path, words: list[str], rest: Path, person: str) -> None:
    """Delete somebody, and heal: what is left, and then all, has the bits of a store made without them."""
    ask(
        capsys,
        *[word.replace(str(folder / "store"), str(folder / "other")) for word in [*words[:2], str(rest), *words[3:]]],
    )
    receipt = ask(capsys, "delete", folder / "store", person)
    assert receipt["subjects"][0]["status"] == "deleted"
    left = weights(folder / "store")
    assert left
    assert left.items() <= weights(folder / "other").items()
    assert ask(capsys, "heal", folder / "store")["nodes"] > 0
    assert weights(folder / "store") == weights(folder / "other"), "healed: all nodes, as if they had never been there"


def test_texts(tmp_path, capsys) -> None:
    schema = {"classes": texts.CLASSES, "max_length": texts.LENGTH, "input": "sentence"}
    table = texts.write(tmp_path / "t.tsv", texts.rows())
    told = texts.write(tmp_path / "e.tsv", [{**row, "subject": "volunteer"} for row in texts.rows(20)])
    words = fit_words(tmp_path, table, schema, texts.model(tmp_path / "base"), "--evaluation", told)
    report = ask(capsys, *words)
    assert (report["nodes"], report["records"]) == (6, 60)
    assert 0 <= report["accuracy"] <= 1
    assert ask(capsys, *words)["trained"] == 0, "the same command goes on"
    asked = texts.write(tmp_path / "ask.tsv", [{"sentence": row["sentence"]} for row in texts.rows(5)])
    answer = ask(capsys, "predict", tmp_path / "store", asked)
    assert len(answer["labels"]) == 5
    assert set(answer["labels"]) <= set(texts.CLASSES)
    with Service(tmp_path / "store") as service:
        said = service.predict([row["sentence"] for row in texts.rows(5)])
        assert [[round(float(v), 6) for v in row] for row in said.scores] == answer["scores"]
    rest = texts.write(tmp_path / "r.tsv", [row for row in texts.rows() if row["subject"] != "person 3"])
    forget(capsys, tmp_path, words, rest, "person 3")
    assert ask(capsys, "verify", tmp_path / "store", table, "--nodes", 2)["mismatched"] == 0


def test_prompts(tmp_path, capsys) -> None:
    schema = {"task": "causal", "max_length": texts.LENGTH, "input": "prompt", "label": "completion"}
    table = texts.write(tmp_path / "t.jsonl", texts.pairs())
    base = texts.model(tmp_path / "base", "gpt2")
    words = fit_words(tmp_path, table, schema, base)
    told = texts.write(tmp_path / "e.jsonl", [{**row, "subject": "volunteer"} for row in texts.pairs(5)])
    report = ask(capsys, *words, "--evaluation", told)
    assert report["records"] == 40
    with Service(tmp_path / "store") as service:
        assert report["nats"] == pytest.approx(nats(service, told), rel=1e-5)
    receipt = ask(capsys, "delete", tmp_path / "store", "volunteer", "--dry-run")
    assert [row["part"] for row in receipt["subjects"]] == ["evaluation"]
    ask(capsys, "report", tmp_path / "store", tmp_path / "page", "--evaluation", told)
    assert f"| 2 | {report['nats']:.4f} |" in (tmp_path / "page" / "report.md").read_text()
    asked = texts.write(tmp_path / "ask.jsonl", [{"prompt": row["prompt"]} for row in texts.pairs(3)])
    status, out, _ = call(capsys, "predict", tmp_path / "store", asked, "--tokens", 4)
    assert (status, len(out.splitlines())) == (0, 3)
    rest = texts.write(tmp_path / "r.jsonl", [row for row in texts.pairs() if row["subject"] != "person 3"])
    forget(capsys, tmp_path, words, rest, "person 3")
    refused(capsys, "audit", tmp_path / "store", table, says="table: expected at least 360 records")


def nats(service: Service, path: Path) -> float:
    """Compute the mean -log p of the completions' tokens, text by text and token by token."""
    table = read_table(path, service.folder.schema, service.folder.base)
    said = []
    for ids, labels in zip(table.inputs, table.labels):
        for at in np.flatnonzero(labels != -100):
            said.append(-np.log(service.predict(ids[None, :at]).scores[0, labels[at]]))
    return float(np.mean(said))


def test_numbers_in_columns(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"who": f"p{i % 30}", "age": int(age) if i % 7 else "", "sea": ("near", "far")[i % 2], "value": 1e5 + 2e3 * age}
        for i, age in enumerate(rng.integers(1, 50, 90))
    ]
    schema = {
        "task": "regression",
        "shape": [3],
        "subject": "who",
        "input": [
            {"column": "age", "offset": 25, "scale": 0.05, "blank": 25},
            {"column": "sea", "values": ["near", "far"]},
        ],
        "targets": [{"column": "value", "offset": 150000, "scale": 1e-5}],
    }
    table = texts.write(tmp_path / "t.csv", rows)
    told = texts.write(tmp_path / "e.csv", [{**row, "who": "volunteer"} for row in rows])
    words = fit_words(tmp_path, table, schema, "mlp", "--public", told, "--evaluation", told, "--head", "trained")
    vote = "combine: expected probabilities or logits (a regression: the mean), got 'vote'"
    refused(capsys, *words, "--combine", "vote", says=vote)
    report = ask(capsys, *words)
    assert report["records"] == 90
    refused(capsys, "predict", tmp_path / "store", table, "--combine", "vote", says=vote)
    assert 0 < report["rmse"]["value"] < 1e5
    status, out, _ = call(capsys, "predict", tmp_path / "store", table)
    printed = [float(line) for line in out.splitlines()]
    answer = ask(capsys, "predict", tmp_path / "store", table)
    assert status == 0
    np.testing.assert_allclose(printed, [row["value"] for row in answer["values"]], rtol=1e-5)
    assert all(0 < value < 4e5 for value in printed), "in the column's own units"
    rest = texts.write(tmp_path / "r.csv", [row for row in rows if row["who"] != "p3"])
    forget(capsys, tmp_path, words, rest, "p3")


def test_a_folder_of_images(tmp_path, capsys) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"p{i % 20}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    schema = {"classes": ["cat", "dog"], "shape": [1, 8, 8], "numbers": "uint8", "scale": 1 / 255}
    words = fit_words(tmp_path, tmp_path / "images", schema, "vit")
    pretrained = ["--public", str(tmp_path / "images"), "--public-epochs", "2", "--patch", "4"]
    status, _, err = call(capsys, *words, *pretrained)
    assert (status, "2/2  pretraining on the public part  epoch 2" in err) == (0, True)
    assert json.loads((tmp_path / "store" / "base" / "model.json").read_text())["arguments"]["patch"] == 4
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store.key").unlink()
    (tmp_path / "store.anchor").unlink()
    assert ask(capsys, *words)["records"] == 40
    assert len(ask(capsys, "predict", tmp_path / "store", tmp_path / "images")["labels"]) == 40
    shutil.copytree(tmp_path / "images", tmp_path / "rest", ignore=lambda *_: ["p3"])
    forget(capsys, tmp_path, words, tmp_path / "rest", "p3")
    digests = {_sha256(str(tmp_path / name)) for name in ("images", "rest")}
    (tmp_path / "rest" / "dog" / "p5").rename(tmp_path / "rest" / "dog" / "p3")
    assert len(digests | {_sha256(str(tmp_path / "rest"))}) == 3, "evidence names the folder's files and their content"


def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys) -> None:
    table = texts.write(tmp_path / "t.jsonl", texts.rows())
    base = texts.model(tmp_path / "base")
    schema = {"classes": texts.CLASSES, "max_length": texts.LENGTH, "input": "sentence"}
    for change, says in (
        ({"label": "mood"}, "row 1: column 'mood' is missing; the columns are ['label', 'sentence', 'subject']"),
        ({"classes": ["good", "fair"]}, "expected one of the declared classes ['good', 'fair'], got 'bad'"),
        ({"max_length": 400}, "schema.max_length: expected at most the model's 40"),
        (
            {"max_length": 0, "shape": [4]},
            f"schema.max_length: expected it to be declared, since the base model in {base} takes texts, got 'shape'",
        ),
    ):
        refused(capsys, *fit_words(tmp_path, table, {**schema, **change}, base), says=says)
        assert not (tmp_path / "store").exists()
    few = texts.write(tmp_path / "few.jsonl", texts.rows(1))
    refused(capsys, *fit_words(tmp_path, few, schema, base), says="shards: expected records in each, got none in [")
    assert not (tmp_path / "store").exists()
