"""Train every node of the plan, stage by stage, nodes of one depth in lock-step over the shared frozen base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.ledger.identity import Key
from s3t_ext.lora.nn import MaskedLoRALinear
from s3t_ext.lora.optim import AdamW
from s3t_ext.lora.pinned import pinned
from s3t_ext.lora.rng import uniform
from s3t_ext.models.batches import batch_order
from s3t_ext.plan import Path as NodePath
from s3t_ext.system.config import Config
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.network import load_network, provenance, stack_pool
from s3t_ext.system.report import Progress

Node = tuple[int, NodePath]  # (shard, path)


class Batches(NamedTuple):
    """A node's records in training order: batch s of size B is rows s * B to (s + 1) * B."""

    inputs: Tensor  # (rows, *shape)
    labels: Tensor  # (rows,)
    keys: Tensor  # (rows,) int64, of the records, for dropout


class Trainer:
    """Train nodes of one store. Each node's bits are a function of its own path and records alone."""

    def __init__(self, folder: StoreFolder, nodes_per_pass: int = 5) -> None:
        self.folder, self.config, self.nodes_per_pass = folder, folder.config, nodes_per_pass
        self.network = load_network(folder, 1, train=True)
        self.layers = self.network.layers
        self.provenance = provenance()

    def train(self, wanted: Mapping[Node, str], progress: bool = True) -> int:
        """Train those of the wanted nodes (with their ids) that the store lacks; parents must be among them.

        A node that a deletion makes stale while it trains is not published.

        Returns:
            How many nodes were trained and published.
        """
        missing = [node for node, name in wanted.items() if not self.folder.nodes.has(name)]
        missing.sort(key=lambda node: (len(node[1]), node[1], node[0]))
        bar = Progress(len(missing) * self.config.steps, progress)
        published = 0
        while missing:
            slices = self.folder.ledger.slices()
            depth = len(missing[0][1])
            batch = [n for n in missing[: self.nodes_per_pass] if len(n[1]) == depth]
            missing = missing[len(batch) :]
            alive = [n for n in batch if self.folder.alive(*n, slices)]
            weights = self._stage(alive, wanted, bar) if alive else {}
            published += self._publish(weights, wanted)
            self._overwrite(weights)
        return published

    def _overwrite(self, weights: Mapping[Node, dict[str, np.ndarray]]) -> None:
        """Leave no copy of a pass in memory: one of its nodes may be dead by now, or die later."""
        for array in (array for tensors in weights.values() for array in tensors.values()):
            array.fill(np.nan)
        for layer in self.layers.values():
            layer.a.fill_(torch.nan)
            layer.b.fill_(torch.nan)

    def _publish(self, weights: Mapping[Node, dict[str, np.ndarray]], ids: Mapping[Node, str]) -> int:
        slices = self.folder.ledger.slices()  # as of now: a request during training makes a node stale
        count = 0
        for (shard, path), tensors in weights.items():
            if self.folder.alive(shard, path, slices):
                parent = ids.get((shard, path[:-1]), "")
                self.folder.nodes.put(self.folder.identity(shard, path, slices, parent), tensors, self.provenance)
                count += 1
        return count

    def _stage(
        self, nodes: Sequence[Node], ids: Mapping[Node, str], bar: Progress
    ) -> dict[Node, dict[str, np.ndarray]]:
        """Train nodes of one depth together; return each one's adapters by layer."""
        depth = len(nodes[0][1])
        trainable = [(name, layer) for name, layer in self.layers.items() if depth - 1 in layer.stages]
        frozen = self._install(nodes, ids, depth)
        pools = [self._initial(name, layer, nodes) for name, layer in trainable]
        optimizer = AdamW([t for pool in pools for t in pool], weight_decay=self.config.weight_decay)
        for (_, layer), pool in zip(trainable, pools, strict=True):
            layer.train_pool = pool
        with pinned():
            self._steps(nodes, optimizer, self._table(nodes, depth), bar)
        for name, (a, b) in frozen.items():
            if not (torch.equal(a, self.layers[name].a) and torch.equal(b, self.layers[name].b)):
                raise RuntimeError(f"frozen adapters of {name} changed while training {nodes}")
        if not torch.isfinite(optimizer.flat).all():
            raise ValueError(f"lr: training diverged at {nodes}; expected a smaller one than {self.config.lr}")
        for layer in self.layers.values():
            layer.train_pool = None
        trained = {
            node: {
                f"{name}.{part}": pool[k][j].detach().numpy().copy()
                for (name, _), pool in zip(trainable, pools, strict=True)
                for k, part in enumerate("ab")
            }
            for j, node in enumerate(nodes)
        }
        optimizer.overwrite()
        for tensor in (tensor for pair in frozen.values() for tensor in pair):
            tensor.fill_(torch.nan)
        return trained

    def _table(self, nodes: Sequence[Node], depth: int) -> Tensor:
        """Route node j's rows to its ancestors' slots and to trainable adapter j."""
        stack = self.config.placement == "stack"
        table = torch.full((len(nodes), self.config.slices), -1, dtype=torch.int32)  # (M, L)
        for j in range(len(nodes)):
            for i in range(depth - 1):
                table[j, i] = j * (depth - 1) + i if stack else j
            table[j, depth - 1] = len(nodes) * (depth - 1) + j if stack else j
        return table

    def _install(self, nodes: Sequence[Node], ids: Mapping[Node, str], depth: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Load the nodes' ancestors into the frozen pools; return a copy of them to compare with afterwards."""
        ancestors = [[self.folder.nodes.get(ids[s, path[:i]])[1] for i in range(1, depth)] for s, path in nodes]
        for name, layer in self.layers.items():
            rows = [tensors for chain in ancestors for i, tensors in enumerate(chain) if i in layer.stages]
            layer.a, layer.b = (stack_pool([t[f"{name}.{part}"] for t in rows], layer, part) for part in "ab")
        return {name: (layer.a.clone(), layer.b.clone()) for name, layer in self.layers.items()}

    def _initial(self, name: str, layer: MaskedLoRALinear, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
        """Start each node's adapter: a uniform in +-1/sqrt(K) from its own stream, b zero."""
        init = self.folder.key.derive("initialisation")
        shape, bound = (layer.rank, layer.in_features), 1 / math.sqrt(layer.in_features)
        a = torch.stack([uniform(_stream(init, node, name), shape, bound) for node in nodes])  # (M, r, K)
        b = torch.zeros(len(nodes), layer.rank, layer.out_features)  # (M, r, O)
        return a.requires_grad_(), b.requires_grad_()

    def _steps(self, nodes: Sequence[Node], optimizer: AdamW, table: Tensor, bar: Progress) -> None:
        batches = [self._batches(node) for node in nodes]
        size = self.config.batch
        counts = [size if len(b.labels) else 0 for b in batches]
        for step in range(self.config.steps):
            rows = slice(step * size, (step + 1) * size)
            inputs = torch.cat([b.inputs[rows] for b in batches])  # (sum of counts, *shape)
            labels = torch.cat([b.labels[rows] for b in batches])  # (sum of counts,)
            dropout = self._dropout(nodes, step, torch.cat([b.keys[rows] for b in batches]))
            loss = torch.zeros(())
            if len(labels):
                with self.network.routing.batch(counts, table, dropout):
                    losses = F.cross_entropy(self.network(inputs), labels, reduction="none") / size
                losses.sum().backward()  # each row's gradient is its own node's mean: nothing joins two nodes
                loss = losses.detach()[: counts[0] or None].sum()
            optimizer.step(learning_rate(self.config, step))
            shard, path = nodes[0]
            bar.advance(len(nodes), f"shard {shard} node {'-'.join(map(str, path))}  loss {float(loss):6.3f}")
        for batch in batches:
            batch.inputs.fill_(torch.nan)

    def _dropout(self, nodes: Sequence[Node], step: int, keys: Tensor) -> tuple[float, Tensor, Tensor] | None:
        """Give (p, a seed for each node and layer, record keys) of a step, from the nodes' own streams."""
        if not self.config.dropout:
            return None
        key = self.folder.key.derive("dropout")
        names = [f"{name} {step}" for name in self.layers]
        seeds = [[_number(_stream(key, node, name)) for name in names] for node in nodes]
        return self.config.dropout, torch.tensor(seeds), keys  # p, (M, layers), (sum of counts,)

    def _batches(self, node: Node) -> Batches:
        """Give a node's records in the order of its own stream, long enough for all steps."""
        shard, path = node
        parts = [self.folder.records.get(shard, k) for k in path]
        keys = [key for part in parts for key in part.keys]
        stream = _stream(self.folder.key.derive("batches"), node, "")
        order = torch.from_numpy(batch_order(stream, keys, self.config.steps * self.config.batch))  # (rows,)
        inputs = np.concatenate([part.inputs for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        numbers = torch.tensor([_number(key) for key in keys], dtype=torch.int64)
        return Batches(torch.from_numpy(inputs)[order], torch.from_numpy(labels)[order], numbers[order])


def learning_rate(config: Config, step: int) -> float:
    """Give the rate of a step: linear warm-up over the first tenth, then half a cosine to zero."""
    warm = max(1, config.steps // 10)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def _stream(key: Key, node: Node, layer: str) -> bytes:
    """Name a node's own stream: by shard, slices on its path and layer, never by identity, size or another node."""
    shard, path = node
    return key.mac(str(shard).encode(), ",".join(map(str, path)).encode(), layer.encode())


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)
