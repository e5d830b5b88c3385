"""Non-interference for every task and kind of input: what is left is what training without the person gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import interference
import numpy as np
import pytest
import texts
import tiny as t

import s3t_ext
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.data.tables import Table, as_table
from s3t_ext.system.serve import Service

GONE = "person 3"


class Task(NamedTuple):
    """A base model, a schema, and a table in which the person to be deleted stands out."""

    base: Path
    schema: Schema
    table: Table


def texts_of(folder: Path, longest: int = texts.LENGTH - 2) -> Task:
    """Texts of 1 to 12 words; the person's own are the longest of all: nobody else is padded so far."""
    rows = texts.rows()
    for row in rows:
        row["sentence"] = " ".join(["w7"] * longest) if row["subject"] == GONE else row["sentence"]
    table = Table([(row["subject"],) for row in rows], [row["sentence"] for row in rows], np.arange(len(rows)) % 2)
    return Task(texts.model(folder / "bert"), texts.SCHEMA, table)


def prompts(folder: Path) -> Task:
    rows = texts.pairs()
    for row in rows:
        row["completion"] = " ".join(["w7"] * 10) if row["subject"] == GONE else row["completion"]
    table = Table(
        [(row["subject"],) for row in rows], *([row[name] for row in rows] for name in ("prompt", "completion"))
    )
    return Task(texts.model(folder / "llama", "llama"), texts.CAUSAL, table)


def values(folder: Path) -> Task:
    """A regression with two targets; the person's own lie far out: nothing is scaled by them."""
    tiny = t.make(folder)
    targets = np.random.default_rng(1).normal(size=(60, 2)).astype(np.float32)
    targets[[names == (GONE,) for names in tiny.table.subjects]] = 50
    schema = Schema(task="regression", shape=(6,), targets=(Column("u", 3.0, 0.5), Column("v")))
    return Task(tiny.base, schema, Table(tiny.table.subjects, tiny.table.inputs, targets))


def images(folder: Path) -> Task:
    """Images as bytes; the person's own are white."""
    tiny = t.make(folder, "vit")
    pixels = np.random.default_rng(1).integers(0, 256, (60, 1, 8, 8)).astype(np.uint8)
    pixels[[names == (GONE,) for names in tiny.table.subjects]] = 255
    schema = Schema(classes=tiny.schema.classes, shape=(1, 8, 8), numbers="uint8", scale=1 / 255)
    return Task(tiny.base, schema, Table(tiny.table.subjects, pixels, tiny.table.labels))


def some(table: Table, rows: list[int]) -> Table:
    inputs, labels = ([part[i] for i in rows] for part in (table.inputs, table.labels))
    return Table([table.subjects[i] for i in rows], inputs, labels)


@pytest.mark.parametrize(
    ("make", "placement"),
    [(texts_of, "layers"), (texts_of, "stack"), (prompts, "layers"), (values, "stack"), (images, "layers")],
)
def test_what_is_left_is_as_if_the_person_had_never_been(tmp_path, make, placement) -> None:
    task: Task = make(tmp_path)
    config = s3t_ext.Config(
        shards=2, slices=2, steps=3, batch=6, rank=2, lr=3e-3, strategy="rotation", placement=placement, clip=0.5
    )
    table = as_table(task.table, task.schema, task.base)

    def fit(name: str, given: Table) -> Path:
        s3t_ext.fit(tmp_path / name, given, task.schema, task.base, config, key=t.KEY, progress=False)
        return tmp_path / name

    def served(service: Service) -> dict[str, Any]:
        answer = service.predict(table.inputs[:6])
        return {"depths": answer.depths, "nodes": answer.nodes, "scores": answer.scores.tobytes()}

    with interference.equal_salts():
        everything = fit("all", task.table)
        before = t.weights(everything)
        s3t_ext.delete(everything, [GONE])
        with Service(everything) as service:
            found, dirty = served(service), service.folder.ledger.dirty()
        rows = [i for i, names in reversed(list(enumerate(task.table.subjects))) if GONE not in names]
        rest = fit("rest", some(task.table, rows))
        with Service(rest) as service:
            service._mask(dirty)  # the same slices invalid
            assert found == served(service)
    held, expected = interference.held(everything), interference.held(rest, dirty)
    assert interference.compare("", held, expected) == []
    left = sum(key[0] == "node" for key in held)
    assert 0 < left < len(before) == 8
    changed = [node for node, name in t.weights(rest).items() if before[node] != name]
    assert len(changed) == len(before) - left, "the person did shape every node that saw their slice"
