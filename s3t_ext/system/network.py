"""The frozen base with its adapted layers and the frozen head, as training, serving and verification share it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s3t_ext.lora.kernels import backend_for, native
from s3t_ext.lora.nn import MaskedLoRALinear, adapt, adapted_layers, matches, pack_layers
from s3t_ext.lora.routing import Routing
from s3t_ext.models.base import BaseModel
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.models.groups import layer_index, stages_by_layer
from s3t_ext.store.files import StoreError
from s3t_ext.system.config import Config
from s3t_ext.system.folder import StoreFolder


class Network(nn.Module):
    """The frozen base with its adapted layers and the frozen head: inputs to logits (n, classes)."""

    def __init__(self, base: BaseModel, head: Tensor, config: Config, groups: int) -> None:
        super().__init__()
        self.routing = adapt_base(base, config, groups)
        self.base = base
        self.layers = adapted_layers(base)
        linear = nn.Linear(head.shape[1], head.shape[0], bias=False)
        linear.weight = nn.Parameter(head, requires_grad=False)
        self.head = MaskedLoRALinear(linear, self.routing, slice(0, 0), config.rank, config.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))


def adapt_base(base: BaseModel, config: Config, groups: int) -> Routing:
    """Put adapters into a base model as a configuration says; raise ValueError where no layer fits it."""
    targets: str | Sequence[str] = config.targets
    stage_of = None
    names = [n for n in base.adaptable() if matches(n, targets)]
    if targets == "all-linear" and config.placement == "layers":  # of the numbered layers: others belong to no group
        names = [n for n in names if layer_index(n, base.blocks) is not None]
    if targets == "all-linear":
        targets = names
    if config.placement == "layers":
        stage_of = stages_by_layer(names, config.slices, base.blocks)
    return adapt(
        base, targets, stages=config.slices, groups=groups, rank=config.rank, scale=config.scale, stage_of=stage_of
    )


def load_network(folder: StoreFolder, groups: int, train: bool = False) -> Network:
    """Load the base and the head of a store, checked against the hashes it recorded, packed for serving or training."""
    base = load_model(folder.base)
    if model_hash(base) != folder.base_hash:
        raise StoreError(f"{folder.base} is not the base model of this store; restore it from a backup")
    network = Network(base, torch.from_numpy(folder.head().copy()), folder.config, groups).eval()
    return pack_layers(network, backward=train)


def provenance() -> dict[str, Any]:
    """Describe what may change bits without changing a node's identity.

    All but ``threads`` and ``isa`` must agree to compare: nodes are trained in fp32, of which our kernels give the same
    bits on every instruction set and any number of threads. ``cpu`` guards what torch's own operators choose.

    Raises:
        ValueError: S3T_CPU names no instruction set of this processor.
    """
    if native.AVAILABLE:  # S3T_CPU, before any work: a call without rows looks at nothing else
        ids = torch.empty(1, 0, dtype=torch.int32)
        native.shrink(torch.empty(0, 1), torch.empty(0, 1, 1), None, ids, None, None, 1.0)
    return {
        "s3t_ext": version("s3t-ext"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "libraries": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("MKL_", "ONEDNN_", "DNNL_", "ATEN_"))
        },
        "backend": backend_for("linear", torch.device("cpu"), torch.float32),
        "isa": native.build_info()["isa"] if native.AVAILABLE else "",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Name the processor's model: libraries choose their code by it."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        told = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in told.items()}
        parts = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
        return " ".join(fields[part] for part in parts if part in fields)
    return platform.processor()


def stack_pool(rows: Sequence[np.ndarray], layer: MaskedLoRALinear, part: str) -> Tensor:
    """Stack one part ("a" or "b") of adapters into a pool (N, r, K) or (N, r, O); N may be 0."""
    width = layer.in_features if part == "a" else layer.out_features
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, layer.rank, width)  # (N, r, K or O)
