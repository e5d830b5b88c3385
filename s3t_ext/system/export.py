"""Give a live node away as a PEFT adapter, registered in the ledger before it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import nn

from s3t_ext.lora.peft import to_peft
from s3t_ext.models.backbone import Patches
from s3t_ext.plan import Node, NodePath
from s3t_ext.store.beside import new_folder
from s3t_ext.store.files import StoreError, advice
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.network import Network, load_network
from s3t_ext.system.serving.paths import rooted
from s3t_ext.system.serving.pools import Adapters

ABOUT, HEAD = "s3t.json", "head.safetensors"


def export(path: Path | str, dest: Path | str, shard: int, slices: Sequence[int] | None = None) -> dict[str, Any]:
    """Write a live node as an adapter that ``PeftModel.from_pretrained(base, dest)`` loads, its head beside it.

    The adapters of all stages of the node are in it: of placement ``layers`` each layer's own, of ``stack`` one of the
    sum of the ranks. The ledger knows of it before anything is written: the receipt of everybody in its slices who is
    deleted later names it.

    Args:
        path: of the store; ``dest``: a new folder.
        shard: whose node; ``slices``: its path, the slices in training order; None: the node that serves.

    Returns:
        export (its folder), shard, slices, nodes (ids of the stages), rank, head (file, or "" where it is the base's).

    Raises:
        ValueError: the destination exists or lies in the store, there is no such shard, or its node is not live.
        StoreError, LedgerError: the store cannot be read or the folder not be written.
        ImportError: PEFT is not installed.
    """
    path = Path(path).absolute()
    dest = new_folder(dest, path)
    with StoreFolder(path) as folder:
        chain = _chain(folder, shard, None if slices is None else tuple(slices))
        stages = [folder.nodes.get(name)[1] for _, name in chain]
        network = load_network(folder, 1)
        names, cells = [name for _, name in chain], [(shard, k) for k in chain[-1][0][1]]
        folder.ledger.export(dest.name, "adapter", names, cells)
        still = folder.identities(folder.ledger.slices())
        if any(still.get(node) != name for node, name in chain):  # or healed since, as another node
            raise StoreError(
                f"a slice of shard {shard} was deleted meanwhile: nothing was written; ask for another node"
            )
        about = _about(folder, network, chain)
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".part", dir=dest.parent))
        except OSError as error:
            raise StoreError(f"cannot create {dest}: {error.strerror or error}; {advice(error)}") from error
        try:
            _write(part / "adapter", network, [node for node, _ in chain], stages)
            about["head"] = _write_head(part / "adapter", folder, stages[-1])
            (part / "adapter" / ABOUT).write_text(json.dumps(about, indent=1))
            os.rename(part / "adapter", dest)
        except OSError as error:
            raise StoreError(f"cannot write {dest}: {error.strerror or error}; {advice(error)}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {"export": str(dest), **about}


def _chain(folder: StoreFolder, shard: int, slices: NodePath | None) -> list[tuple[Node, str]]:
    """Give the stages of a node and their ids, the first one first."""
    shards = folder.shards
    if not 0 <= shard < shards:
        raise ValueError(f"shard: expected 0..{shards - 1}, got {shard}")
    live = folder.trained(folder.ledger.slices())
    mine = sorted(path for s, path in rooted(live) if s == shard)
    path = folder.best(live)[shard] if slices is None else slices
    if path not in mine:
        if not mine:
            raise ValueError(f"shard: {shard} has no live node")
        some = ", ".join(",".join(map(str, p)) for p in mine[:8])
        raise ValueError(f"slices: expected the path of a live node of shard {shard} ({some}, ...), got {slices}")
    return [((shard, path[:d]), live[shard, path[:d]]) for d in range(1, len(path) + 1)]


def _about(folder: StoreFolder, network: Network, chain: Sequence[tuple[Node, str]]) -> dict[str, Any]:
    (shard, path), _ = chain[-1]
    return {
        "shard": shard,
        "slices": list(path),
        "nodes": [name for _, name in chain],
        "base": folder.base_hash,
        "rank": folder.config.rank * (len(path) if folder.config.placement == "stack" else 1),
        "task": folder.schema.task,
        "classes": list(folder.schema.classes),
        "targets": [target.column for target in folder.schema.targets],
        "pooling": getattr(network.base, "pooling", ""),
    }


def _write(part: Path, network: Network, nodes: Sequence[Node], stages: Sequence[dict[str, np.ndarray]]) -> None:
    stack = network.layers and len(next(iter(network.layers.values())).stages) > 1
    pools = Adapters(network, [len(nodes)] if stack else [1] * network.routing.stages)
    row = [pools.load(node, "", tensors).slot for node, tensors in zip(nodes, stages, strict=True)]
    table = torch.full_like(network.routing.table[:1], -1)
    table[0, : len(row)] = torch.tensor(row, dtype=torch.int32)
    network.routing.table = table
    owner = _owner(network)
    to_peft(owner, part, routing=network.routing)
    _convolutions(owner, part)


def _owner(network: Network) -> nn.Module:
    """Give the module whose names PEFT will meet: the user's own, or that of the transformers library."""
    base: Any = network.base
    inner = getattr(base, "backbone", None) or getattr(base, "module", None) or base
    if getattr(base, "causal", False):
        owner = nn.Module()
        owner.add_module(inner.base_model_prefix, inner)  # as in the class with a language model's head
        return owner
    return inner


def _convolutions(owner: nn.Module, part: Path) -> None:
    """Give the adapters of patches, which are a linear layer here, as those of the convolution that PEFT will meet."""
    patches = {name: module for name, module in owner.named_modules() if isinstance(module, Patches)}
    file, described = part / "adapter_model.safetensors", part / "adapter_config.json"
    tensors, config = load_file(file), described.read_text()
    for name, module in patches.items():
        inner = f"base_model.model.{name}.linear.lora_"
        for key in [key for key in tensors if key.startswith(inner)]:
            value = tensors.pop(key)  # (R, c * p * q) or (O, R)
            shape = (*value.shape, 1, 1) if key.endswith("B.weight") else (len(value), -1, *module.size)
            tensors[key.replace(".linear.lora_", ".lora_")] = value.view(shape)
        for escape in (re.escape, str):  # in patterns, whose backslashes JSON doubles
            config = config.replace(json.dumps(escape(f"{name}.linear"))[1:-1], json.dumps(escape(name))[1:-1])
    if patches:
        save_tensors(tensors, file, metadata={"format": "pt"})
        described.write_text(config)


def _write_head(part: Path, folder: StoreFolder, tensors: dict[str, np.ndarray]) -> str:
    """Write a node's own head, or the frozen one of all."""
    head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    if not head and folder.schema.outputs and len(folder.head()):
        head = {"weight": folder.head().copy()}
    if not head:
        return ""
    save_file({name: np.ascontiguousarray(value) for name, value in head.items()}, part / HEAD)
    return HEAD
