"""What is declared before the first private record is read: schema, plan and training constants."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3t_ext.plan import StageTree
from s3t_ext.plan import build as build_tree
from s3t_ext.plan.cost import PLACEMENTS
from s3t_ext.plan.strategies import usual

COMBINE = ("probabilities", "logits", "vote")
ENSEMBLE = ("best", "maximal")


def _want(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {wanted}, got {got!r}")


def _from_dict(cls: type, values: object, where: str) -> Any:
    """Build a dataclass from JSON, refusing keys that it does not have."""
    _want(isinstance(values, dict), where, "a JSON object", values)
    assert isinstance(values, dict)
    names = {f.name for f in dataclasses.fields(cls)}
    unknown, required = (
        sorted(set(values) - names),
        [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ],
    )
    _want(not unknown, where, f"keys among {sorted(names)}", unknown)
    missing = sorted(set(required) - set(values))
    _want(not missing, where, f"the keys {required}", f"no {', '.join(missing)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Schema:
    """How a table is read. Classes, shape and scaling are declared, never inferred from records.

    Args:
        classes: the labels, in the order of the head's outputs.
        shape: of one input, as the model takes it.
        subject, input, label: names of the columns. In a CSV ``input`` is one column with a JSON array, or
            ``"input*"`` stands for all columns with that prefix in the order of the file.
        scale: every input value is multiplied by it.
        normalise: the rule for subjects, ``nfkc-casefold`` or ``exact``.
        public_classes: the labels of a declared public part, where they are others.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    subject: str = "subject"
    input: str = "input"
    label: str = "label"
    scale: float = 1.0
    normalise: str = "nfkc-casefold"
    public_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("classes", "public_classes"):
            labels = getattr(self, name)
            listed = isinstance(labels, (list, tuple)) and all(isinstance(c, (str, int)) for c in labels)
            _want(listed, f"schema.{name}", "a list of labels", labels)
            object.__setattr__(self, name, tuple(str(c) for c in getattr(self, name)))
        _want(
            len(self.classes) >= 2 and len(set(self.classes)) == len(self.classes),
            "schema.classes",
            "at least two distinct labels",
            list(self.classes),
        )
        _want(
            isinstance(self.shape, tuple) and len(self.shape) > 0 and all(type(s) is int and s > 0 for s in self.shape),
            "schema.shape",
            "positive integers",
            self.shape,
        )
        _want(
            isinstance(self.scale, (int, float)) and math.isfinite(self.scale) and self.scale != 0,
            "schema.scale",
            "a finite number other than 0",
            self.scale,
        )
        names = (self.subject, self.input, self.label)
        _want(all(isinstance(n, str) and n for n in names) and len(set(names)) == 3, "schema", "three columns", names)
        _want(
            self.normalise in ("nfkc-casefold", "exact"),
            "schema.normalise",
            "'nfkc-casefold' or 'exact'",
            self.normalise,
        )

    @classmethod
    def from_dict(cls, values: dict) -> Schema:
        """Build from the JSON object that a store holds."""
        return _from_dict(cls, values, "schema")

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read a schema from a JSON file."""
        try:
            return _from_dict(cls, json.loads(Path(path).read_text(encoding="utf-8-sig")), "schema")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"schema: expected JSON in {path}, got {error}") from None


@dataclass(frozen=True)
class Config:
    """Plan, adapters and the step rule of a store.

    Args:
        shards, slices: m and L; ``strategy``, ``budget``: which stage tree, see ``s3t_ext.plan``;
            no strategy: ``subsets`` to 6 slices, else ``rotation``.
        placement: ``stack`` or ``layers``; ``targets``: which layers, see ``s3t_ext.lora.nn.matches``.
        rank, scale: r and alpha / r; ``lr``: peak learning rate (warm-up over the first tenth, then cosine to zero).
        steps: per stage, a constant; ``batch``: records per step.
        dropout: probability with which an adapter in training does not see an element of its input.
        combine: of the shards' answers: mean of ``probabilities`` or of ``logits``, or ``vote``.
        ensemble: what answers: the ``best`` (deepest) live node of each shard, or all ``maximal`` ones, those that no
            live node continues.
    """

    shards: int = 5
    slices: int = 4
    strategy: str = ""
    budget: int | None = None
    placement: str = "stack"
    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 8
    scale: float = 2.0
    lr: float = 1e-2
    weight_decay: float = 0.0
    dropout: float = 0.0
    steps: int = 116
    batch: int = 16
    combine: str = "probabilities"
    ensemble: str = "best"

    def __post_init__(self) -> None:
        for name in ("shards", "slices", "rank", "steps", "batch"):
            value = getattr(self, name)
            _want(isinstance(value, int) and value >= 1, name, "an integer of at least 1", value)
        for name in ("scale", "lr", "weight_decay", "dropout"):
            value = getattr(self, name)
            _want(isinstance(value, (int, float)) and math.isfinite(value), name, "a finite number", value)
        for name in ("scale", "lr"):
            _want(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        _want(self.weight_decay >= 0, "weight_decay", "a number of at least 0", self.weight_decay)
        _want(0 <= self.dropout < 1, "dropout", "a probability of at least 0 and below 1", self.dropout)
        _want(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        _want(self.combine in COMBINE, "combine", f"one of {COMBINE}", self.combine)
        _want(self.ensemble in ENSEMBLE, "ensemble", f"one of {ENSEMBLE}", self.ensemble)
        if not self.strategy:
            object.__setattr__(self, "strategy", usual(self.slices, self.budget))
        self.tree()

    def tree(self) -> StageTree:
        """Build the stage tree, the same for every shard."""
        return build_tree(self.strategy, self.slices, self.budget)

    def identity(self) -> dict[str, Any]:
        """List what shapes a node's weights: neither which other nodes are planned, nor how answers combine."""
        outside = {"combine", "ensemble", "strategy", "budget"}
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items() if k not in outside
        }

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Build from the JSON object that a store holds."""
        return _from_dict(cls, values, "config")
