"""Train every node of the plan, stage by stage, nodes of one depth in lock-step over the shared frozen base."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.ledger.identity import Key
from s3t_ext.lora.kernels import backend_for, native
from s3t_ext.lora.nn import MaskedLoRALinear, Routing, adapt, adapted_layers, matches
from s3t_ext.lora.optim import AdamW
from s3t_ext.lora.rng import uniform
from s3t_ext.models.batches import batch_order
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.models.groups import layer_index, stages_by_layer
from s3t_ext.models.heads import orthonormal
from s3t_ext.plan import Path as NodePath
from s3t_ext.store.files import StoreError, exclusive
from s3t_ext.system.config import Config, Schema
from s3t_ext.system.folder import StoreFolder, admit, creating
from s3t_ext.system.ingest import Layout, Table, lay_out, read_table
from s3t_ext.system.report import Progress
from s3t_ext.system.unlearn import erase

Node = tuple[int, NodePath]  # (shard, path)


class Network(nn.Module):
    """The frozen base with its adapted layers and the frozen head: inputs to logits (n, classes)."""

    def __init__(self, base: nn.Module, head: Tensor, config: Config, groups: int) -> None:
        super().__init__()
        self.routing = adapt_base(base, config, groups)
        self.base = base
        self.layers = adapted_layers(base)
        linear = nn.Linear(head.shape[1], head.shape[0], bias=False)
        linear.weight = nn.Parameter(head, requires_grad=False)
        self.head = MaskedLoRALinear(linear, self.routing, slice(0, 0), config.rank, config.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))


def adapt_base(base: nn.Module, config: Config, groups: int) -> Routing:
    """Put adapters into a base model as a configuration says; raise ValueError where no layer fits it."""
    targets, stage_of = config.targets, None
    if config.placement == "layers":
        names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and matches(n, targets)]
        if targets == "all-linear":  # of the numbered layers: an embedding belongs to no group
            names = targets = [n for n in names if layer_index(n) is not None]
        stage_of = stages_by_layer(names, config.slices)
    return adapt(base, targets, stages=config.slices, groups=groups, rank=config.rank, scale=config.scale,
                 stage_of=stage_of)


def load_network(folder: StoreFolder, groups: int) -> Network:
    """Load the base and the head of a store, checked against the hashes it recorded."""
    base = load_model(folder.base)
    if model_hash(base) != folder.base_hash:
        raise StoreError(f"{folder.base} is not the base model of this store; restore it from a backup")
    return Network(base, torch.from_numpy(folder.head().copy()), folder.config, groups).eval()


def provenance() -> dict[str, Any]:
    """Describe what may change bits without changing a node's identity; all but ``threads`` must agree to compare."""
    from importlib.metadata import version

    return {"s3t_ext": version("s3t-ext"), "torch": torch.__version__, "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "backend": backend_for("linear", torch.device("cpu"), torch.float32), "isa": native.build_info()["isa"] if native.AVAILABLE else "",
            "threads": torch.get_num_threads()}


# --- fit -------------------------------------------------------------------------------------------------------------


def fit(path: Path | str, table: Table | Path | str, schema: Schema, base: Path | str, config: Config | None = None, *,
        key: bytes | None = None, declared: Mapping[str, Iterable[str]] | None = None, nodes_per_pass: int = 5,
        progress: bool = True) -> dict:
    """Make a store from a table and train every node of its plan; or go on where a killed run stopped.

    Args:
        path: of the store; a new folder, or one that ``fit`` made from the same table and declarations.
        table: records in memory, or a file that ``read_table`` reads under ``schema``.
        base: folder of the frozen base model.
        key: 32 bytes that all streams and placements derive from; None: drawn at random.
        declared: subjects of declared parts, by part: they are known to the ledger and not covered by deletion.
        nodes_per_pass: how many nodes train in lock-step; it changes no bit.

    Returns:
        A report: nodes trained and found, records, dropped subjects, seconds.

    Raises:
        ValueError: the table, schema or configuration is wrong, or differs from those of the existing store.
        StoreError: the folder cannot be read or written, or another process writes to it.
    """
    path, config = Path(path), config or Config()
    if nodes_per_pass < 1:
        raise ValueError(f"nodes_per_pass: expected at least 1, got {nodes_per_pass}")
    if (path / "store.json").exists():
        with exclusive(path), StoreFolder(path) as folder:
            erase(folder)
            layout = _admitted(folder, table, schema, Path(base), config, key)
            return _train_all(folder, layout, nodes_per_pass, progress)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"store: expected a new or empty folder, got {path}, which holds other files")
    model = load_model(Path(base))
    drawn = Key(key) if key is not None else Key.new()
    head = orthonormal(drawn.derive("head").mac(), len(schema.classes), int(model.features))
    base_hash = model_hash(model)
    _check_model(model, schema)
    adapt_base(model, config, 1)
    with creating(path, schema, config, drawn, Path(base), base_hash, head.numpy()) as folder:
        records = table if isinstance(table, Table) else read_table(table, schema)
        layout = lay_out(records, drawn, config.shards, config.slices)
        admit(folder, layout, declared or {})
    with exclusive(path), StoreFolder(path) as folder:
        return _train_all(folder, layout, nodes_per_pass, progress)


def _check_model(model: nn.Module, schema: Schema) -> None:
    if tuple(model.shape) != schema.shape:
        raise ValueError(f"schema.shape: expected the model's input shape {list(model.shape)}, got {list(schema.shape)}")


def _admitted(folder: StoreFolder, table: Table | Path | str, schema: Schema, base: Path, config: Config,
              key: bytes | None) -> Layout:
    """Hold what is given against what an existing store was made from; give the table's layout."""
    for name, ours, theirs in (("schema", folder.schema, schema), ("configuration", folder.config, config),
                               ("base model", folder.base_hash, model_hash(load_model(base)))):
        if ours != theirs:
            raise ValueError(f"{name}: expected the store's own, {ours}, got {theirs}; use a new store for another")
    if key is not None and Key(key) != folder.key:
        raise ValueError("key: expected the key of the existing store; leave it out to go on with it")
    records = table if isinstance(table, Table) else read_table(table, schema)
    layout = lay_out(records, folder.key, config.shards, config.slices, folder.ledger.deleted())
    held = {k for cell in layout.slices for k in folder.records.get(*cell).keys}
    new, gone = len(layout.keys() - held), len(held - layout.keys())
    if new or gone:
        raise ValueError(f"table: expected the records that the store was made from, got {new} others and {gone} missing;"
                         " use a new store for another table")
    return layout


def _train_all(folder: StoreFolder, layout: Layout, nodes_per_pass: int, progress: bool) -> dict:
    start = time.perf_counter()
    trained = Trainer(folder, nodes_per_pass).train(folder.identities(folder.ledger.slices()), progress)
    erase(folder)  # what was requested meanwhile
    live = folder.trained(folder.ledger.slices())
    return {"store": str(folder.path), "nodes": len(live), "trained": trained, "dropped": layout.dropped,
            "records": sum(map(len, layout.slices.values())), "seconds": round(time.perf_counter() - start, 3)}


# --- stages ----------------------------------------------------------------------------------------------------------


class Trainer:
    """Train nodes of one store. Each node's bits are a function of its own path and records alone."""

    def __init__(self, folder: StoreFolder, nodes_per_pass: int = 5) -> None:
        self.folder, self.config, self.nodes_per_pass = folder, folder.config, nodes_per_pass
        self.network = load_network(folder, 1)
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
            missing = missing[len(batch):]
            alive = [n for n in batch if self.folder.alive(*n, slices)]
            weights = self._stage(alive, wanted, bar) if alive else {}
            published += self._publish(weights, wanted)
        return published

    def _publish(self, weights: Mapping[Node, dict[str, np.ndarray]], ids: Mapping[Node, str]) -> int:
        slices = self.folder.ledger.slices()  # as of now: a request during training makes a node stale
        count = 0
        for (shard, path), tensors in weights.items():
            if self.folder.alive(shard, path, slices):
                parent = ids.get((shard, path[:-1]), "")
                self.folder.nodes.put(self.folder.identity(shard, path, slices, parent), tensors, self.provenance)
                count += 1
        return count

    def _stage(self, nodes: Sequence[Node], ids: Mapping[Node, str], bar: Progress) -> dict[Node, dict[str, np.ndarray]]:
        """Train nodes of one depth together; return each one's adapters by layer."""
        depth = len(nodes[0][1])
        trainable = [(name, layer) for name, layer in self.layers.items() if depth - 1 in layer.stages]
        frozen = self._install(nodes, ids, depth)
        pools = [self._initial(name, layer, nodes) for name, layer in trainable]
        optimizer = AdamW([t for pool in pools for t in pool], weight_decay=self.config.weight_decay)
        for (_, layer), pool in zip(trainable, pools, strict=True):
            layer.train_pool = pool
        self._steps(nodes, optimizer, self._table(nodes, depth), bar)
        for name, (a, b) in frozen.items():
            if not (torch.equal(a, self.layers[name].a) and torch.equal(b, self.layers[name].b)):
                raise RuntimeError(f"frozen adapters of {name} changed while training {nodes}")
        if not torch.isfinite(optimizer.flat).all():
            raise ValueError(f"lr: training diverged at {nodes}; expected a smaller one than {self.config.lr}")
        for layer in self.layers.values():
            layer.train_pool = None
        return {node: {f"{name}.{part}": pool[k][j].detach().numpy().copy()
                       for (name, _), pool in zip(trainable, pools, strict=True) for k, part in enumerate("ab")}
                for j, node in enumerate(nodes)}

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
        counts = [size if len(labels) else 0 for _, labels in batches]
        for step in range(self.config.steps):
            rows = slice(step * size, (step + 1) * size)
            inputs = torch.cat([x[rows] for x, _ in batches])  # (sum of counts, *shape)
            labels = torch.cat([y[rows] for _, y in batches])  # (sum of counts,)
            loss = torch.zeros(())
            if len(labels):
                with self.network.routing.batch(counts, table):
                    losses = F.cross_entropy(self.network(inputs), labels, reduction="none") / size
                losses.sum().backward()  # each row's gradient is its own node's mean: nothing joins two nodes
                loss = losses.detach()[: counts[0] or None].sum()
            optimizer.step(learning_rate(self.config, step))
            shard, path = nodes[0]
            bar.advance(len(nodes), f"shard {shard} node {'-'.join(map(str, path))}  loss {float(loss):6.3f}")

    def _batches(self, node: Node) -> tuple[Tensor, Tensor]:
        """Give a node's records in the order of its own stream, long enough for all steps."""
        shard, path = node
        parts = [self.folder.records.get(shard, k) for k in path]
        keys = [key for part in parts for key in part.keys]
        stream = _stream(self.folder.key.derive("batches"), node, "")
        order = batch_order(stream, keys, self.config.steps * self.config.batch)
        inputs = np.concatenate([part.inputs for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        return torch.from_numpy(inputs[order]), torch.from_numpy(labels[order])


def stack_pool(rows: Sequence[np.ndarray], layer: MaskedLoRALinear, part: str) -> Tensor:
    """Stack one part ("a" or "b") of adapters into a pool (N, r, K) or (N, r, O); N may be 0."""
    width = layer.in_features if part == "a" else layer.out_features
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, layer.rank, width)  # (N, r, K or O)


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


