"""The stage tree of one shard: every stage that is trained, as the ordered slices on its path."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Path = tuple[int, ...]
"""Slice indices, 0-based, in training order. The node `path` is the stage that trained last on it."""


def _order(path: Path) -> tuple[int, Path]:
    return len(path), path


@dataclass(frozen=True)
class StageTree:
    """A prefix tree of training stages over `slices` slices.

    A node at depth i trains adapter group i on the records of the i slices of its path, on top of its parent;
    nodes that share a prefix share its training. The root (no slice, the frozen base) is not a node.

    Args:
        slices: number of slices L of the shard.
        nodes: paths, each a prefix of a permutation of 0..L-1, sorted by (depth, path), with all their prefixes.

    Raises:
        ValueError: the nodes are not such a tree.
    """

    slices: int
    nodes: tuple[Path, ...]

    def __post_init__(self) -> None:
        if isinstance(self.slices, bool) or not isinstance(self.slices, int) or self.slices < 1:
            raise ValueError(f"slices: wanted an integer of at least 1, got {self.slices!r}")
        if not self.nodes:
            raise ValueError("nodes: wanted at least one stage, got none")
        known = {(), *self.nodes}
        if len(known) != len(self.nodes) + 1:
            raise ValueError("nodes: wanted distinct, non-empty paths, got one twice or an empty one")
        for path in self.nodes:
            if len(set(path)) != len(path) or not all(0 <= index < self.slices for index in path):
                raise ValueError(f"nodes: wanted distinct slices in 0..{self.slices - 1}, got the path {path}")
            if path[:-1] not in known:
                raise ValueError(f"nodes: the parent of {path} is missing")
        if self.nodes != tuple(sorted(self.nodes, key=_order)):
            raise ValueError("nodes: wanted them sorted by (depth, path)")

    @classmethod
    def from_sequences(cls, slices: int, sequences: Iterable[Sequence[int]]) -> StageTree:
        """Build the tree of all prefixes of the given sequences; a sequence may stop before all slices are used."""
        prefixes = {tuple(sequence[:depth]) for sequence in sequences for depth in range(1, len(sequence) + 1)}
        return cls(slices, tuple(sorted(prefixes, key=_order)))

    @cached_property
    def sequences(self) -> tuple[Path, ...]:
        """The leaves: the root-to-leaf paths that together name every node."""
        parents = {path[:-1] for path in self.nodes}
        return tuple(path for path in self.nodes if path not in parents)

    @property
    def stages(self) -> int:
        """Number of nodes, one trained stage each."""
        return len(self.nodes)

    @property
    def slice_passes(self) -> int:
        """Training cost in passes over one slice: a node at depth i trains on i slices."""
        return sum(map(len, self.nodes))

    @property
    def layer_passes(self) -> float:
        """Training cost in passes of one slice over all layers: backward at depth i reaches i of L groups only."""
        return sum(len(path) ** 2 for path in self.nodes) / self.slices

    @property
    def depth(self) -> int:
        """Greatest depth of a node."""
        return len(self.nodes[-1])

    def live(self, dirty: Collection[int]) -> tuple[Path, ...]:
        """Return the nodes with no dirty slice on their path, in the tree's order."""
        hit = frozenset(dirty)
        if not hit <= set(range(self.slices)):
            raise ValueError(f"dirty: wanted slices in 0..{self.slices - 1}, got {sorted(hit)}")
        return tuple(path for path in self.nodes if hit.isdisjoint(path))

    def best_live(self, dirty: Collection[int]) -> Path:
        """Return the deepest live node, `()` when none is left.

        Ties go to the lexicographically smallest path, so that the choice is a function of the *set* of dirty slices
        alone: neither the order nor the number of deletions shows in what is served (method.md section 4).
        """
        live = self.live(dirty)
        return min(live, key=lambda path: (-len(path), path), default=())

    def parent(self, path: Path) -> Path:
        """Return the node below which `path` was trained, `()` for a first stage."""
        if path not in self._known:
            raise ValueError(f"path: {path} is not a node of this tree")
        return path[:-1]

    @cached_property
    def _known(self) -> frozenset[Path]:
        return frozenset(self.nodes)

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
            raise ValueError(f"plan: wanted {{'slices': int, 'sequences': [[int]]}}, got {data!r}") from error
