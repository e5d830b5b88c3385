"""Read tables under a declared schema: records in memory, in chunks or as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext.system.data.formats import Row, read_rows
from s3t_ext.system.data.reader import INPUT, LABEL, SUBJECT, Reader
from s3t_ext.system.data.schema import Schema

CHUNK = 1 << 20  # bytes of inputs and labels that are read at a time
ROWS = 4096  # and rows at most


@dataclass(frozen=True)
class Table:
    """Records in memory.

    Args:
        subjects: the people each record is about, its owner first.
        inputs: (n, *shape) float32, scaled, or uint8, to be scaled; of texts (n, max_length) int32 token ids, -1 after
            the last. Where a table is given to ``fit`` and the like, texts may also be as they are: n strings.
        labels: (n,) int64 indices into the schema's classes; (n, targets) float32, scaled; or (n, max_length) int64:
            the token at that position where it is part of a completion, -100 elsewhere (or n strings, as given).
    """

    subjects: list[tuple[str, ...]]
    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.subjects)

    def save(self, path: Path, schema: Schema) -> None:
        """Write as ``.npz`` that ``read_table`` reads back under the same schema.

        Raises:
            ValueError: texts, or inputs from several columns, which a table in memory no longer has.
        """
        if schema.is_text or not isinstance(schema.input, str):
            raise ValueError("schema.input: expected one column of numbers; keep other tables as they were read")
        raw = self.inputs if self.inputs.dtype == np.uint8 else self.inputs / np.float32(schema.scale)
        columns: dict[str, Any] = {schema.subject: np.array([json.dumps(s) for s in self.subjects], dtype=np.str_)}
        columns[schema.input] = raw
        if schema.targets:
            columns |= {
                t.column: column for t, column in zip(schema.targets, schema.values(self.labels).T, strict=True)
            }
        else:
            columns[schema.label] = np.array([schema.classes[i] for i in self.labels], dtype=np.str_)
        np.savez(path, **columns)


def read_chunks(
    table: Table | Path | str, schema: Schema, base: Path | str | None = None, vocabulary: int = 0
) -> Iterator[Table]:
    """Read a table piece by piece, once.

    A subject that is a list (in CSV and npz: a JSON array in the cell) names several people; the first owns the record.

    Args:
        table: in memory, where it is normalised and checked, or a file or folder; see ``formats.read_rows``.
        base: folder of the base model, whose tokenizer reads texts; tables of numbers, or of token ids, need none.
        vocabulary: of the base model: every token id must be below it; 0: any.

    Raises:
        ValueError: names the file, the row (from 1) and the column that is wrong, and what was wanted.
    """
    reader = Reader(schema, base)
    if isinstance(table, Table):
        chunks = map(reader.held, _chunked(_held(table), schema, "the table"))
    else:
        columns = [schema.subject, *reader.columns, *reader.labels]
        rows = read_rows(Path(table), columns, reader.image)
        chunks = map(reader.records, _chunked(rows, schema, Path(table).name))
    for subjects, inputs, labels in chunks:
        if 0 < vocabulary <= inputs.max():
            raise ValueError(
                f"base: expected token ids below the model's {vocabulary}, got {inputs.max()} from the table: "
                "the tokenizer is another model's"
            )
        yield Table(subjects, inputs, labels)


def check_first_row(path: Path | str, schema: Schema, inputs: bool = False) -> None:
    """Refuse a file that is missing, or of no form that is read; it loads no tokenizer and takes no time.

    Args:
        inputs: other columns may be absent.

    Raises:
        ValueError, OSError: as ``read_chunks``.
    """
    reader = Reader(schema)
    columns = reader.columns if inputs else [schema.subject, *reader.columns, *reader.labels]
    next(read_rows(Path(path), columns, reader.image), None)


def as_table(table: Table | Path | str, schema: Schema, base: Path | str | None = None) -> Table:
    """Give a whole table under a schema: read from its file, or, where it is in memory already, normalised and checked.

    Raises:
        ValueError: as ``read_chunks``.
    """
    return join(list(read_chunks(table, schema, base)))


def read_table(path: Path | str, schema: Schema, base: Path | str | None = None) -> Table:
    """Read a whole table from its file; see ``read_chunks``."""
    return as_table(path, schema, base)


def read_inputs(path: Path | str, schema: Schema, base: Path | str | None = None) -> np.ndarray:
    """Read the inputs alone of a table, (n, *shape) or (n, max_length); its other columns may be absent."""
    return np.concatenate(list(input_chunks(path, schema, base)))


def input_chunks(path: Path | str, schema: Schema, base: Path | str | None = None) -> Iterator[np.ndarray]:
    """Read the inputs alone of a table, piece by piece; see ``read_inputs``."""
    reader = Reader(schema, base)
    rows = read_rows(Path(path), reader.columns, reader.image)
    yield from map(reader.inputs, _chunked(rows, schema, Path(path).name))


def join(tables: Sequence[Table]) -> Table:
    """Give one table of several, in their order."""
    subjects = [names for table in tables for names in table.subjects]
    inputs, labels = (np.concatenate([getattr(table, part) for table in tables]) for part in ("inputs", "labels"))
    return Table(subjects, inputs, labels)


def _chunked(rows: Iterable[Row], schema: Schema, name: str) -> Iterator[list[Row]]:
    size = 12 * schema.max_length or int(np.prod(schema.shape)) * (1 if schema.numbers == "uint8" else 4)
    rows, count = iter(rows), 0
    while chunk := list(islice(rows, max(1, min(ROWS, CHUNK // size)))):
        count += len(chunk)
        yield chunk
    if not count:
        raise ValueError(f"table: expected at least one record in {name}, got none")


def _held(table: Table) -> Iterator[Row]:
    """Give the rows of a table in memory."""
    lengths = len(table.subjects), len(table.inputs), len(table.labels)
    if len(set(lengths)) != 1:
        raise ValueError(f"table: expected as many subjects as inputs and labels, got {lengths}")
    for i, names in enumerate(table.subjects):
        yield Row(f"table, row {i + 1}", {SUBJECT: names, INPUT: table.inputs[i], LABEL: table.labels[i]})
