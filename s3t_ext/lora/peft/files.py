"""PEFT out: the sum of live adapters, written as one adapter that PEFT loads."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from s3t_ext.lora.check import wrong
from s3t_ext.lora.nn import MaskedLoRALinear, adapted_layers
from s3t_ext.lora.peft.layers import AdaptersLinear, SavedModules
from s3t_ext.lora.peft.model import MaskedLoRAModel
from s3t_ext.lora.peft.refused import load_peft
from s3t_ext.lora.routing import Routing

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's ways to begin that change the base weights


def to_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapters: Sequence[str] | None = None,
    *,
    routing: Routing | None = None,
    group: int = 0,
) -> None:
    """Write the sum of some adapters as one adapter: ``PeftModel.from_pretrained(base, folder)`` gives equal outputs.

    ``sum over n of scale[n] * B[n] A[n] = [scale[n] * B[n], ...] @ [A[n]; ...]``: ranks add up, PEFT's scaling is 1.

    Args:
        model: what ``from_peft`` returned; or any model adapted by ``adapt``, with its ``routing``.
        folder: where to write ``adapter_model.safetensors`` and ``adapter_config.json``; new or empty, and written
            whole or not at all.
        adapters: names, for a model of ``from_peft``; None: the active ones. Modules that one of them saves are written
            with it (PEFT's ``modules_to_save``).
        routing: the table of a model adapted by ``adapt``; ``group``: the row whose live adapters are written.

    Raises:
        ValueError: nothing is live, a name is unknown, ``folder`` holds something, or two adapters bring copies of the
            same module.
        NotImplementedError: an adapter that began by changing the base weights (PiSSA, ...): with the original base its
            file would give other outputs.
        ImportError: PEFT is not installed.

    Notes:
        Tensors are fp32 (a scale is multiplied into B in fp32), so that bf16 adapters lose nothing.
    """
    peft = load_peft()
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise wrong("folder", "one that is new or empty", target)
    tensors: dict[str, Tensor]
    if isinstance(model, MaskedLoRAModel) and routing is None:
        names = model.active if adapters is None else adapters
        parts = _named(model, names)
        tensors, common = _saved(model, names)
    elif routing is not None and adapters is None and not isinstance(model, MaskedLoRAModel):
        parts = _routed(model, routing, group)
        tensors, common = {}, {"base_model_name_or_path": getattr(model, "name_or_path", None) or None}
    else:
        wanted = "None for a model of from_peft; for one of adapt() its Routing, without names of adapters"
        raise wrong("routing", wanted, routing)
    if not parts:
        raise wrong("adapters", "at least one live adapter", "none")
    ranks = {name: sum(len(a) for a, _ in pairs) for name, pairs in parts.items()}
    for name, pairs in parts.items():
        tensors[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in pairs])  # (R, K)
        tensors[f"{name}.lora_B.weight"] = torch.cat([b for _, b in pairs]).t()  # (O, R)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}  # ^: whole names, not endings
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules="|".join(map(re.escape, ranks)),  # PEFT matches the whole name
        inference_mode=True,
        **common,
    )
    _write(target, {f"base_model.model.{name}": t.contiguous().cpu() for name, t in tensors.items()}, config)


def _pair(layer: MaskedLoRALinear, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """Give adapter n as A (r, K) and scale * B (r, O), fp32."""
    first = len(layer.a)
    pool: Any = (layer.a, layer.b) if n < first else layer.train_pool
    a, b = (t[n if n < first else n - first, :rank].detach().float() for t in pool)
    scale = layer.scale[n] if isinstance(layer.scale, Tensor) else layer.scale
    return a, b * scale


def _named(model: MaskedLoRAModel, names: Sequence[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Collect the named adapters of every layer that has one of them."""
    ids = model.ids_of(names, "adapters")
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, AdaptersLinear)}
    pairs = {name: [_pair(m, n, m.ranks[n]) for n in ids if m.ranks[n]] for name, m in layers.items()}
    return {name: found for name, found in pairs.items() if found}


def _routed(model: nn.Module, routing: Routing, group: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Collect the adapters of every layer that a row of the table names."""
    if not 0 <= group < len(routing.table):
        raise wrong("group", f"a row 0..{len(routing.table) - 1} of the table", group)
    row = routing.table[group].tolist()
    layers = adapted_layers(model)
    pairs = {name: [_pair(m, n, m.rank) for n in row[m.columns] if n >= 0] for name, m in layers.items()}
    return {name: found for name, found in pairs.items() if found}


def _saved(model: MaskedLoRAModel, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the modules that the adapters save, and what the configuration takes over from theirs."""
    configs = [model.configs[name] for name in names]
    for name, config in zip(names, configs):
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            raise NotImplementedError(
                f"adapters: {name!r} began as {config.init_lora_weights!r}, which changed the base weights: its file "
                "would give other outputs over the original base; save the base too, or convert the adapter in PEFT "
                "(path_initial_model_for_weight_conversion)"
            )
    modules = {place: m for place, m in model.model.named_modules() if isinstance(m, SavedModules)}
    owners = sorted({name for m in modules.values() for name in names if name in m.modules_to_save})
    if len(owners) > 1:
        raise ValueError(f"adapters: expected at most one with modules_to_save, got {owners}; write them one by one")
    common = {
        field: values.pop()
        for field in ("task_type", "base_model_name_or_path")
        if len(values := {getattr(config, field) for config in configs}) == 1
    }
    if not owners:
        return {}, common
    (owner,) = owners
    tensors = {
        f"{place}.{key}": value.detach().clone()
        for place, m in modules.items()
        if owner in m.modules_to_save
        for key, value in m.modules_to_save[owner].state_dict().items()
    }
    return tensors, {**common, "modules_to_save": model.configs[owner].modules_to_save}


def _write(target: Path, tensors: dict[str, Tensor], config: Any) -> None:
    """Write a folder beside its place, then rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(unfinished)
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
