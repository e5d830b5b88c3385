"""Read a table under a declared schema and lay its records out by subject: (shard, slice) by keyed hash."""

from __future__ import annotations

import csv
import json
import secrets
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext.ledger.identity import Key, framed, normalise_subject, record_key, subject_hash
from s3t_ext.ledger.partition import place
from s3t_ext.store.records import SliceRecords
from s3t_ext.system.schema import Schema


@dataclass(frozen=True)
class Table:
    """Records in memory.

    Args:
        subjects: the people each record is about, its owner first.
        inputs: (n, *shape) float32, scaled, or uint8, scaled at use; of texts (n, max_length) int32 token ids, -1 after
            the last.
        labels: (n,) int64 indices into the schema's classes; (n, targets) float32, scaled; or (n, max_length) int64:
            the token at that position where it is part of a completion, -100 elsewhere.
    """

    subjects: list[tuple[str, ...]]
    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.subjects)

    def save(self, path: Path, schema: Schema) -> None:
        """Write as ``.npz`` that ``read_table`` reads back under the same schema."""
        owners = np.array([json.dumps(s) for s in self.subjects], dtype=np.str_)
        labels = np.array([schema.classes[i] for i in self.labels], dtype=np.str_)
        columns: dict[str, Any] = {
            schema.subject: owners,
            _input_name(schema): self.inputs / np.float32(schema.scale),
            schema.label: labels,
        }
        np.savez(path, **columns)


def as_table(table: Table | Path | str, schema: Schema) -> Table:
    """Give a table under a schema: read from its file, or, where it is in memory already, normalised and checked.

    Raises:
        ValueError: as ``read_table``.
    """
    if not isinstance(table, Table):
        return read_table(table, schema)
    if not 0 < len(table.subjects) == len(table.inputs) == len(table.labels):
        raise ValueError(
            f"table: expected as many subjects as inputs and labels, at least one, got {len(table.subjects)}, "
            f"{len(table.inputs)} and {len(table.labels)}"
        )
    unscaled = replace(schema, scale=1.0)
    subjects, inputs = [], []
    for number, (names, value, label) in enumerate(zip(table.subjects, table.inputs, table.labels, strict=True), 1):
        where = f"table, row {number}"
        if not isinstance(names, (tuple, list)):
            raise ValueError(f"{where}: expected a tuple of subjects, got {names!r:.40}")
        subjects.append(_subjects(names, where, schema))
        inputs.append(_input(value, where, unscaled))
        if not (isinstance(label, (int, np.integer)) and 0 <= label < len(schema.classes)):
            raise ValueError(f"{where}: expected a label in 0..{len(schema.classes) - 1}, got {label!r}")
    return Table(subjects, np.stack(inputs), np.asarray(table.labels, np.int64))


def read_table(path: Path | str, schema: Schema) -> Table:
    """Read a ``.csv``, ``.jsonl`` or ``.npz`` table.

    A subject that is a list (in CSV and npz: a JSON array in the cell) names several people; the first owns the record.

    Raises:
        ValueError: names the file, the row (from 1) and the column that is wrong, and what was wanted.
    """
    path = Path(path)
    readers = {".csv": _rows_csv, ".jsonl": _rows_jsonl, ".npz": _rows_npz}
    if path.suffix not in readers:
        raise ValueError(f"table: expected a file ending in {', '.join(readers)}, got {path.name!r}")
    index = {label: i for i, label in enumerate(schema.classes)}
    subjects, inputs, labels = [], [], []
    try:
        for number, (subject, value, label) in enumerate(readers[path.suffix](path, schema), 1):
            where = f"{path.name}, row {number}"
            subjects.append(_subjects(subject, where, schema))
            inputs.append(_input(value, where, schema))
            if str(label) not in index:
                raise ValueError(
                    f"{where}, column {schema.label!r}: expected one of the declared classes "
                    f"{list(schema.classes)[:12]}, got {str(label)[:40]!r}"
                )
            labels.append(index[str(label)])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"table: cannot read {path.name}: {error}") from None
    if not subjects:
        raise ValueError(f"table: expected at least one record in {path.name}, got none")
    return Table(subjects, np.stack(inputs), np.array(labels, np.int64))


def read_inputs(path: Path | str, schema: Schema) -> np.ndarray:
    """Read the inputs alone of a table, (n, *shape) float32; subject and label columns may be absent."""
    path = Path(path)
    if path.suffix == ".npz":
        values: Iterable[Any] = _load_npz(path, [_input_name(schema)])[_input_name(schema)]
    elif path.suffix == ".jsonl":
        values = (_column(row, _input_name(schema), f"{path.name}, row {i}") for i, row in _jsonl(path))
    elif path.suffix == ".csv":
        values = (row[1] for row in _rows_csv(path, schema, inputs_only=True))
    else:
        raise ValueError(f"table: expected a file ending in .csv, .jsonl, .npz, got {path.name!r}")
    rows = [_input(value, f"{path.name}, row {i}", schema) for i, value in enumerate(values, 1)]
    if not rows:
        raise ValueError(f"table: expected at least one row in {path.name}, got none")
    return np.stack(rows)


def _subjects(value: Any, where: str, schema: Schema) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # or a name that starts with a bracket
            value = json.loads(value)
    names = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(n, (str, int, np.integer)) and not isinstance(n, bool) for n in names):
        raise ValueError(
            f"{where}, column {schema.subject!r}: expected text, an integer or a list of them, got {value!r:.40}"
        )
    try:
        return tuple(normalise_subject(str(name), schema.normalise) for name in names or [""])
    except ValueError as error:
        raise ValueError(f"{where}, column {schema.subject!r}: {error}") from None


def _input(value: Any, where: str, schema: Schema) -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{where}, column {_input_name(schema)!r}: expected numbers of shape {list(schema.shape)}, "
            f"got {str(value)[:40]!r}"
        ) from None
    if array.shape != schema.shape:
        if array.ndim != 1 or array.size != np.prod(schema.shape):
            raise ValueError(
                f"{where}, column {_input_name(schema)!r}: expected {int(np.prod(schema.shape))} numbers of shape "
                f"{list(schema.shape)}, got shape {list(array.shape)}"
            )
        array = array.reshape(schema.shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}, column {_input_name(schema)!r}: expected finite numbers, got NaN or infinity")
    return array * np.float32(schema.scale)


def _input_name(schema: Schema) -> str:
    if not isinstance(schema.input, str):
        raise ValueError("schema.input: expected the name of one column")
    return schema.input


def _column(row: dict, name: str, where: str) -> Any:
    if name not in row or row[name] is None:
        raise ValueError(f"{where}: column {name!r} is missing; the columns are {sorted(map(str, row))[:8]}")
    return row[name]


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(filter(str.strip, lines), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, row {number}: expected a JSON object, got {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, row {number}: expected a JSON object, got {line[:40]!r}")
            yield number, row


def _rows_jsonl(path: Path, schema: Schema) -> Iterator[tuple[Any, Any, Any]]:
    for number, row in _jsonl(path):
        where = f"{path.name}, row {number}"
        yield tuple(_column(row, name, where) for name in (schema.subject, _input_name(schema), schema.label))


def _rows_csv(path: Path, schema: Schema, inputs_only: bool = False) -> Iterator[tuple[Any, Any, Any]]:
    csv.field_size_limit(2**31 - 1)  # an image in one cell
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        header = list(reader.fieldnames or [])
        if len(set(header)) != len(header):
            raise ValueError(f"{path.name}: expected distinct columns, got {sorted(header)[:8]}")
        prefix = _input_name(schema).removesuffix("*")
        wide = [c for c in header if c.startswith(prefix)] if _input_name(schema).endswith("*") else []
        for number, row in enumerate(reader, 1):
            where = f"{path.name}, row {number}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: expected {len(header)} cells, got another number")
            if _input_name(schema).endswith("*") and not wide:
                raise ValueError(f"{where}: no column starts with {prefix!r}; the columns are {header[:8]}")
            value = (
                _numbers(row, wide, where)
                if wide
                else _json_cell(_column(row, _input_name(schema), where), where, schema)
            )
            rest = (
                (None, None)
                if inputs_only
                else (_column(row, schema.subject, where), _column(row, schema.label, where))
            )
            yield rest[0], value, rest[1]


def _numbers(row: dict, columns: list[str], where: str) -> list[float]:
    for column in columns:
        try:
            float(row[column])
        except ValueError:
            raise ValueError(f"{where}, column {column!r}: expected a number, got {row[column][:40]!r}") from None
    return [float(row[column]) for column in columns]


def _json_cell(cell: str, where: str, schema: Schema) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        raise ValueError(
            f"{where}, column {_input_name(schema)!r}: expected a JSON array, got {cell[:40]!r}; name columns by "
            'prefix with "input": "prefix*" in the schema for one number a column'
        ) from None


def _load_npz(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise ValueError(f"{path.name}: column {missing[0]!r} is missing; the arrays are {file.files[:8]}")
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises zipfile, pickle and value errors alike for a file that is no .npz
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        raise ValueError(f"table: cannot read {path.name} as .npz: {error}") from None


def _rows_npz(path: Path, schema: Schema) -> Iterator[tuple[Any, Any, Any]]:
    arrays = _load_npz(path, [schema.subject, _input_name(schema), schema.label])
    if len({len(a) for a in arrays.values()}) != 1:
        raise ValueError(
            f"{path.name}: expected arrays of equal length, got { {name: len(a) for name, a in arrays.items()} }"
        )
    yield from zip(*arrays.values(), strict=True)


# --- layout ----------------------------------------------------------------------------------------------------------


def record_bytes(inputs: np.ndarray, label: np.ndarray | int) -> bytes:
    """Give the canonical bytes of one record's content: input and label, each with its type and shape, framed."""
    parts = []
    for array in (np.asarray(inputs), np.asarray(label)):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        parts += [array.dtype.str.encode(), struct.pack(f"<{array.ndim}Q", *array.shape), array.tobytes()]
    return framed(*parts)


@dataclass(frozen=True)
class Layout:
    """A table laid out: the records of each (shard, slice), and how many records of deleted subjects were dropped."""

    slices: dict[tuple[int, int], SliceRecords]
    dropped: int

    def keys(self) -> frozenset[bytes]:
        """Give the keys of all records."""
        return frozenset(key for records in self.slices.values() for key in records.keys)


def lay_out(table: Table, key: Key, shards: int, slices: int, deleted: Set[str] = frozenset()) -> Layout:
    """Place every record by the keyed hash of its owner; drop those of subjects in the ledger.

    Within a slice records are in the order of their keys, so the order of the table leaves no trace.
    """
    cells: dict[tuple[int, int], list[tuple[bytes, int]]] = {(s, k): [] for s in range(shards) for k in range(slices)}
    equals: Counter[tuple] = Counter()
    dropped = 0
    for i, names in enumerate(table.subjects):
        content = record_bytes(table.inputs[i], table.labels[i])
        copy = equals[names, content]
        equals[names, content] += 1
        if deleted and any(subject_hash(key, name) in deleted for name in names):
            dropped += 1
            continue
        cells[place(key, names[0], shards, slices)].append((record_key(key, names, content, copy), i))
    laid = {}
    for cell, members in cells.items():
        members.sort()
        rows = [i for _, i in members]
        laid[cell] = SliceRecords(
            table.inputs[rows],
            table.labels[rows],
            [list(table.subjects[i]) for i in rows],
            [k for k, _ in members],
            [secrets.token_bytes(16) for _ in rows],
        )
    return Layout(laid, dropped)
