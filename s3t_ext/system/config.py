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
from s3t_ext.system.schema import from_json, want

COMBINE = ("probabilities", "logits", "vote")
ENSEMBLE = ("best", "maximal")


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
            want(isinstance(value, int) and value >= 1, name, "an integer of at least 1", value)
        for name in ("scale", "lr", "weight_decay", "dropout"):
            value = getattr(self, name)
            want(isinstance(value, (int, float)) and math.isfinite(value), name, "a finite number", value)
        for name in ("scale", "lr"):
            want(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        want(self.weight_decay >= 0, "weight_decay", "a number of at least 0", self.weight_decay)
        want(0 <= self.dropout < 1, "dropout", "a probability of at least 0 and below 1", self.dropout)
        want(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        want(self.combine in COMBINE, "combine", f"one of {COMBINE}", self.combine)
        want(self.ensemble in ENSEMBLE, "ensemble", f"one of {ENSEMBLE}", self.ensemble)
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
        return from_json(cls, values, "config")
