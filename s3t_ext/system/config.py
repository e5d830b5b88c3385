"""What is declared before the first private record is read, beside the schema: plan and training constants."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from s3t_ext.plan import StageTree
from s3t_ext.plan import build as build_tree
from s3t_ext.plan.cost import PLACEMENTS
from s3t_ext.plan.strategies import usual
from s3t_ext.system.data.schema import Schema, from_json, want

COMBINE = ("probabilities", "logits", "vote")
ENSEMBLE = ("best", "maximal")
HEADS = ("frozen", "trained", "base")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Plan, adapters and the step rule of a store.

    Args:
        shards, slices: m and L; ``strategy``, ``budget``: which stage tree, see ``s3t_ext.plan``;
            no strategy: ``subsets`` to 6 slices, else ``rotation``.
        placement: ``stack`` or ``layers``; ``targets``: which layers, see ``s3t_ext.lora.nn.matches``.
        rank, scale: r and alpha / r; ``lr``: peak learning rate (warm-up over the first tenth, then cosine to zero).
        steps: per stage, one constant, or one for each depth from 1 to L; ``batch``: records per step.
        accumulate: forward passes that a step's batch is divided in, a divisor of it.
        clip: greatest norm of a node's gradient in a step, 0: any.
        dropout: probability with which an adapter in training does not see an element of its input.
        head: ``frozen``, ``trained`` or ``base``, see ``s3t_ext.models.heads``; empty: the rule there.
        precision: of the base and its activations, ``float32`` or ``bfloat16``; what is trained is in float32.
        combine: of the shards' answers: mean of ``probabilities`` or of ``logits``, or ``vote``; of a regression their
            mean, whichever of the first two is said.
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
    steps: int | tuple[int, ...] = 116
    batch: int = 16
    accumulate: int = 1
    clip: float = 0.0
    head: str = ""
    precision: str = "float32"
    combine: str = "probabilities"
    ensemble: str = "best"

    def __post_init__(self) -> None:
        for name in ("shards", "slices", "rank", "batch", "accumulate"):
            value = getattr(self, name)
            want(isinstance(value, int) and value >= 1, name, "an integer of at least 1", value)
        each = self.steps if isinstance(self.steps, tuple) else (self.steps,) * self.slices
        ok = len(each) == self.slices and all(type(n) is int and n >= 1 for n in each)
        want(ok, "steps", f"an integer of at least 1, or {self.slices} of them, one for each depth", self.steps)
        want(self.batch % self.accumulate == 0, "accumulate", f"a divisor of batch ({self.batch})", self.accumulate)
        for name in ("scale", "lr", "weight_decay", "dropout", "clip"):
            value = getattr(self, name)
            want(isinstance(value, (int, float)) and math.isfinite(value), name, "a finite number", value)
        for name in ("scale", "lr"):
            want(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("weight_decay", "clip"):
            want(getattr(self, name) >= 0, name, "a number of at least 0", getattr(self, name))
        want(0 <= self.dropout < 1, "dropout", "a probability of at least 0 and below 1", self.dropout)
        want(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        want(self.combine in COMBINE, "combine", f"one of {COMBINE}", self.combine)
        want(self.ensemble in ENSEMBLE, "ensemble", f"one of {ENSEMBLE}", self.ensemble)
        want(self.head in ("", *HEADS), "head", f"one of {HEADS}, or nothing", self.head)
        want(self.precision in PRECISIONS, "precision", f"one of {PRECISIONS}", self.precision)
        if not self.strategy:
            object.__setattr__(self, "strategy", usual(self.slices, self.budget))
        self.tree()

    def tree(self) -> StageTree:
        """Build the stage tree, the same for every shard."""
        return build_tree(self.strategy, self.slices, self.budget)

    def steps_at(self, depth: int) -> int:
        """Give the number of steps of a stage at a depth from 1."""
        return self.steps[depth - 1] if isinstance(self.steps, tuple) else self.steps

    def identity(self) -> dict[str, Any]:
        """List what shapes a node's weights: neither which other nodes are planned, nor how answers combine."""
        outside = {"combine", "ensemble", "strategy", "budget"}
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items() if k not in outside
        }

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Build from the JSON object that a store holds."""
        return from_json(cls, values, "config")


def check_combine(combine: str, schema: Schema) -> None:
    """Refuse a way of combining answers that is none, or none for the task."""
    want(combine in COMBINE, "combine", f"one of {COMBINE}", combine)
    if schema.task == "regression" and combine == "vote":
        raise ValueError(f"combine: expected probabilities or logits (a regression: the mean), got {combine!r}")
