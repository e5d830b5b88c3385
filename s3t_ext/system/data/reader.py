"""Rows of a table to arrays, as a schema declares. What a row becomes depends on no other row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s3t_ext.system.data import values
from s3t_ext.system.data.formats import Row, read_image
from s3t_ext.system.data.schema import IGNORED, PADDING, Schema

if TYPE_CHECKING:
    from s3t_ext.models.tokens import TextTokenizer

SUBJECT, INPUT, LABEL = "subject", "input", "label"  # the columns of a table in memory


class Reader:
    """Turn rows into subjects, inputs and labels.

    Args:
        base: folder of the base model; wanted for texts, whose tokens are those of its tokenizer.

    Attributes:
        columns: of the inputs; ``labels``: of the labels; ``image``: the one that may name files of images.
    """

    def __init__(self, schema: Schema, base: Path | str | None = None) -> None:
        self.schema = schema
        self.columns = [schema.input] if isinstance(schema.input, str) else [c.column for c in schema.input]
        self.labels = [target.column for target in schema.targets] or [schema.label]
        self.image = self.columns[0] if not schema.is_text and len(schema.shape) == 3 else None
        self._base = base

    def records(self, rows: Sequence[Row]) -> tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]:
        """Give subjects, inputs and labels of rows of a file."""
        schema = self.schema
        people = [values.subjects(values.value(row, schema.subject), row.where, schema) for row in rows]
        if schema.task == "causal":
            return people, *self._completed(rows, self.columns[0], schema.label)
        return people, self.inputs(rows), np.stack([self._label(row) for row in rows])

    def inputs(self, rows: Sequence[Row]) -> np.ndarray:
        """Give the inputs of rows of a file, scaled as far as they are where they lie."""
        schema = self.schema
        if schema.is_text:
            return self._texts(rows, self.columns[0])
        stacked = np.stack([self._numbers(row) for row in rows])  # (n, *shape)
        done = schema.numbers == "uint8" or not isinstance(schema.input, str)
        return stacked if done else stacked * np.float32(schema.scale)

    def _numbers(self, row: Row) -> np.ndarray:
        schema = self.schema
        if not isinstance(schema.input, str):
            listed: list[float] = []
            for column in schema.input:
                if column.column not in row.values:
                    values.value(row, column.column)
                listed += values.declared(row.values[column.column], column, row.where, schema)
            return values.numbers(np.array(listed), row.where, schema)
        if schema.input.endswith("*"):
            wide = [name for name in row.values if name.startswith(schema.input[:-1])]
            if not wide:
                there = sorted(map(str, row.values))[:8]
                raise ValueError(f"{row.where}: no column starts with {schema.input[:-1]!r}; the columns are {there}")
            given: Any = [values.number(row.values[name], name, row.where, schema.blank) for name in wide]
        else:
            given = values.value(row, schema.input)
        if isinstance(given, Path):
            given = read_image(given, schema.shape, row.where)
        elif isinstance(given, str):
            given = values.array(given, row.where, schema)
        return values.numbers(given, row.where, schema, schema.blank)

    def _label(self, row: Row) -> np.ndarray:
        schema = self.schema
        if schema.targets:
            told = [values.scaled(values.value(row, t.column), t, row.where) for t in schema.targets]
            return np.array(told).astype(np.float32)  # (targets,)
        label = str(values.value(row, schema.label))
        if label not in schema.classes:
            raise ValueError(
                f"{row.where}, column {schema.label!r}: expected one of the declared classes "
                f"{list(schema.classes)[:12]}, got {label[:40]!r}"
            )
        return np.array(schema.classes.index(label), np.int64)

    # Texts

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        from s3t_ext.models.tokens import tokenizer

        if self._base is None:
            raise ValueError("base: expected the folder of the base model, whose tokenizer reads texts, got none")
        return tokenizer(self._base)

    @cached_property
    def _end(self) -> int:
        if self._tokenizer.end is None:
            raise ValueError(f"tokenizer: expected one with a token that ends a text in {self._base}, got none")
        return self._tokenizer.end

    def _encode(self, texts: list[str], special: bool = True) -> list[list[int]]:
        return self._tokenizer.encode(texts, self.schema.max_length, special)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Give the token ids (n, max_length) of texts, -1 after the last of each."""
        rows = [Row(f"inputs, row {i}", {self.columns[0]: text}) for i, text in enumerate(texts, 1)]
        return self._texts(rows, self.columns[0])

    def _texts(self, rows: Sequence[Row], column: str) -> np.ndarray:
        found = self._encode([values.text(row, column) for row in rows])
        for row, ids in zip(rows, found, strict=True):
            if not ids:
                raise ValueError(f"{row.where}, column {column!r}: expected some text, got none")
        return self._padded(found, PADDING).astype(np.int32)

    def _padded(self, rows: list[list[int]], filler: int) -> np.ndarray:
        held = np.full((len(rows), self.schema.max_length), filler, np.int64)  # (n, max_length)
        for i, row in enumerate(rows):
            held[i, : len(row)] = row
        return held

    def _completed(self, rows: Sequence[Row], prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """Give inputs and labels of prompts, each with its completion and the token that ends it, cut at the length."""
        longest = self.schema.max_length
        inputs, labels = [], []
        prompts = self._encode([values.text(row, prompt) for row in rows])
        completions = self._encode([values.text(row, completion) for row in rows], special=False)
        for row, first, then in zip(rows, prompts, completions, strict=True):
            if not 0 < len(first) < longest:
                raise ValueError(
                    f"{row.where}, column {prompt!r}: expected a prompt of 1 to {longest - 1} tokens "
                    f"(schema.max_length: {longest}, completion included), got {len(first)} or more"
                )
            whole = [*first, *then, self._end][:longest]
            inputs.append(whole)
            labels.append([*[IGNORED] * len(first), *whole[len(first) :]])
        return self._padded(inputs, PADDING).astype(np.int32), self._padded(labels, IGNORED)

    # In memory: floats are scaled already, bytes are not; texts are strings or token ids

    def held(self, rows: Sequence[Row]) -> tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]:
        """Give subjects, inputs and labels of rows of a table in memory."""
        for row in rows:
            if not isinstance(row.values[SUBJECT], (tuple, list)):
                raise ValueError(f"{row.where}: expected a tuple of subjects, got {row.values[SUBJECT]!r:.40}")
        people = [values.subjects(row.values[SUBJECT], row.where, self.schema) for row in rows]
        words = self.schema.is_text and isinstance(rows[0].values[INPUT], str)
        if words and self.schema.task == "causal":
            return people, *self._completed(rows, INPUT, LABEL)
        label = np.stack([self._held_label(row) for row in rows])
        if words:
            return people, self._texts(rows, INPUT), label
        return people, np.stack([self._held_input(row) for row in rows]), label

    def _held_input(self, row: Row) -> np.ndarray:
        given = row.values[INPUT]
        if self.schema.is_text:
            return values.ids(given, row.where, self.schema)
        if self.schema.numbers == "float32" and isinstance(given, np.ndarray):
            given = self.schema.scaled(given)  # bytes are not scaled yet, wherever they are
        return values.numbers(given, row.where, self.schema)

    def _held_label(self, row: Row) -> np.ndarray:
        schema, label = self.schema, np.asarray(row.values[LABEL])
        if schema.targets:
            label = label.reshape(-1) if label.ndim == 0 else label
            if label.shape != (len(schema.targets),) or label.dtype.kind not in "iuf" or not np.isfinite(label).all():
                raise ValueError(
                    f"{row.where}: expected {len(schema.targets)} finite numbers, scaled, got {label!r:.40}"
                )
            return label.astype(np.float32)  # (targets,)
        if schema.task == "causal":
            tokens = np.asarray(row.values[INPUT])
            counted = label != IGNORED
            if label.shape != tokens.shape or not counted.any() or not np.array_equal(label[counted], tokens[counted]):
                raise ValueError(
                    f"{row.where}: expected {IGNORED}, or the input's token, a position, got {label!r:.40}"
                )
            return label.astype(np.int64)  # (max_length,)
        if label.shape != () or label.dtype.kind not in "iu" or not 0 <= label < len(schema.classes):
            raise ValueError(f"{row.where}: expected a label in 0..{len(schema.classes) - 1}, got {label!r:.40}")
        return label.astype(np.int64)
