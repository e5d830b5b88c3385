"""The stage tree of one shard: every stage that is trained, as the ordered slices on its path."""

from __future__ import annotations

import json
import math
import pathlib
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

NodePath = tuple[int, ...]  # slices in the order of their stages
Node = tuple[int, NodePath]  # (shard, path)
"""Slice indices, 0-based, in training order. The node `path` is the stage that trained last on it."""


def check_slices(slices: int) -> None:
    """Refuse what is no number of slices L."""
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise ValueError(f"slices: wanted an integer of at least 1, got {slices!r}")


def check_budget(slices: int, budget: int) -> None:
    """Refuse what is no number of slices L, or no number of distinct sequences of them, 1..L!."""
    check_slices(slices)
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= math.factorial(slices):
        raise ValueError(f"budget: wanted 1..{slices}! = {math.factorial(slices)} sequences, got {budget!r}")


def _order(path: NodePath) -> tuple[int, NodePath]:
    return len(path), path


@dataclass(frozen=True)
class StageTree:
    """A prefix tree of training stages over `slices` slices, named by its leaves.

    A node at depth i trains adapter group i on the records of the i slices of its path, on top of its parent;
    nodes that share a prefix share its training. The root (no slice, the frozen base) is not a node.

    Args:
        slices: number of slices L of the shard.
        sequences: the root-to-leaf paths, each a prefix of a permutation of 0..L-1, none a prefix of another, sorted by
            (length, path). Their prefixes are the nodes.

    Raises:
        ValueError: the sequences are not such leaves.
    """

    slices: int
    sequences: tuple[NodePath, ...]

    def __post_init__(self) -> None:
        check_slices(self.slices)
        if not self.sequences:
            raise ValueError("sequences: wanted at least one, got none")
        known = set(range(self.slices))
        for path in self.sequences:
            if set(map(type, path)) != {int} or len(set(path)) != len(path) or not known.issuperset(path):
                raise ValueError(f"sequences: wanted distinct slices in 0..{self.slices - 1}, got the path {path}")
        if self.sequences != tuple(sorted(self.sequences, key=_order)):
            raise ValueError("sequences: wanted them sorted by (length, path)")
        for path, after in pairwise(sorted(self.sequences)):  # what begins with a path follows it at once
            if after[: len(path)] == path:
                raise ValueError(f"sequences: wanted leaves, got {path}, with which {after} begins")

    @classmethod
    def from_sequences(cls, slices: int, sequences: Iterable[Sequence[int]]) -> StageTree:
        """Build the tree of all prefixes of the given sequences; a sequence may stop before all slices are used."""
        paths = sorted(set(map(tuple, sequences)))
        leaves = [path for path, after in zip(paths, [*paths[1:], ()]) if after[: len(path)] != path]
        return cls(slices, tuple(sorted(leaves, key=_order)))

    @cached_property
    def nodes(self) -> tuple[NodePath, ...]:
        """All paths from the root, sorted by (depth, path)."""
        prefixes = {path[:depth] for path in self.sequences for depth in range(1, len(path) + 1)}
        return tuple(sorted(prefixes, key=_order))

    @cached_property
    def stages_by_depth(self) -> Counter[int]:
        """Number of nodes at each depth, counted without listing them.

        A sequence adds those below the prefix that it shares with its neighbour in lexicographic order.
        """
        counts: Counter[int] = Counter()
        for before, path in pairwise([(), *sorted(self.sequences)]):
            shared = next((depth for depth, (a, b) in enumerate(zip(before, path)) if a != b), 0)
            counts.update(range(shared + 1, len(path) + 1))
        return counts

    @property
    def stages(self) -> int:
        """Number of nodes, one trained stage each."""
        return sum(self.stages_by_depth.values())

    @property
    def slice_passes(self) -> int:
        """Training cost in passes over one slice: a node at depth i trains on i slices."""
        return sum(depth * count for depth, count in self.stages_by_depth.items())

    @property
    def layer_passes(self) -> float:
        """Training cost in passes of one slice over all layers: backward at depth i reaches i of L groups only."""
        return sum(depth**2 * count for depth, count in self.stages_by_depth.items()) / self.slices

    @property
    def depth(self) -> int:
        """Greatest depth of a node."""
        return len(self.sequences[-1])

    @property
    def heads(self) -> NodePath:
        """The first slices, in order: while one of them is clean, the shard is alive."""
        return tuple(sorted({path[0] for path in self.sequences}))

    def live(self, dirty: Collection[int]) -> tuple[NodePath, ...]:
        """Return the nodes with no dirty slice on their path, in the tree's order."""
        hit = self._check_dirty(dirty)
        return tuple(path for path in self.nodes if hit.isdisjoint(path))

    def best_live(self, dirty: Collection[int]) -> NodePath:
        """Return the deepest live node, `()` when none is left.

        Ties go to the lexicographically smallest path, so that the choice is a function of the *set* of dirty slices
        alone: neither the order nor the number of deletions shows in what is served (method.md section 4).
        """
        hit = self._check_dirty(dirty)
        prefixes = (tuple(takewhile(lambda index: index not in hit, path)) for path in self.sequences)
        return min(prefixes, key=lambda path: (-len(path), path))

    def parent(self, path: NodePath) -> NodePath:
        """Return the node below which `path` was trained, `()` for a first stage."""
        if path not in self._known:
            raise ValueError(f"path: {path} is not a node of this tree")
        return path[:-1]

    @cached_property
    def _known(self) -> frozenset[NodePath]:
        return frozenset(self.nodes)

    def _check_dirty(self, dirty: Collection[int]) -> frozenset[int]:
        hit = frozenset(dirty)
        if not hit <= set(range(self.slices)):
            raise ValueError(f"dirty: wanted slices in 0..{self.slices - 1}, got {sorted(hit)}")
        return hit

    def to_json(self) -> dict[str, Any]:
        """Return the tree as plain JSON types; the leaves say everything."""
        return {"slices": self.slices, "sequences": [list(path) for path in self.sequences]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageTree:
        """Rebuild a tree from what `to_json` returned.

        Raises:
            ValueError: a field is missing, or the sequences do not form a tree.
        """
        try:
            return cls.from_sequences(data["slices"], [tuple(sequence) for sequence in data["sequences"]])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"plan: wanted {{'slices': int, 'sequences': [[int]]}}, got {reprlib.repr(data)}"
            ) from error

    @classmethod
    def read(cls, path: str | pathlib.Path) -> StageTree:
        """Read a custom tree from a JSON file as `to_json` makes it; its sequences may stand in any order.

        Raises:
            ValueError: the file holds no such tree, or a sequence that adds nothing: a repeated one, or one that begins
                another.
        """
        try:
            data = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
            tree = cls.from_json(data)
            if len(tree.sequences) < len(data["sequences"]):
                raise ValueError(
                    f"sequences: wanted distinct ones, none the beginning of another, got {len(data['sequences'])}, "
                    f"of which {len(tree.sequences)} make the tree"
                )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return tree
