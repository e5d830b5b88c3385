"""The adapters that a service holds in memory: pools with slots, filled and overwritten while others are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3t_ext.models.heads import NodeHeads
from s3t_ext.plan import Node
from s3t_ext.system.network import Network


@dataclass(frozen=True, eq=False)
class Held:
    """One node in memory. Equal to nothing but itself: an answer computed with it is none of the same node loaded anew.

    Args:
        name: the node's id; ``slot``: its row in the pools; ``head``: that of its own head, -1 where it has none.
    """

    name: str
    slot: int
    head: int = -1


class Adapters:
    """Slots for nodes in the pools of a network's adapted layers; what no node fills is NaN.

    In placement ``stack`` all layers hold a row for every slot; in ``layers`` the layers of one stage do, whose slots
    are apart from those of other stages. Where nodes train heads there is one for each slot of any stage. Rows that no
    routing table names may be written while passes run.

    Args:
        network: whose pools are made here; ``room``: slots of each column of pools (one, or one a stage).
    """

    def __init__(self, network: Network, room: Sequence[int]) -> None:
        self.network, self.room = network, [0] * len(room)
        self.held: dict[Node, Held] = {}
        self._free: list[list[int]] = [[] for _ in room]
        self._heads: NodeHeads | None = network.head if isinstance(network.head, NodeHeads) else None
        self._free_heads: list[int] = []
        for owner, parts in self._owners():
            for part in parts:
                setattr(owner, part, getattr(owner, part)[:0])
        self.grow(room)

    def _owners(self) -> Iterator[tuple[Any, tuple[str, str]]]:
        """List the modules with pools and the names of these."""
        yield from ((layer, ("a", "b")) for layer in self.network.layers.values())
        if self._heads is not None:
            yield self._heads, ("weight", "bias")

    def grow(self, room: Sequence[int]) -> None:
        """Make the pools larger, none smaller, while no pass runs; nodes keep their slots."""
        for owner, parts in self._owners():
            n = sum(room) if owner is self._heads else room[self._column(owner.stages.start)]
            for part in parts:
                pool = getattr(owner, part)  # (N, ...)
                setattr(owner, part, torch.cat([pool, pool.new_full((max(n - len(pool), 0), *pool.shape[1:]), nan)]))
                pool.fill_(nan)
        for column, (old, new) in enumerate(zip(self.room, room, strict=True)):
            self._free[column][:0] = range(new - 1, old - 1, -1)
        self._free_heads[:0] = range(sum(room) - 1, sum(self.room) - 1, -1)
        self.room = list(room)

    def _column(self, stage: int) -> int:
        return min(stage, len(self.room) - 1)

    def has_room(self, node: Node) -> bool:
        """Tell whether a slot for the node is free."""
        return bool(self._free[self._column(len(node[1]) - 1)])

    def together(self, node: Node, other: Node) -> bool:
        """Tell whether two nodes live in the same pools, so that one may take the other's slot."""
        return self._column(len(node[1]) - 1) == self._column(len(other[1]) - 1)

    def load(self, node: Node, name: str, tensors: Mapping[str, np.ndarray]) -> Held:
        """Write a node's adapters, and its head if it has one, to free slots; no table names them yet."""
        stage = len(node[1]) - 1
        held = Held(name, self._free[self._column(stage)].pop(), -1 if self._heads is None else self._free_heads.pop())
        for key, row in self._rows(held, stage):
            row.copy_(torch.from_numpy(tensors[key]))
        self.held[node] = held
        return held

    def drop(self, node: Node) -> None:
        """Overwrite with NaN what is held of a node, and free its slots."""
        held, stage = self.held.pop(node), len(node[1]) - 1
        for _, row in self._rows(held, stage):
            row.fill_(nan)
        self._free[self._column(stage)].append(held.slot)
        if self._heads is not None:
            self._free_heads.append(held.head)

    def _rows(self, held: Held, stage: int) -> Iterator[tuple[str, Tensor]]:
        """List the rows of a node in the pools, by the names of its tensors."""
        for name, layer in self.network.layers.items():
            if stage in layer.stages:
                yield f"{name}.a", layer.a[held.slot]
                yield f"{name}.b", layer.b[held.slot]
        if self._heads is not None:
            yield "head.weight", self._heads.weight[held.head]
            yield "head.bias", self._heads.bias[held.head]


def slot_bytes(network: Network, stages: int, placement: str) -> list[int]:
    """Give the bytes of a slot in each column of pools, with a head where nodes train one."""
    head = network.head
    sizes = [4 * head.outputs * (head.features + 1) if isinstance(head, NodeHeads) else 0] * stages
    for layer in network.layers.values():
        for stage in layer.stages:
            sizes[stage] += 4 * layer.rank * (layer.in_features + layer.out_features)
    return sizes[:1] if placement == "stack" else sizes
