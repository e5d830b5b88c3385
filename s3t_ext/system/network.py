"""The frozen base with its adapted layers and the frozen head, as training, serving and verification share it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s3t_ext.ledger.identity import Key
from s3t_ext.lora.nn import MaskedLoRALinear, adapt, adapted_layers, matches, pack_layers
from s3t_ext.lora.routing import Routing
from s3t_ext.models.base import BaseModel
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.models.groups import layer_index, stages_by_layer
from s3t_ext.models.heads import NodeHeads, head_kind, orthonormal
from s3t_ext.models.trial import TOLERANCE, apart, probe
from s3t_ext.store.files import StoreError
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.folder import StoreFolder


class Network(nn.Module):
    """The frozen base with its adapted layers and its head: inputs to logits, or to the values of a regression.

    Args:
        base: changed in place; ``head``: (outputs, features) of a frozen head, else without elements.
        kind: of the head, see ``head_kind``; ``outputs``: C, 0 for a causal model.
        groups: rows of the routing table. Its columns are the slots of the stages and, where nodes train heads, one
            more: the slot of the head.

    Notes:
        ``answer(features(x, below(x, k), k))`` has the bits of ``forward(x)`` for every block k.
    """

    def __init__(self, base: BaseModel, head: Tensor, kind: str, outputs: int, config: Config, groups: int) -> None:
        super().__init__()
        self.kind = kind
        self.routing = adapt_base(base, config, groups)
        self.base = base
        self.layers = adapted_layers(base)
        if kind == "frozen":
            linear = nn.Linear(head.shape[1], head.shape[0], bias=False)
            linear.weight = nn.Parameter(head, requires_grad=False)
            self.plain = Routing(1, 0)
            self.head: Any = MaskedLoRALinear(linear, self.plain, slice(0, 0), config.rank, config.scale)
        elif kind == "trained":
            self.head = NodeHeads(self.routing, self.routing.add_column(), base.features, outputs)
        else:
            self.head = base.output

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.features(x))

    def features(self, x: Tensor, hidden: Tensor | None = None, block: int = 0) -> Tensor:
        """Give the features of inputs x; ``hidden``: from the state that enters a block."""
        return self.base(x) if hidden is None else self.base.above(hidden, x, block)

    def answer(self, features: Tensor) -> Tensor:
        """Give logits or values, in fp32, for features (n, F); of a causal model for hidden states (..., F)."""
        return self.head(features).float()

    def below(self, x: Tensor, block: int) -> Tensor:
        """Give the state that enters a block: of the base alone where ``block`` is at most ``trunk(depth)``."""
        return self.base.below(x, block)

    def state_shape(self, x: Tensor, block: int) -> tuple[int, ...]:
        """Find the shape of one record's state before a block, from a blank record like those of x (n, ...)."""
        blank = x.new_zeros(1, *x.shape[1:])
        with torch.no_grad():
            blank = (blank.float() if x.dtype == torch.uint8 else blank).to(self.device)
            return tuple(self.below(blank, block).shape[1:])

    def trunk(self, depth: int) -> int:
        """Give the number of blocks below every adapter that a node at this depth, or above, can have."""
        path, lowest = f"{self.base.blocks}.", len(self.base.block_list()) - 1
        for name, layer in self.layers.items():
            if any(stage < depth for stage in layer.stages):
                if not name.startswith(path):
                    return 0  # an adapter outside of the blocks may lie before all of them
                lowest = min(lowest, int(name.removeprefix(path).partition(".")[0]))
        return lowest

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.routing.table.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base computes in."""
        return next((t.dtype for t in self.base.parameters() if t.is_floating_point()), torch.float32)


def adapt_base(base: BaseModel, config: Config, groups: int) -> Routing:
    """Put adapters into a base model as a configuration says; raise ValueError where no layer fits it."""
    names = [n for n in base.adaptable() if matches(n, config.targets)]
    stage_of = None
    if config.placement == "layers":
        if config.targets == "all-linear":  # of the numbered layers: others belong to no group
            names = [n for n in names if layer_index(n, base.blocks) is not None]
        if not names:
            there = sorted(n for n in base.adaptable() if layer_index(n, base.blocks) is not None)
            raise ValueError(
                f"targets: expected a pattern for some of the linear layers in the blocks {base.blocks!r}, of which "
                f"placement 'layers' adapts a group at each stage, {there[:8]}, got {config.targets!r}"
            )
        stage_of = stages_by_layer(names, config.slices, base.blocks)
    found = names or config.targets  # no layer: what was asked for is told
    return adapt(
        base, found, stages=config.slices, groups=groups, rank=config.rank, scale=config.scale, stage_of=stage_of
    )


def weights(network: Network) -> int:
    """Count the weights that a row of a forward pass meets."""
    layers = [m for m in network.base.modules() if isinstance(m, MaskedLoRALinear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def shell(network: Network) -> Network:
    """Copy a network for another thread: all that a pass changes is its own, the frozen weights are shared."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in frozen_tensors(network)})


def frozen_tensors(network: Network) -> list[Tensor]:
    """List the weights of base and head, packed or plain, and their buffers."""
    found = [*network.base.parameters(), *network.base.buffers(), *network.head.buffers(), *network.head.parameters()]
    for layer in network.modules():
        if isinstance(layer, MaskedLoRALinear) and layer.packed is not None:
            found += [tensor for tensor in layer.packed if isinstance(tensor, Tensor)]
    return found


def declare_head(key: Key, schema: Schema, config: Config, base: BaseModel) -> np.ndarray:
    """Draw the frozen head that a store declares, (outputs, features); (0, features) where heads are of another kind.

    Raises:
        ValueError: no head of the configuration's kind for this task and model.
    """
    if head_kind(config.head, schema.task, schema.outputs, base.features) != "frozen":
        return np.zeros((0, base.features), np.float32)
    return orthonormal(key.derive("head").mac(), schema.outputs, base.features).numpy()


def load_network(folder: StoreFolder, groups: int, train: bool = False) -> Network:
    """Load the base and the head of a store, checked against what it recorded, packed for serving or training.

    Raises:
        StoreError: other weights, or other code over the same weights.
    """
    base = load_model(folder.base, folder.schema.task == "causal")
    if model_hash(base) != folder.base_hash:
        raise StoreError(f"{folder.base} is not the base model of this store; restore it from a backup")
    if folder.probe and not (distance := apart(folder.probe, probe(base))) <= TOLERANCE:
        raise StoreError(
            f"{folder.base}: the model's code gives other features than it did when the store was made, "
            f"{distance:.1e} of the largest away: bring back that code, or that version of its library; use a new "
            "store for another model"
        )
    schema, config = folder.schema, folder.config
    kind = head_kind(config.head, schema.task, schema.outputs, base.features)
    head = torch.from_numpy(folder.head().copy())
    base = base.to(getattr(torch, config.precision))
    network = Network(base, head, kind, schema.outputs, config, groups).eval()
    return pack_layers(network, backward=train)


def stack_pool(rows: Sequence[np.ndarray], layer: MaskedLoRALinear, part: str) -> Tensor:
    """Stack one part ("a" or "b") of adapters into a pool (N, r, K) or (N, r, O); N may be 0."""
    width = layer.in_features if part == "a" else layer.out_features
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, layer.rank, width)  # (N, r, K or O)
