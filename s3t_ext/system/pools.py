"""The adapters that a service holds in memory: pools with slots, filled and overwritten while others are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s3t_ext.system.network import Network
from s3t_ext.system.paths import Node


@dataclass(frozen=True, eq=False)
class Held:
    """One node in memory. Equal to nothing but itself: an answer computed with it is none of the same node loaded anew.

    Args:
        name: the node's id; ``slot``: its row in the pools.
    """

    name: str
    slot: int


class Adapters:
    """Slots for nodes in the pools of a network's adapted layers; what no node fills is NaN.

    In placement ``stack`` all layers hold a row for every slot; in ``layers`` the layers of one stage do, whose slots
    are apart from those of other stages. Rows that no routing table names may be written while passes run.

    Args:
        network: whose pools are made here; ``room``: slots of each column of pools (one, or one a stage).
    """

    def __init__(self, network: Network, room: Sequence[int]) -> None:
        self.network, self.room = network, [0] * len(room)
        self.held: dict[Node, Held] = {}
        self._free: list[list[int]] = [[] for _ in room]
        for layer in network.layers.values():
            layer.a, layer.b = layer.a[:0], layer.b[:0]
        self.grow(room)

    def grow(self, room: Sequence[int]) -> None:
        """Make the pools larger, while no pass runs; nodes keep their slots."""
        for layer in self.network.layers.values():
            more = room[self._column(layer.stages.start)] - len(layer.a)
            for name in ("a", "b"):
                pool = getattr(layer, name)  # (N, r, K or O)
                setattr(layer, name, torch.cat([pool, pool.new_full((max(more, 0), *pool.shape[1:]), torch.nan)]))
                pool.fill_(torch.nan)
        for column, (old, new) in enumerate(zip(self.room, room, strict=True)):
            self._free[column][:0] = range(new - 1, old - 1, -1)
        self.room = [max(old, new) for old, new in zip(self.room, room, strict=True)]

    def _column(self, stage: int) -> int:
        return min(stage, len(self.room) - 1)

    def has_room(self, node: Node) -> bool:
        """Tell whether a slot for the node is free."""
        return bool(self._free[self._column(len(node[1]) - 1)])

    def together(self, node: Node, other: Node) -> bool:
        """Tell whether two nodes live in the same pools, so that one may take the other's slot."""
        return self._column(len(node[1]) - 1) == self._column(len(other[1]) - 1)

    def load(self, node: Node, name: str, tensors: Mapping[str, np.ndarray]) -> Held:
        """Write a node's adapters to a free slot; no table names it yet."""
        stage = len(node[1]) - 1
        held = Held(name, self._free[self._column(stage)].pop())
        for key, layer in self.network.layers.items():
            if stage in layer.stages:
                layer.a[held.slot] = torch.from_numpy(tensors[f"{key}.a"])
                layer.b[held.slot] = torch.from_numpy(tensors[f"{key}.b"])
        self.held[node] = held
        return held

    def drop(self, node: Node) -> None:
        """Overwrite a node's adapters with NaN and free its slot."""
        held, stage = self.held.pop(node), len(node[1]) - 1
        for layer in self.network.layers.values():
            if stage in layer.stages:
                layer.a[held.slot].fill_(torch.nan)
                layer.b[held.slot].fill_(torch.nan)
        self._free[self._column(stage)].append(held.slot)


def slot_bytes(network: Network, stages: int, placement: str) -> list[int]:
    """Give the bytes of a slot in each column of pools."""
    sizes = [0] * stages
    for layer in network.layers.values():
        for stage in layer.stages:
            sizes[stage] += 4 * layer.rank * (layer.in_features + layer.out_features)
    return sizes[:1] if placement == "stack" else sizes
