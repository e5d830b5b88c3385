"""Tables under a schema: every kind of file and value, what is refused, and that nothing is inferred from records."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import texts
import tiny as t

import s3t_ext
from s3t_ext.system.data.formats import read_rows
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.data.tables import Table, as_table, read_chunks, read_table
from s3t_ext.system.evidence import residue
from s3t_ext.system.folder import StoreFolder

COLOURS = ("red", "green", "blue")
HOUSES = Schema(
    task="regression",
    shape=(4,),
    input=(Column("age", scale=0.02), Column("rooms", offset=5.0, blank=4.0), Column("sea", values=("near", "far"))),
    targets=(Column("value", offset=200_000.0, scale=1e-5),),
    blank=30.0,
)


def test_subjects_in_memory_are_normalised(mlp, tmp_path) -> None:
    shouted = replace(mlp.table, subjects=[(names[0].upper() + " ",) for names in mlp.table.subjects])
    store = mlp.fit(tmp_path / "store", shouted)
    assert s3t_ext.delete(store, ["Person  3"])["subjects"][0]["status"] == "deleted"
    assert t.weights(store).items() <= t.weights(mlp.fit(tmp_path / "other")).items()


@pytest.mark.parametrize("wrong", ["strings", "labels", "lengths", "nan", "shape", "empty"])
def test_bad_tables_in_memory_are_refused(mlp, tmp_path, wrong) -> None:
    table = mlp.table
    x = table.inputs.copy()
    if wrong == "nan":
        x[3, 0] = np.nan
    bad = {
        "strings": Table([names[0] for names in table.subjects], x, table.labels),
        "labels": Table(table.subjects, x, table.labels + 2),
        "lengths": Table(table.subjects, x[:-1], table.labels),
        "nan": Table(table.subjects, x, table.labels),
        "shape": Table(table.subjects, x[:, :-1], table.labels),
        "empty": Table([], x[:0], table.labels[:0]),
    }[wrong]
    with pytest.raises(ValueError, match="table"):
        mlp.fit(tmp_path / "store", bad)
    assert not (tmp_path / "store").exists()


# --- numbers ----------------------------------------------------------------------------------------------------------


def houses(path, rows: list[tuple]):
    """Write rows of (subject, age, rooms, sea, value) as the file's ending says; None is a blank."""
    names = ("subject", "age", "rooms", "sea", "value")
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    elif path.suffix == ".npz":
        kinds = (np.str_, float, float, np.str_, float)
        np.savez(path, **{n: np.array(c, kind) for n, c, kind in zip(names, zip(*rows), kinds)})
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([names, *rows])
    return path


ROWS = [("ann", 10, 6, "near", 300_000.0), ("bob", None, 5.5, "far", 150_000.5), ("cyd", 50, None, "near", 0)]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".npz"])
def test_columns_targets_and_blanks_are_taken_as_declared(tmp_path, kind) -> None:
    table = read_table(houses(tmp_path / f"houses{kind}", ROWS), HOUSES)
    assert table.subjects == [("ann",), ("bob",), ("cyd",)]
    assert table.inputs.dtype == table.labels.dtype == np.float32
    want = [[0.2, 1, 1, 0], [0.6, 0.5, 0, 1], [1.0, -1, 1, 0]]  # a blank age is 30, blank rooms are 4
    assert table.inputs.tobytes() == np.array(want).astype(np.float32).tobytes()
    assert table.labels.tobytes() == np.array([[1.0], [-0.499995], [-2.0]]).astype(np.float32).tobytes()
    np.testing.assert_allclose(HOUSES.values(table.labels)[:, 0], [300_000, 150_000.5, 0], atol=0.01)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (1, "old", "row 2, column 'age': expected a finite number, got 'old'"),
        (1, "inf", "row 2, column 'age': expected a finite number"),
        (1, "1e300", "row 2, column 'age': expected a number that float32 holds"),
        (4, "1e300", "row 2, column 'value': expected a number that float32 holds"),
        (3, "by", "row 2, column 'sea': expected one of ['near', 'far'], got 'by'"),
        (4, "", "row 2, column 'value'"),
        (4, "nan", "row 2, column 'value': expected a finite number"),
        (0, " ", "row 2, column 'subject'"),
    ],
)
def test_bad_cells_are_named(tmp_path, place, value, says) -> None:
    rows = [list(row) for row in ROWS]
    rows[1][place] = value
    with pytest.raises(ValueError, match=re.escape(says)):
        read_table(houses(tmp_path / "houses.csv", rows), HOUSES)


def test_blanks_are_refused_where_none_is_declared(tmp_path) -> None:
    path = houses(tmp_path / "houses.csv", ROWS)
    with pytest.raises(ValueError, match="row 2, column 'age': expected a finite number, got a blank; declare `blank`"):
        read_table(path, replace(HOUSES, blank=None))
    colours = Schema(classes=COLOURS, shape=(2,))
    (tmp_path / "x.jsonl").write_text('{"subject": "a", "input": [1, null], "label": "red"}\n')
    with pytest.raises(ValueError, match="row 1, column 'input'"):
        read_table(tmp_path / "x.jsonl", colours)
    assert read_table(tmp_path / "x.jsonl", replace(colours, blank=7.0)).inputs.tolist() == [[1.0, 7.0]]


def test_a_column_that_is_not_there_is_named(tmp_path) -> None:
    path = houses(tmp_path / "houses.csv", ROWS)
    for change, name in (
        ({"targets": (Column("price"),)}, "price"),
        ({"input": (Column("floors"),), "shape": (1,)}, "floors"),
        ({"subject": "who"}, "who"),
    ):
        with pytest.raises(ValueError, match=f"row 1: column '{name}' is missing; the columns are"):
            read_table(path, replace(HOUSES, **change))


def test_a_prefix_stands_for_columns_where_they_have_an_order(tmp_path) -> None:
    schema = Schema(classes=COLOURS, shape=(2,), input="x*", blank=7.0)
    (tmp_path / "t.csv").write_text("x2,subject,x1,label\n1,a,,red\n")
    assert read_table(tmp_path / "t.csv", schema).inputs.tolist() == [[1, 7]]
    np.savez(tmp_path / "t.npz", x2=[1.0], subject=["a"], x1=[np.nan], label=["red"])
    assert read_table(tmp_path / "t.npz", schema).inputs.tolist() == [[1, 7]]
    (tmp_path / "t.jsonl").write_text('{"x2": 1, "subject": "a", "x1": 2, "label": "red"}\n')
    with pytest.raises(ValueError, match=r"expected a list of columns for t\.jsonl, whose rows have no common order"):
        read_table(tmp_path / "t.jsonl", schema)
    with pytest.raises(ValueError, match="no column starts with 'y'"):
        read_table(tmp_path / "t.csv", replace(schema, input="y*"))


def test_what_a_record_becomes_depends_on_no_other(tmp_path) -> None:
    """No scaling, class, blank or length is fitted to the records (rule 7)."""
    whole = read_table(houses(tmp_path / "all.csv", ROWS), HOUSES)
    for i, row in enumerate(ROWS):
        alone = read_table(houses(tmp_path / f"{i}.csv", [row]), HOUSES)
        assert alone.inputs.tobytes() == whole.inputs[i].tobytes()
        assert alone.labels.tobytes() == whole.labels[i].tobytes()


def test_a_regression_in_memory_and_from_its_own_file_are_one(tmp_path) -> None:
    schema = Schema(task="regression", shape=(2,), targets=(Column("u", 3.0, 0.5), Column("v")))
    rng = np.random.default_rng(0)
    table = Table([("a",), ("b",)], rng.normal(size=(2, 2)).astype("f4"), rng.normal(size=(2, 2)).astype("f4"))
    table.save(tmp_path / "t.npz", schema)
    for again in (read_table(tmp_path / "t.npz", schema), as_table(table, schema)):
        assert again.inputs.tobytes() == table.inputs.tobytes()
        assert again.labels.tobytes() == table.labels.tobytes()
    for labels in (table.labels[:, :1], table.labels * np.float32(np.nan), table.labels[:, 0]):
        with pytest.raises(ValueError, match="table, row 1: expected 2 finite numbers"):
            as_table(replace(table, labels=labels), schema)


# --- bytes and images -------------------------------------------------------------------------------------------------

BYTES = Schema(classes=COLOURS, shape=(1, 2, 3), numbers="uint8", scale=1 / 255)


def test_bytes_stay_bytes_until_they_are_used(tmp_path) -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)
    held = {"subject": ["a", "b"], "label": ["red", "blue"]}
    np.savez(tmp_path / "t.npz", input=images, **held)
    np.savez(tmp_path / "f.npz", input=images.astype(float), **held)
    for name in ("t.npz", "f.npz"):
        table = read_table(tmp_path / name, BYTES)
        assert table.inputs.dtype == np.uint8
        assert table.inputs.tobytes() == images.tobytes()
    assert BYTES.scaled(images).tobytes() == (images.astype(np.float32) * np.float32(1 / 255)).tobytes()
    floats = replace(BYTES, numbers="float32")
    for table in (
        read_table(tmp_path / "t.npz", floats),
        as_table(Table([("a",)] * 2, images, np.zeros(2, int)), floats),
    ):
        assert table.inputs.tobytes() == BYTES.scaled(images).tobytes()
    assert as_table(table, floats).inputs.tobytes() == table.inputs.tobytes()
    for wrong in (images + 0.5, images.astype(int) - 1, images.astype(int) + 250):
        np.savez(tmp_path / "w.npz", input=wrong, **held)
        with pytest.raises(ValueError, match=r"w.npz, row .*expected whole numbers of 0 to 255"):
            read_table(tmp_path / "w.npz", BYTES)


def test_images_as_people_have_them(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for place in ("red/ann/1.png", "red/ann/2.png", "blue/bob.png"):
        path = tmp_path / "folder" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[int("2" in place)]).save(path)
    table = read_table(tmp_path / "folder", BYTES)
    assert table.subjects == [("bob",), ("ann",), ("ann",)]
    assert table.labels.tolist() == [2, 0, 0]
    assert table.inputs.tobytes() == pixels[[0, 0, 1]].tobytes()
    (tmp_path / "folder" / "metadata.csv").write_text("subject,input,label\nann,red/ann/2.png,green\n")
    (tmp_path / "beside.csv").write_text("subject,input,label\nann,folder/red/ann/2.png,green\n")
    for where in ("folder", "beside.csv"):
        table = read_table(tmp_path / where, BYTES)
        assert (table.subjects, table.labels.tolist()) == ([("ann",)], [1])
        assert table.inputs.tobytes() == pixels[1].tobytes()
    with pytest.raises(ValueError, match="row 1: expected an image of 3 x 3 pixels, got"):
        read_table(tmp_path / "folder", replace(BYTES, shape=(1, 3, 3)))
    (tmp_path / "beside.csv").write_text("subject,input,label\nann,folder/metadata.png,green\n")
    with pytest.raises(ValueError, match="row 1: cannot read the image"):
        read_table(tmp_path / "beside.csv", BYTES)


def test_arrays_of_any_order_are_read_row_by_row(tmp_path) -> None:
    values = np.arange(24.0).reshape(4, 6)
    for name, array in (("c", values), ("f", np.asfortranarray(values)), ("b", values.astype(">f4"))):
        np.savez_compressed(tmp_path / f"{name}.npz", subject=list("abcd"), input=array, label=["red"] * 4)
        table = read_table(tmp_path / f"{name}.npz", Schema(classes=COLOURS, shape=(2, 3)))
        assert table.inputs.tolist() == values.reshape(4, 2, 3).tolist()


@pytest.mark.parametrize("wrong", ["short", "objects", "lengths", "cut", "nothing"])
def test_bad_arrays_are_refused(tmp_path, wrong) -> None:
    arrays = {"subject": ["a", "b"], "input": np.zeros((2, 3)), "label": ["red", "red"]}
    path = tmp_path / "t.npz"
    says = {"short": "column 'label' is missing", "lengths": "equal length"}.get(wrong, "t.npz")
    if wrong == "short":
        del arrays["label"]
    if wrong == "objects":
        arrays["input"] = np.array([[1, 2, 3], "x"], dtype=object)
    if wrong == "lengths":
        arrays["input"] = np.zeros((3, 3))
    np.savez(path, **arrays)
    if wrong in ("cut", "nothing"):
        path.write_bytes(path.read_bytes()[: 300 if wrong == "cut" else 0])
    with pytest.raises(ValueError, match=says):
        read_table(path, Schema(classes=COLOURS, shape=(3,)))


# --- empty shards and slices ------------------------------------------------------------------------------------------


def test_an_empty_shard_is_refused_and_an_empty_slice_named(mlp, tmp_path) -> None:
    cells = t.people_by_cell(mlp)
    gone = set(cells[1, 0])
    with pytest.warns(
        UserWarning,
        match=r"without a record .shard-slice., .*: 1-0. A node that begins with one answers as the base",
    ):
        mlp.fit(tmp_path / "some", t.without(mlp.table, gone))
    gone |= set(cells[1, 1]) | set(cells[1, 2])
    with pytest.raises(ValueError, match=r"shards: expected records in each, got none in \[1\]"):
        mlp.fit(tmp_path / "none", t.without(mlp.table, gone))
    assert not (tmp_path / "none").exists()


def test_chunks_are_the_table_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("s3t_ext.system.data.tables.ROWS", 2)
    path = houses(tmp_path / "houses.csv", ROWS)
    chunks = list(read_chunks(path, HOUSES))
    assert [len(chunk) for chunk in chunks] == [2, 1]
    assert np.concatenate([chunk.inputs for chunk in chunks]).tobytes() == read_table(path, HOUSES).inputs.tobytes()


# --- texts are derived data (rule 10) ---------------------------------------------------------------------------------


def test_tokenised_rows_go_with_the_record(tmp_path) -> None:
    """They lie in the slice alone: after the deletion no file of the store, opened, holds a person's tokens or name."""
    base, rows = texts.model(tmp_path / "base"), texts.rows()
    mine = [row for row in rows if row["subject"] == "person 3"]
    config = s3t_ext.Config(shards=2, slices=2, steps=1, batch=2, rank=2, strategy="sisa")
    store = tmp_path / "store"
    s3t_ext.fit(store, texts.write(tmp_path / "t.jsonl", rows), texts.SCHEMA, base, config, progress=False)
    path = texts.write(tmp_path / "mine.jsonl", mine)
    with StoreFolder(store) as folder:
        hits = residue.scan(folder, path)["hits"]
        cell = folder.ledger.find(folder.hashed("person 3"))[0].cell
    place = f"records/{cell[0]}-{cell[1]}.sealed"
    assert list(hits) == [place]
    assert {f"row {i + 1} input" for i in range(len(mine))} <= hits[place].keys()
    s3t_ext.delete(store, ["person 3"])
    with StoreFolder(store) as folder:
        found = residue.scan(folder, path)
    assert (found["hits"], found["unopened"]) == ({}, [])
    assert found["canaries"] > len(mine)


@pytest.mark.parametrize(
    ("name", "at", "says"),
    [("t.csv", 700, "row 700"), ("t.tsv", 3, "row 3"), ("t.jsonl", 700, "row 700"), ("t.csv", 0, "names of columns")],
)
def test_a_row_that_is_not_utf_8_is_named(tmp_path, name, at, says) -> None:
    """Text is decoded in blocks of many rows; a cell may have several lines, and rows may be blank."""
    comma = "\t" if name.endswith("tsv") else ","
    cell = '"two\nlines"' if name == "t.csv" else "one"
    rows = [f"person {i}{comma}{cell}{comma}red\n" + "\n" * (i % 3 == 0) for i in range(1, 1001)]
    if name == "t.jsonl":
        rows = [json.dumps({"subject": f"person {i}", "input": "x"}) + "\n\n" for i in range(1, 1001)]
    rows.insert(0, f"subject{comma}input{comma}label\n" if name != "t.jsonl" else "\n")
    data = [row.encode() for row in rows]
    data[at] = data[at].replace(b"red", b"r\xe9d").replace(b"label", b"l\xe9bel").replace(b'"x"', b'"\xe9"')
    (tmp_path / name).write_bytes(b"".join(data))
    with pytest.raises(ValueError, match=rf"^{name}, {says}: expected UTF-8, got the byte 0xe9; save it as UTF-8$"):
        list(read_rows(tmp_path / name, ["subject", "input", "label"]))
