"""How a table is read: task, columns, classes, lengths and scaling, all declared before the first private record."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np  # loaded where it is used: this module is read before any command runs

TASKS = ("classification", "regression", "causal")
NUMBERS = ("float32", "uint8")
IGNORED = -100  # a label at which no loss is taken
PADDING = -1  # no token: what fills a text's row up to the declared length


def want(ok: bool, name: str, wanted: str, got: object) -> None:
    """Raise ValueError naming an argument, what is wanted and what came, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {wanted}, got {got!r}")


def from_json(cls: type, values: object, where: str) -> Any:
    """Build a dataclass from a JSON object, refusing keys that it does not have."""
    want(isinstance(values, dict), where, "a JSON object", values)
    assert isinstance(values, dict)
    names = {f.name for f in dataclasses.fields(cls)}
    missing_is_error = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    unknown = sorted(set(values) - names)
    want(not unknown, where, f"keys among {sorted(names)}", unknown)
    missing = sorted(set(missing_is_error) - set(values))
    want(not missing, where, f"the keys {missing_is_error}", f"no {', '.join(missing)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _finite(value: object, name: str, wanted: str = "a finite number", nonzero: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    want(ok and not (nonzero and value == 0), name, wanted, value)


@dataclass(frozen=True)
class Column:
    """A column of numbers, or of words that stand for numbers; what enters is ``(value - offset) * scale``.

    Args:
        column: its name.
        offset, scale: declared, from public knowledge; never fitted to records.
        values: words that the column may hold; each becomes a number of its own, 1 where it stands and 0 elsewhere.
        blank: the value of an empty cell, a null or a NaN; None: the schema's.
    """

    column: str
    offset: float = 0.0
    scale: float = 1.0
    values: tuple[str, ...] = ()
    blank: float | None = None

    def __post_init__(self) -> None:
        want(isinstance(self.column, str) and self.column != "", "schema: column", "a name", self.column)
        where = f"schema: column {self.column!r}"
        _finite(self.offset, f"{where}: offset")
        _finite(self.scale, f"{where}: scale", "a finite number other than 0", nonzero=True)
        if self.blank is not None:
            _finite(self.blank, f"{where}: blank")
        _labels(self, "values", where)
        want(len(self.values) != 1 and len(set(self.values)) == len(self.values), where, "distinct words", self.values)
        plain = (self.offset, self.scale, self.blank) == (0.0, 1.0, None)
        want(plain or not self.values, where, "words or numbers, not offset, scale or blank with words", self.values)

    @property
    def width(self) -> int:
        """Of the numbers that it becomes."""
        return len(self.values) or 1


def _labels(owner: Any, name: str, where: str) -> None:
    labels = getattr(owner, name)
    listed = isinstance(labels, (list, tuple)) and all(isinstance(c, (str, int)) for c in labels)
    want(listed, where, "a list of labels", labels)
    object.__setattr__(owner, name, tuple(str(c) for c in labels))


def _columns(values: object, where: str) -> tuple[Column, ...]:
    want(isinstance(values, (list, tuple)), where, "a list of columns", values)
    assert isinstance(values, (list, tuple))
    return tuple(
        v if isinstance(v, Column) else Column(v) if isinstance(v, str) else from_json(Column, v, where) for v in values
    )


@dataclass(frozen=True)
class Schema:
    """How a table is read. Task, classes, shape, lengths and scaling are declared, never inferred from records.

    Args:
        classes: of a classification: the labels, in the order of the head's outputs.
        shape: of one input of numbers, as the model takes it. Texts have none.
        subject, input, label: names of the columns. In a CSV ``input`` is one column with a JSON array, or
            ``"input*"`` stands for all columns with that prefix in the order of the file, or it is a list of columns,
            each a name or a `Column`. For ``causal`` it is the prompt, and ``label`` the completion; they are joined as
            they are, so a space between them belongs to one of the two.
        scale: every input value is multiplied by it.
        normalise: the rule for subjects, ``nfkc-casefold`` or ``exact``.
        public_classes: the labels of a declared public part, where they are others.
        task: ``classification``, ``regression`` or ``causal`` (a language model that goes on with a prompt).
        targets: of a regression: the columns that the outputs stand for, with declared offset and scale.
        max_length: tokens of a text, special ones included; more are cut off. Above 0 the input is a text.
        blank: the value of an empty cell, a null or a NaN among the inputs; None: they are refused.
        numbers: how inputs are held, ``float32`` (scaled) or ``uint8`` (whole numbers of 0 to 255, scaled at use).
    """

    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    subject: str = "subject"
    input: str | tuple[Column, ...] = "input"
    label: str = "label"
    scale: float = 1.0
    normalise: str = "nfkc-casefold"
    public_classes: tuple[str, ...] = ()
    task: str = "classification"
    targets: tuple[Column, ...] = ()
    max_length: int = 0
    blank: float | None = None
    numbers: str = "float32"

    def __post_init__(self) -> None:
        want(self.task in TASKS, "schema.task", f"one of {TASKS}", self.task)
        for name in ("classes", "public_classes"):
            _labels(self, name, f"schema.{name}")
        object.__setattr__(self, "targets", _columns(self.targets, "schema.targets"))
        if not isinstance(self.input, str):
            object.__setattr__(self, "input", _columns(self.input, "schema.input"))
        want(type(self.max_length) is int and self.max_length >= 0, "schema.max_length", "tokens", self.max_length)
        self._check_labels()
        self._check_inputs()
        self._check_names()
        rules = ("nfkc-casefold", "exact")
        want(self.normalise in rules, "schema.normalise", "'nfkc-casefold' or 'exact'", self.normalise)

    def _check_labels(self) -> None:
        classes, targets = list(self.classes), [target.column for target in self.targets]
        if self.task == "classification":
            ok = len(classes) >= 2 and len(set(classes)) == len(classes)
            want(ok, "schema.classes", "at least two distinct labels", classes)
        else:
            want(not classes, "schema.classes", f"none for the task {self.task!r}", classes)
        if self.task == "regression":
            want(len(targets) > 0, "schema.targets", "at least one column for the task 'regression'", targets)
            for target in self.targets:
                ok = not target.values and target.blank is None
                want(ok, "schema.targets", "numbers without blanks", target)
        else:
            want(not targets, "schema.targets", f"none for the task {self.task!r}", targets)
        want(self.task != "causal" or self.is_text, "schema.max_length", "tokens for the task 'causal'", 0)

    def _check_inputs(self) -> None:
        if self.is_text:
            plain = (self.shape, self.scale, self.blank, self.numbers) == ((), 1.0, None, "float32")
            plain = plain and isinstance(self.input, str) and not self.input.endswith("*")
            want(
                plain, "schema.max_length", "0 with shape, scale, blank, numbers or columns of inputs", self.max_length
            )
            want(self.max_length >= 2, "schema.max_length", "at least 2 tokens for a text", self.max_length)
            return
        whole = isinstance(self.shape, tuple) and all(type(s) is int and s > 0 for s in self.shape)
        want(whole and len(self.shape) > 0, "schema.shape", "positive integers", self.shape)
        _finite(self.scale, "schema.scale", "a finite number other than 0", nonzero=True)
        want(self.numbers in NUMBERS, "schema.numbers", f"one of {NUMBERS}", self.numbers)
        if self.blank is not None:
            _finite(self.blank, "schema.blank")
        if isinstance(self.input, tuple):
            width = sum(column.width for column in self.input)
            want(math.prod(self.shape) == width, "schema.shape", f"{width} numbers, as its columns have", self.shape)
            want(self.numbers == "float32", "schema.numbers", "'float32' where columns are listed", self.numbers)
        ok = self.blank is None or self.numbers == "float32" or float(self.blank) in range(256)
        want(ok, "schema.blank", "a whole number of 0 to 255 where numbers are uint8", self.blank)

    def _check_names(self) -> None:
        inputs = [self.input] if isinstance(self.input, str) else [column.column for column in self.input]
        labels = [target.column for target in self.targets] or [self.label]
        names = [self.subject, *inputs, *labels]
        ok = all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)
        want(ok, "schema", "distinct columns", names)

    @property
    def is_text(self) -> bool:
        """Whether an input is a text: a row of token ids (max_length,), filled up with -1."""
        return self.max_length > 0

    @property
    def outputs(self) -> int:
        """How many numbers a head gives: one a class or target; 0: the base's own output layer."""
        return len(self.classes) or len(self.targets)

    def scaled(self, inputs: np.ndarray) -> np.ndarray:
        """Give inputs as the model takes them: uint8 times ``scale`` in float32; anything else is so already."""
        import numpy as np

        return inputs.astype(np.float32) * np.float32(self.scale) if inputs.dtype == np.uint8 else inputs

    def values(self, outputs: np.ndarray) -> np.ndarray:
        """Give a regression's outputs (n, targets) in its columns' units: ``output / scale + offset``, float64."""
        import numpy as np

        scale, offset = (np.array([getattr(t, name) for t in self.targets], np.float64) for name in ("scale", "offset"))
        return np.asarray(outputs, np.float64) / scale + offset  # (n, targets)

    @classmethod
    def from_dict(cls, values: dict) -> Schema:
        """Build from the JSON object that a store holds."""
        return from_json(cls, values, "schema")

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read a schema from a JSON file."""
        try:
            return from_json(cls, json.loads(Path(path).read_text(encoding="utf-8-sig")), "schema")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"schema: expected JSON in {path}, got {error}") from None
