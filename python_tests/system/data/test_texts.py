"""Texts in tables: the tokens of the base, cut and labelled as declared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import texts
import tiny as t

import s3t_ext
from s3t_ext.system.data.tables import Table, as_table, read_inputs, read_table


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return texts.model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return texts.model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl"])
def test_texts_become_the_tokens_of_the_base(tmp_path, bert, kind) -> None:
    rows = texts.rows(6)
    path = texts.write(tmp_path / f"t{kind}", rows)
    table = read_table(path, texts.SCHEMA, bert)
    assert table.inputs.shape == (6, texts.LENGTH)
    assert (table.inputs.dtype, table.labels.tolist()) == (np.int32, [0, 1] * 3)
    for row, ids in zip(rows, table.inputs, strict=True):
        words = [5 + texts.WORDS.index(word) for word in row["sentence"].split()]
        assert ids.tolist() == [2, *words, 3] + [-1] * (texts.LENGTH - 2 - len(words))
    assert np.array_equal(read_inputs(path, texts.SCHEMA, bert), table.inputs)
    given = Table(table.subjects, np.array([row["sentence"] for row in rows]), table.labels)
    for again in (as_table(given, texts.SCHEMA, bert), as_table(table, texts.SCHEMA)):
        assert again.inputs.tobytes() == table.inputs.tobytes()


def test_a_text_is_cut_at_the_declared_length_alone(tmp_path, bert) -> None:
    rows = texts.rows(12)
    short = replace(texts.SCHEMA, max_length=8)
    table = read_table(texts.write(tmp_path / "t.jsonl", rows), short, bert)
    assert table.inputs.shape == (12, 8)
    assert [int((row >= 0).sum()) for row in table.inputs] == [min(8, 2 + len(r["sentence"].split())) for r in rows]
    few = read_table(texts.write(tmp_path / "few.jsonl", rows[:1]), short, bert)
    assert few.inputs.tobytes() == table.inputs[:1].tobytes(), "the longest text of a table decides nothing"


def test_a_completion_alone_has_labels(tmp_path, gpt2) -> None:
    rows = texts.pairs(8)
    table = read_table(texts.write(tmp_path / "t.jsonl", rows), texts.CAUSAL, gpt2)
    for row, ids, labels in zip(rows, table.inputs, table.labels, strict=True):
        prompt, completion = (
            [5 + texts.WORDS.index(word) for word in row[name].split()] for name in ("prompt", "completion")
        )
        whole = [*prompt, *completion, 4]
        assert ids[ids >= 0].tolist() == whole
        assert labels.tolist() == [-100] * len(prompt) + whole[len(prompt) :] + [-100] * (texts.LENGTH - len(whole))
    assert (table.inputs.dtype, table.labels.dtype) == (np.int32, np.int64)
    given = Table(table.subjects, [row["prompt"] for row in rows], [row["completion"] for row in rows])
    for again in (as_table(given, texts.CAUSAL, gpt2), as_table(table, texts.CAUSAL)):
        assert again.inputs.tobytes() == table.inputs.tobytes()
        assert again.labels.tobytes() == table.labels.tobytes()
    asked = read_inputs(
        texts.write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in rows]), texts.CAUSAL, gpt2
    )
    assert [row[row >= 0].tolist() for row in asked] == [
        ids[: (labels == -100).argmin()].tolist() for ids, labels in zip(table.inputs, table.labels, strict=True)
    ]


def test_bad_texts_are_refused(tmp_path, bert, gpt2) -> None:
    rows = texts.rows(3)

    def refused(schema, base, says, **change) -> None:
        path = texts.write(tmp_path / "t.jsonl", [rows[0], {**rows[1], **change}])
        with pytest.raises(ValueError, match=says):
            read_table(path, schema, base)

    refused(texts.SCHEMA, bert, "row 2, column 'sentence': expected text, got 7", sentence=7)
    refused(texts.SCHEMA, bert, "row 2, column 'label': expected one of the declared classes", label="fair")
    refused(texts.SCHEMA, gpt2, "row 2, column 'sentence': expected some text, got none", sentence=" ")
    refused(texts.SCHEMA, None, "base: expected the folder of the base model, whose tokenizer reads texts")
    pairs = texts.pairs(3)
    long = texts.write(tmp_path / "p.jsonl", [pairs[0], {**pairs[1], "prompt": "w1 " * texts.LENGTH}])
    with pytest.raises(ValueError, match="row 2, column 'prompt': expected a prompt of 1 to 15 tokens"):
        read_table(long, texts.CAUSAL, gpt2)
    with pytest.raises(ValueError, match="tokenizer: expected one with a token that ends a text"):
        read_table(texts.write(tmp_path / "p.jsonl", pairs), texts.CAUSAL, bert)
    ids = np.full((1, texts.LENGTH), 7, np.int32)
    for wrong in (ids[:, :4], ids * 1.0, np.where(np.arange(texts.LENGTH) == 3, -1, ids), ids * 0 - 1):
        with pytest.raises(ValueError, match="table, row 1: expected a text, or 16 token ids"):
            as_table(Table([("a",)], wrong, np.zeros(1, int)), texts.SCHEMA)
    for labels in (ids + 1, np.full_like(ids, -100)):
        with pytest.raises(ValueError, match="table, row 1: expected -100, or the input's token"):
            as_table(Table([("a",)], ids, labels), texts.CAUSAL)


def test_what_does_not_fit_the_base_is_refused_before_any_work(tmp_path, bert, gpt2) -> None:
    path = texts.write(tmp_path / "t.jsonl", texts.rows())
    config = s3t_ext.Config(shards=2, slices=2, steps=1, batch=2, rank=2)
    bare = texts.model(tmp_path / "bare", tokens=False)
    numbers = t.make(tmp_path / "numbers")
    for schema, base, says in (
        (replace(texts.SCHEMA, max_length=41), bert, "schema.max_length: expected at most the model's 40, got 41"),
        (texts.SCHEMA, bare, "tokenizer: expected tokenizer.json or the like"),
        (
            texts.SCHEMA,
            numbers.base,
            "schema.shape: expected it to be declared, since .* takes numbers",
        ),
        (numbers.schema, bert, "schema.max_length: expected it to be declared, since .* takes texts"),
        (texts.CAUSAL, bert, "causal"),
    ):
        with pytest.raises(ValueError, match=says):
            s3t_ext.fit(tmp_path / "store", path, schema, base, config, progress=False)
        assert not (tmp_path / "store").exists()
    ids = np.full((8, texts.LENGTH), 97, np.int32)
    table = Table([(f"p{i}",) for i in range(8)], ids, np.zeros(8, int))
    with pytest.raises(ValueError, match="expected token ids below the model's 97, got 97"):
        s3t_ext.fit(tmp_path / "store", table, texts.SCHEMA, bare, config, progress=False)
    assert not (tmp_path / "store").exists()
