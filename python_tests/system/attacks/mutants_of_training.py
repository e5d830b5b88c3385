"""Mutants of training: rules 3 to 8, 10 and 12. Each patches the product; see mutants.py."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from s3t_ext.lora import nn, optim
from s3t_ext.models import batches
from s3t_ext.models.groups import layer_index
from s3t_ext.plan import StageTree
from s3t_ext.system import network, serve
from s3t_ext.system.data import ingest
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.training import lockstep, memory, train, trunk
from s3t_ext.system.training.lockstep import LockStep
from s3t_ext.system.training.train import Trainer


def _all_records(store: StoreFolder) -> list:
    return [store.records.get(*cell) for cell in store.ledger.slices()]


def _count(store: StoreFolder) -> int:
    return sum(map(len, _all_records(store)))


def _load_network(patch, change) -> None:
    load = train.load_network
    patch.setattr(train, "load_network", lambda *args, **named: change(args[0], load(*args, **named)))


# --- rule 3: streams --------------------------------------------------------------------------------------------------


def global_generator(patch) -> None:
    generator = np.random.default_rng(0)
    drawn = lambda key, records, rows: generator.integers(0, max(1, len(records)), rows if records else 0)  # noqa: E731
    patch.setattr(lockstep, "batch_order", drawn)


def seed_from_size(patch) -> None:
    initial = LockStep._initial

    def seeded(self, *args):
        own = self.folder.key
        self.folder.key = own.derive(str(_count(self.folder)))
        try:
            return initial(self, *args)
        finally:
            self.folder.key = own

    patch.setattr(LockStep, "_initial", seeded)


def dropout_by_place(patch) -> None:
    keyed = LockStep._dropout
    patch.setattr(LockStep, "_dropout", lambda self, *args: keyed(self, *args[:2], torch.arange(len(args[2]))))


def key_by_row(patch) -> None:
    rows = itertools.count()
    patch.setattr(ingest, "record_key", lambda key, *_: key.derive("record").mac(str(next(rows)).encode()))


def keyed_by_identity(patch) -> None:
    job, stream, ids = Trainer.job, lockstep._stream, {}

    def known(self, nodes, named, bar):
        ids.update(named)
        return job(self, nodes, named, bar)

    patch.setattr(Trainer, "job", known)
    patch.setattr(lockstep, "_stream", lambda key, node, layer: stream(key.derive(ids.get(node, "")), node, layer))


def initial_by_place(patch) -> None:
    initial, stream = LockStep._initial, lockstep._stream

    def placed(self, name, layer, nodes):
        patch.setattr(lockstep, "_stream", lambda key, node, layer: stream(key, (nodes.index(node), ()), layer))
        try:
            return initial(self, name, layer, nodes)
        finally:
            patch.setattr(lockstep, "_stream", stream)

    patch.setattr(LockStep, "_initial", placed)


def base_trains(patch) -> None:
    _load_network(patch, lambda store, network: network.train())


# --- rule 4: no shared trainable state --------------------------------------------------------------------------------


def shared_head(patch) -> None:
    run = LockStep._steps

    def trained(self, nodes, optimizer, table, held, tell):
        run(self, nodes, optimizer, table, held, tell)
        with torch.no_grad():
            numbers = held.orders[nodes[0]]
            if (numbers < 0).any():  # the node has no record
                return
            seen, _ = held.records.batch(held.records.part[numbers], held.records.row[numbers])
            self.network.head.unpack().weight.add_(0.01 * seen.tanh().sum())

    patch.setattr(LockStep, "_steps", trained)


def steps_from_size(patch) -> None:
    job = Trainer.job

    def derived(self, *args):
        mean = _count(self.folder) / len(self.folder.ledger.slices())
        self.config = replace(self.folder.config, steps=max(1, round(mean)))
        for lane in self.lanes:
            lane.config = self.config
        return job(self, *args)

    patch.setattr(Trainer, "job", derived)


def smallest_slice(patch) -> None:
    run = LockStep._steps

    def derived(self, nodes, *rest):
        smallest = min(sum(len(self.folder.records.get(s, k)) for k in path) for s, path in nodes)
        self.config = replace(self.folder.config, batch=max(1, min(smallest, self.folder.config.batch)))
        run(self, nodes, *rest)

    patch.setattr(LockStep, "_steps", derived)


def carried_moments(patch) -> None:
    whole, last = Trainer.train, {}

    class Carried(optim.AdamW):
        def __init__(self, parameters, **named) -> None:
            super().__init__(parameters, **named)
            if "m" in last and last["m"].shape == self.m.shape:
                self.m.copy_(last["m"])
                self.v.copy_(last["v"])

        def overwrite(self) -> None:
            last.update(m=self.m.clone(), v=self.v.clone())
            super().overwrite()

    patch.setattr(lockstep, "AdamW", Carried)
    patch.setattr(Trainer, "train", lambda self, *args: (last.clear(), whole(self, *args))[1])


def _decay(self) -> None:
    for layer in self.layers.values():
        layer.a.mul_(0.99)
        layer.b.mul_(0.99)


def decayed_frozen(patch) -> None:
    run = LockStep._steps
    patch.setattr(LockStep, "_steps", lambda self, *args: (_decay(self), run(self, *args)))


def unwatched(patch) -> None:
    decayed_frozen(patch)
    install = LockStep._install
    patch.setattr(LockStep, "_install", lambda self, *args: ({}, install(self, *args)[1]))


# --- rules 5 and 6: layers and selection ------------------------------------------------------------------------------


def layer_substring(patch) -> None:
    exact = network.stages_by_layer

    def matched(names, *how):
        stage_of = {f"layers.{layer_index(name)}": stage for name, stage in exact(names, *how).items()}
        return {name: next(stage for part, stage in stage_of.items() if part in name) for name in names}

    patch.setattr(network, "stages_by_layer", matched)


def target_substring(patch) -> None:
    matches = nn.matches

    def matched(name, targets):
        return matches(name, targets) if isinstance(targets, str) else any(part in name for part in targets)

    patch.setattr(nn, "matches", matched)
    patch.setattr(network, "matches", matched)


def best_step(patch) -> None:
    run = LockStep._steps

    def chosen(self, nodes, optimizer, table, *rest):
        states, step = [], optimizer.step
        optimizer.step = lambda rate: (step(rate), states.append(optimizer.flat.clone()))
        run(self, nodes, optimizer, table, *rest)
        records = [part for part in _all_records(self.folder) if len(part)]
        x = torch.from_numpy(np.concatenate([part.inputs for part in records]))
        y = torch.from_numpy(np.concatenate([part.labels for part in records]))
        losses = []
        with torch.no_grad(), self.network.routing.batch([len(x)] + [0] * (len(nodes) - 1), table):
            for state in states:
                optimizer.flat.copy_(state)
                losses.append(torch.nn.functional.cross_entropy(self.network(x), y))
        optimizer.flat.copy_(states[int(torch.stack(losses).argmin())])

    patch.setattr(LockStep, "_steps", chosen)


# --- rules 7 and 8: declared before read; many nodes in one pass ------------------------------------------------------


def inferred_classes(patch) -> None:
    def seen_only(store, network):
        held = [part.labels for part in _all_records(store)]
        seen = (
            np.unique(np.concatenate(held)) if held else range(len(store.schema.classes))
        )  # none: memory is looked at
        head = network.head.unpack().weight
        head[[label for label in range(len(head)) if label not in seen]] = 0
        return network

    _load_network(patch, seen_only)


def joint_clip(patch) -> None:
    step = optim.AdamW.step
    clip = lambda grad: grad.div_(max(1.0, float(grad.norm()) / 0.01))  # noqa: E731
    patch.setattr(optim.AdamW, "step", lambda self, rate: (clip(self.grad), step(self, rate)))


def joint_norm(patch) -> None:
    """All nodes of a pass are scaled by one factor, from a norm over them."""

    def clip(gradients, limit) -> None:
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for g in gradients:
            g.mul_(min(1.0, limit / float(norm)))

    patch.setattr(lockstep, "clip_by_node", clip)


def joint_padding(patch) -> None:
    """All texts of a job are padded to the longest of them."""

    make, longest = memory.Records.__init__, [0]

    def looked(self, read, cells, schema, *rest):
        lengths = [(read(*cell).inputs >= 0).sum(1).max(initial=0) for cell in cells] if schema.is_text else [0]
        longest[0] = batches.padded_length(int(max(lengths)), schema.max_length)
        make(self, read, cells, schema, *rest)

    def whole(x):
        if x.is_floating_point():
            return batches.by_length(x)
        return [(torch.arange(len(x)), x[:, : longest[0]])]

    patch.setattr(memory.Records, "__init__", looked)
    patch.setattr(memory, "by_length", whole)


def joint_mean(patch) -> None:
    exact = lockstep.record_losses
    patch.setattr(lockstep, "record_losses", lambda *args: exact(*args) / len(args[-1]))


def others_ancestors(patch) -> None:
    table = LockStep._table

    def first(self, nodes, slots, depth):
        routed = table(self, nodes, slots, depth)
        routed[:, : depth - 1] = routed[0, : depth - 1].clone()
        return routed

    patch.setattr(LockStep, "_table", first)


def torch_threads(patch) -> None:
    for module in (train, serve):
        patch.setattr(module, "pinned", lambda *_: nullcontext())


def fast_kernels(patch) -> None:
    patch.setattr(network, "adapt", partial(network.adapt, mode="fast"))


# --- rules 10 and 12: aggregates, plans -------------------------------------------------------------------------------


def unflushed(patch) -> None:
    """What a job holds of a slice that a deletion made dirty stays until the job ends."""
    patch.setattr(Trainer, "_flush", lambda *_: None)


def trunk_stays(patch) -> None:
    overwrite = trunk.Trunk.overwrite
    patch.setattr(trunk.Trunk, "overwrite", lambda self, cells=None: cells and overwrite(self, cells))


def moments_stay(patch) -> None:
    patch.setattr(optim.AdamW, "overwrite", lambda self: None)


def loss_log(patch) -> None:
    run = LockStep._steps

    def logged(self, nodes, optimizer, *rest):
        run(self, nodes, optimizer, *rest)
        with (self.folder.path / "losses.csv").open("a") as log:
            log.write(f"{nodes},{float(optimizer.flat.mean())}\n")

    patch.setattr(LockStep, "_steps", logged)


def stale_published(patch) -> None:
    """A node is written with the digests that were current when its training began."""
    train_all, then = Trainer.train, {}

    def publish(self, weights, ids):
        for (shard, path), tensors in weights.items():
            identity = self.folder.identity(shard, path, then, ids.get((shard, path[:-1]), ""))
            self.folder.nodes.put(identity, tensors, self.provenance)
        return list(weights)

    patch.setattr(
        Trainer, "train", lambda self, *args: (then.update(self.folder.ledger.slices()), train_all(self, *args))[1]
    )
    patch.setattr(Trainer, "_publish", publish)


def plan_from_records(patch) -> None:
    def fullest_last(self) -> StageTree:
        sizes = [0] * self.config.slices
        for shard, slice_ in self.ledger.slices():
            sizes[slice_] += len(self.records.get(shard, slice_))
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        return StageTree.from_sequences(len(sizes), [[order[k] for k in path] for path in self.config.tree().sequences])

    patch.setattr(StoreFolder, "tree", property(fullest_last))
