"""Nodes of one depth in lock-step: one pass over the shared frozen base for all, and nothing that joins two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s3t_ext.ledger.identity import Key
from s3t_ext.lora.nn import MaskedLoRALinear
from s3t_ext.lora.optim import AdamW, clip_by_node
from s3t_ext.lora.rng import uniform
from s3t_ext.models.batches import batch_order
from s3t_ext.models.heads import counted, record_losses
from s3t_ext.plan import Node
from s3t_ext.system.config import Config
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.network import Network, frozen_tensors, stack_pool
from s3t_ext.system.training.memory import Records
from s3t_ext.system.training.trunk import Trunk

COPIES = (
    7  # of what a node trains: itself, its gradient and that of one pass, two moments, a scratch, what is published
)
Tensors = dict[str, np.ndarray]


class Held(NamedTuple):
    """What nodes in training share, beside the network."""

    records: Records
    trunk: Trunk | None  # states of these records
    orders: Mapping[Node, np.ndarray]  # of each node, see ``node_order``


class Share(NamedTuple):
    """Records of one forward pass, each node's in the order of its own batch."""

    numbers: np.ndarray  # (n,)
    counts: list[int]  # M, of each node


class LockStep:
    """Train nodes of one depth together on a network of its own. A node's bits are a function of its path and records.

    Args:
        folder: to read ancestors from; ``network``: with one group; threads need one each.
        rows: of one forward pass at most, in tokens, where one node has no more.
    """

    def __init__(self, folder: StoreFolder, network: Network, rows: int) -> None:
        self.folder, self.config, self.network, self.rows = folder, folder.config, network, rows
        self.layers, self.device = network.layers, network.device

    def stage(
        self,
        nodes: Sequence[Node],
        ids: Mapping[Node, str],
        held: Held,
        tell: Callable[[int, int, float], None],
    ) -> dict[Node, Tensors]:
        """Train nodes; return the weights of each: adapters by layer, and its head where it has one.

        Args:
            ids: of the nodes' ancestors, which are in the store.
            tell: is told the depth, the number of nodes and their mean loss after each step.
        """
        depth = len(nodes[0][1])
        frozen, slots = self._install(nodes, ids, depth)
        pools = self._pools(nodes, ids, depth)
        optimizer = AdamW([t for pool in pools.values() for t in pool], weight_decay=self.config.weight_decay)
        for name, pool in pools.items():
            self._owner(name).train_pool = pool
        try:
            self._steps(nodes, optimizer, self._table(nodes, slots, depth), held, tell)
            for name, (a, b) in frozen.items():
                if not (torch.equal(a, self.layers[name].a) and torch.equal(b, self.layers[name].b)):
                    raise RuntimeError(f"frozen adapters of {name} changed while training {nodes}")
            trained = {node: self._copied(pools, j) for j, node in enumerate(nodes)}
        finally:
            optimizer.overwrite()
            for name, (a, b) in frozen.items():
                layer = self.layers[name]
                for tensor in (a, b, layer.a, layer.b):
                    tensor.fill_(torch.nan)
                layer.a, layer.b = a.new_empty(0, *a.shape[1:]), b.new_empty(0, *b.shape[1:])
            for name in pools:
                self._owner(name).train_pool = None
        return trained

    def weigh(self, depth: int, x: Tensor) -> tuple[int, int]:
        """Find what training takes in memory.

        Args:
            depth: of nodes; ``x``: inputs of one forward pass, blank ones will do.

        Returns:
            Bytes that one forward pass on x keeps for its backward pass, and bytes of one node: adapters, head,
            gradients, moments and frozen ancestors.
        """
        trained = {name: layer for name, layer in self.layers.items() if depth - 1 in layer.stages}
        node = sum(layer.rank * (layer.in_features + layer.out_features) for layer in trained.values())
        above = sum(
            layer.rank * (layer.in_features + layer.out_features) * sum(stage < depth - 1 for stage in layer.stages)
            for layer in self.layers.values()
        )
        if self.network.kind == "trained":
            node += self.network.head.outputs * (self.network.head.features + 1)
        table = torch.full((1, self.network.routing.stages), -1, dtype=torch.int32)  # (1, L or L + 1)
        table[0, depth - 1] = 0
        table, x = table.to(self.device), x.to(self.device)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            for layer in trained.values():
                a, b = (layer.a.new_zeros(1, layer.rank, n) for n in (layer.in_features, layer.out_features))
                layer.train_pool = a.requires_grad_(), b.requires_grad_()
            block = self.network.trunk(depth)
            with torch.no_grad():
                hidden = self.network.below(x, block) if block else None
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
                self.network.routing.batch([len(x)], table),
            ):
                self.network.features(x, hidden, block)
        finally:
            for layer in trained.values():
                layer.train_pool = None
        for tensor in frozen_tensors(self.network):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(kept.values()), 4 * (COPIES * node + 2 * above)

    def tokens(self, x: Tensor) -> int:
        """Tell how many rows a record like those of x has in a layer."""
        return math.prod(self.network.state_shape(x, len(self.network.base.block_list()) - 1)[:-1])

    def _owner(self, name: str):
        return self.network.head if name == "head" else self.layers[name]

    def _copied(self, pools: Mapping[str, tuple[Tensor, Tensor]], j: int) -> Tensors:
        return {
            f"{name}.{part}": pool[k][j].detach().cpu().numpy().copy()
            for name, pool in pools.items()
            for k, part in enumerate(("weight", "bias") if name == "head" else ("a", "b"))
        }

    # --- what a pass starts from -------------------------------------------------------------------------------------

    def _install(
        self, nodes: Sequence[Node], ids: Mapping[Node, str], depth: int
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[Node, int]]:
        """Load the nodes' ancestors into the frozen pools, each once.

        Returns:
            A copy of the pools to compare with afterwards, and each ancestor's slot.
        """
        stack = self.config.placement == "stack"
        above = sorted({(s, path[:i]) for s, path in nodes for i in range(1, depth)}, key=lambda n: (len(n[1]), n))
        tensors = [self.folder.nodes.get(ids[node])[1] for node in above]
        slots: dict[Node, int] = {}
        for node in above:
            slots[node] = sum(stack or len(other[1]) == len(node[1]) for other in slots)
        for name, layer in self.layers.items():
            rows = [t for node, t in zip(above, tensors, strict=True) if len(node[1]) - 1 in layer.stages]
            pools = (stack_pool([t[f"{name}.{part}"] for t in rows], layer, part) for part in "ab")
            layer.a, layer.b = (pool.to(self.device) for pool in pools)
        return {name: (layer.a.clone(), layer.b.clone()) for name, layer in self.layers.items()}, slots

    def _table(self, nodes: Sequence[Node], slots: Mapping[Node, int], depth: int) -> Tensor:
        """Route node j's rows to its ancestors' slots, to trainable adapter j and, where it has one, to head j."""
        first = len(slots) if self.config.placement == "stack" else 0  # of the trainable ones in their layers
        table = torch.full((len(nodes), self.network.routing.stages), -1, dtype=torch.int32)  # (M, L or L + 1)
        for j, (shard, path) in enumerate(nodes):
            for i in range(1, depth):
                table[j, i - 1] = slots[shard, path[:i]]
            table[j, depth - 1] = first + j
            table[j, self.config.slices :] = j
        return table.to(self.device)

    def _pools(self, nodes: Sequence[Node], ids: Mapping[Node, str], depth: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Make what is trained: adapters by layer, and the nodes' heads."""
        pools = {
            name: self._initial(name, layer, nodes) for name, layer in self.layers.items() if depth - 1 in layer.stages
        }
        if self.network.kind == "trained":
            pools["head"] = self._heads(nodes, ids, depth)
        return pools

    def _initial(self, name: str, layer: MaskedLoRALinear, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
        """Start each node's adapter: a uniform in +-1/sqrt(K) from its own stream, b zero."""
        init = self.folder.key.derive("initialisation")
        shape, bound = (layer.rank, layer.in_features), 1 / math.sqrt(layer.in_features)
        a = torch.stack([uniform(_stream(init, node, name), shape, bound) for node in nodes])  # (M, r, K)
        b = torch.zeros(len(nodes), layer.rank, layer.out_features)  # (M, r, O)
        return a.to(self.device).requires_grad_(), b.to(self.device).requires_grad_()

    def _heads(self, nodes: Sequence[Node], ids: Mapping[Node, str], depth: int) -> tuple[Tensor, Tensor]:
        """Start each node's head where its parent's ended; that of a first stage at zero."""
        head = self.network.head
        weight, bias = torch.zeros(len(nodes), head.outputs, head.features), torch.zeros(len(nodes), head.outputs)
        for j, (shard, path) in enumerate(nodes if depth > 1 else ()):
            parent = self.folder.nodes.get(ids[shard, path[:-1]])[1]
            weight[j], bias[j] = (torch.from_numpy(parent[f"head.{part}"]) for part in ("weight", "bias"))
        return weight.to(self.device).requires_grad_(), bias.to(self.device).requires_grad_()  # (M, C, F), (M, C)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(
        self,
        nodes: Sequence[Node],
        optimizer: AdamW,
        table: Tensor,
        held: Held,
        tell: Callable[[int, int, float], None],
    ) -> None:
        config, depth = self.config, len(nodes[0][1])
        size, micro, steps = config.batch, config.batch // config.accumulate, config.steps_at(depth)
        orders = np.stack([held.orders[node] for node in nodes])  # (M, steps * batch)
        for step in range(steps):
            batch = orders[:, step * size : (step + 1) * size]  # (M, B)
            divisors = self._divisors(batch, held.records)  # (M,)
            loss = torch.zeros((), device=self.device)
            for first in range(0, size, micro):
                for share in self._shares(batch[:, first : first + micro], held.records):
                    dropout = self._dropout(nodes, step, held.records.names[torch.from_numpy(share.numbers)])
                    loss += self._backward(share, table, divisors, dropout, held)
            if config.clip:
                clip_by_node(optimizer.gradients, config.clip)
            optimizer.step(learning_rate(config, step, steps))
            tell(depth, len(nodes), float(loss) / len(nodes))

    def _divisors(self, batch: np.ndarray, records: Records) -> Tensor:
        """Give what each node's losses are divided by: its records in the step, or their counted tokens."""
        if self.folder.schema.task != "causal":
            return torch.full((len(batch),), float(self.config.batch))  # (M,)
        tokens = records.counted[batch].sum(1)  # (M,)
        return torch.from_numpy(np.maximum(tokens, 1)).float()

    def _shares(self, batch: np.ndarray, records: Records) -> Iterator[Share]:
        """Cut the nodes' records (M, micro) in forward passes; a node's that may share one are not taken apart.

        They may where the model leaves padding out, or where they are as long. Short ones come first.
        """
        parts = records.part[batch]  # (M, micro)
        width = np.append(records.tokens, 0)[parts]  # (M, micro), 0 for no record
        together = self.network.base.unpads  # then rows of all lengths; else one length after the other
        for mine in [parts >= 0] if together else [parts == part for part in np.unique(parts[parts >= 0])]:
            for nodes in _runs(np.where(mine, width, 0).sum(1).tolist(), self.rows):
                here = np.zeros_like(mine)
                here[nodes] = mine[nodes]
                if here.any():
                    yield Share(batch[here], here.sum(1).tolist())  # node after node

    def _backward(
        self, share: Share, table: Tensor, divisors: Tensor, dropout: tuple[float, Tensor, Tensor] | None, held: Held
    ) -> Tensor:
        """Add the gradients of one forward pass; return the sum of its losses."""
        at = held.records.part[share.numbers], held.records.row[share.numbers]
        x, labels = (t.to(self.device) for t in held.records.batch(*at))
        hidden = held.trunk.states(*at) if held.trunk else None
        by_row = divisors.repeat_interleave(torch.tensor(share.counts)).to(self.device)  # (n,)
        with self.network.routing.batch(share.counts, table, dropout):
            features = self.network.features(x, hidden, held.trunk.block if held.trunk else 0)
            outputs = features if self.network.kind == "base" else self.network.answer(features)  # (n, C)
        if self.network.kind == "base":
            rows, columns = counted(labels)
            outputs, labels = self.network.answer(features[rows, columns]), labels[rows, columns + 1]
            by_row = by_row[rows]
        losses = record_losses(self.folder.schema.task, outputs, labels) / by_row  # (n,) or (k,)
        total = losses.sum()  # each row's gradient is of its own node's mean: nothing joins two nodes
        total.backward()
        return total.detach()

    def _dropout(self, nodes: Sequence[Node], step: int, keys: Tensor) -> tuple[float, Tensor, Tensor] | None:
        """Give (p, a seed for each node and layer, record keys) of a step, from the nodes' own streams."""
        if not self.config.dropout:
            return None
        key = self.folder.key.derive("dropout")
        names = [f"{name} {step}" for name in self.layers]
        seeds = [[_number(_stream(key, node, name)) for name in names] for node in nodes]
        return self.config.dropout, torch.tensor(seeds).to(self.device), keys.to(self.device)  # p, (M, layers), (n,)


def node_order(key: Key, config: Config, node: Node, records: Records) -> np.ndarray:
    """Give the numbers of a node's records in the order of its own stream, long enough for all steps: (rows,) int64.

    Batch s of size B is rows s * B to (s + 1) * B. -1 stands for no record: where the node's slices are empty.
    """
    shard, path = node
    rows = config.steps_at(len(path)) * config.batch
    keys = [key for k in path for key in records.keys[shard, k]]
    if not keys:
        return np.full(rows, -1)
    order = batch_order(_stream(key.derive("batches"), node, ""), keys, rows)
    return np.concatenate([records.numbers((shard, k)) for k in path])[order]


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Give the rate of one of a stage's steps: linear warm-up over the first tenth, then half a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _runs(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Cut nodes in runs that have at most so many tokens together, or are one node."""
    first, held = 0, 0
    for j, count in enumerate(counts):
        if held and held + count > most:
            yield slice(first, j)
            first, held = j, 0
        held += count
    if held:
        yield slice(first, len(counts))


def _stream(key: Key, node: Node, layer: str) -> bytes:
    """Name a node's own stream: by shard, slices on its path and layer, never by identity, size or another node."""
    shard, path = node
    return key.mac(str(shard).encode(), ",".join(map(str, path)).encode(), layer.encode())


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)
