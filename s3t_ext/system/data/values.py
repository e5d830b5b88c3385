"""Single values of a table, each held against what a schema declares: people, numbers, words, texts, token ids."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np

from s3t_ext.ledger.identity import normalise_subject
from s3t_ext.system.data.formats import Row
from s3t_ext.system.data.schema import PADDING, Column, Schema

LARGEST = float(np.finfo(np.float32).max)


def value(row: Row, column: str) -> Any:
    """Give what a row has in a column, as it is; raise ValueError where it has no such column, or nothing in it."""
    if row.values.get(column) is None:
        there = sorted(map(str, row.values))[:8]
        raise ValueError(f"{row.where}: column {column!r} is missing; the columns are {there}")
    return row.values[column]


def subjects(given: Any, where: str, schema: Schema) -> tuple[str, ...]:
    """Give the people a record is about, in normal form, its owner first."""
    if isinstance(given, str) and given.startswith("["):
        with suppress(json.JSONDecodeError):  # or a name that starts with a bracket
            given = json.loads(given)
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(n, (str, int, np.integer)) and not isinstance(n, bool) for n in names):
        raise ValueError(
            f"{where}, column {schema.subject!r}: expected text, an integer or a list of them, got {given!r:.40}"
        )
    try:
        return tuple(normalise_subject(str(name), schema.normalise) for name in names or [""])
    except ValueError as error:
        raise ValueError(f"{where}, column {schema.subject!r}: {error}") from None


def text(row: Row, column: str) -> str:
    """Give the text in a column of a row."""
    given = value(row, column)
    if not isinstance(given, str):
        raise ValueError(f"{row.where}, column {column!r}: expected text, got {given!r:.40}")
    return str(given)


def number(given: Any, column: str, where: str, blank: float | None = None) -> float:
    """Give the finite number in a cell; an empty one, a null or a NaN is ``blank``, and refused where that is None."""
    empty = given is None or (isinstance(given, str) and not given.strip())
    with suppress(TypeError, ValueError, OverflowError):
        found = math.nan if empty else float(given)
        if math.isnan(found) and blank is not None:
            return float(blank)
        if math.isfinite(found) and not isinstance(given, (bool, np.bool_)):
            return found
    told = "a blank; declare `blank` in the schema to fill it" if empty and blank is None else f"{given!r:.40}"
    raise ValueError(f"{where}, column {column!r}: expected a finite number, got {told}")


def scaled(given: Any, column: Column, where: str, blank: float | None = None) -> float:
    """Give ``(value - offset) * scale`` of the number in a cell."""
    found = (number(given, column.column, where, blank) - column.offset) * column.scale
    if not abs(found) <= LARGEST:
        raise ValueError(f"{where}, column {column.column!r}: expected a number that float32 holds, got {given!r:.40}")
    return found


def declared(given: Any, column: Column, where: str, schema: Schema) -> list[float]:
    """Give the numbers that a cell of a declared column stands for, scaled."""
    if column.values:
        if str(given) not in column.values:
            raise ValueError(
                f"{where}, column {column.column!r}: expected one of {list(column.values)[:12]}, got {given!r:.40}"
            )
        return [float(str(given) == word) for word in column.values]
    return [scaled(given, column, where, schema.blank if column.blank is None else column.blank)]


def array(cell: str, where: str, schema: Schema) -> Any:
    """Give what a JSON array in a cell holds."""
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        raise ValueError(
            f"{where}, column {schema.input!r}: expected numbers in a JSON array, got {cell[:40]!r}; name columns by "
            'prefix with "input": "prefix*" in the schema for one number a column'
        ) from None


def numbers(given: Any, where: str, schema: Schema, blank: float | None = None) -> np.ndarray:
    """Give an array of the declared shape, float32 or uint8, not scaled yet."""
    name = schema.input if isinstance(schema.input, str) else schema.input[0].column
    shape = list(schema.shape)
    if blank is not None:
        given = _filled(given, blank)
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError
        with np.errstate(over="ignore", invalid="ignore"):
            held = array.astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{where}, column {name!r}: expected numbers of shape {shape}, got {str(given)[:40]!r}"
        ) from None
    if held.shape != schema.shape:
        if held.ndim != 1 or held.size != math.prod(shape):
            raise ValueError(
                f"{where}, column {name!r}: expected {math.prod(shape)} numbers of shape {shape}, "
                f"got shape {list(held.shape)}"
            )
        array, held = array.reshape(schema.shape), held.reshape(schema.shape)
    if not np.isfinite(held).all():
        raise ValueError(f"{where}, column {name!r}: expected finite numbers, got NaN or infinity")
    if schema.numbers == "uint8":
        held = held.astype(np.uint8) if held.min() >= 0 and held.max() <= 255 else np.zeros((), np.uint8)
        if not np.array_equal(held, array):
            raise ValueError(f"{where}, column {name!r}: expected whole numbers of 0 to 255, as the schema declares")
    return held


def _filled(given: Any, blank: float) -> Any:
    """Put the declared constant in the place of every null and NaN."""
    if isinstance(given, (list, tuple)):
        return [_filled(item, blank) for item in given]
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        return np.where(np.isnan(given), np.asarray(blank, given.dtype), given)
    return blank if given is None or (isinstance(given, float) and math.isnan(given)) else given


def ids(given: Any, where: str, schema: Schema) -> np.ndarray:
    """Give a text's row of token ids (max_length,) int32 that is one already: -1 after the last token alone."""
    row = np.asarray(given)
    length = int((row >= 0).sum()) if row.dtype.kind in "iu" else 0
    if row.shape != (schema.max_length,) or not length or not ((row >= 0) == (np.arange(len(row)) < length)).all():
        raise ValueError(
            f"{where}: expected a text, or {schema.max_length} token ids with {PADDING} after the last, got "
            f"{given!r:.40}"
        )
    return row.astype(np.int32)  # (max_length,)
