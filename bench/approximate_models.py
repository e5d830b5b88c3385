"""The adapters of the table: plain PEFT LoRA on S3T's base and under its head; how they are trained and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.datasets import Data
from bench.unlearning_baselines import Predictor, head_of, predictor
from s3t_ext import Schema
from s3t_ext.approximate import Records
from s3t_ext.approximate.references import fine_tune
from s3t_ext.approximate.work import Work
from s3t_ext.ledger.identity import Key
from s3t_ext.models.base import BaseModel
from s3t_ext.models.folder import load_model
from s3t_ext.models.heads import orthonormal
from s3t_ext.system.config import Config
from s3t_ext.system.data.tables import Table


class Adapted(nn.Module):
    """A base with LoRA adapters, as PEFT puts them in, and a head: frozen, or of a regression trained with them."""

    def __init__(self, base: BaseModel, head: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, head

    def features(self, x: Tensor) -> Tensor:
        if self.base.vocabulary:
            x = x[:, : max(1, int((x >= 0).sum(1).max()))]  # columns where every text has ended
        return self.base(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def adapted(data: Data, base: Path, config: Config, key: Key, seed: int) -> Adapted:
    """Make the model before it meets a private record: B = 0, and the head that a store under this key has."""
    from peft import LoraConfig, inject_adapter_in_model

    task = data.schema.task
    model = load_model(base, causal=task == "causal")
    head = head_of(model, data.schema)
    if task == "classification":
        frozen = orthonormal(key.derive("head").mac(), data.schema.outputs, model.features)
        head.load_state_dict({"weight": frozen, "bias": torch.zeros(len(frozen))})
    lora = LoraConfig(r=config.rank, lora_alpha=config.scale * config.rank, target_modules=model.adaptable())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    head.requires_grad_(task == "regression")
    return Adapted(model, head).eval()


def records(table: Table, schema: Schema) -> Records:
    """Give a table's records as the model takes them, each with a name of its own."""
    inputs = torch.from_numpy(np.ascontiguousarray(schema.scaled(table.inputs)))
    names = tuple(f"{names[0]}, {i}" for i, names in enumerate(table.subjects))
    return Records(inputs, torch.from_numpy(table.labels), names)


def trained(model: Adapted, kept: Records, how: Mapping[str, Any], seed: int) -> Adapted:
    """Train a copy of a model on records, by the loop that retraining uses."""
    work = Work(copy.deepcopy(model), kept[torch.arange(0)], kept, str(kept.task), torch.Generator().manual_seed(seed))
    fine_tune(work, **how)
    return model_of(work.model)


def model_of(model: nn.Module) -> Adapted:
    assert isinstance(model, Adapted)
    return model


def said_by(model: nn.Module, schema: Schema) -> Predictor:
    """Give a model's answers: of classes probabilities, in float64: a loss near 0 is not rounded to it."""
    predict = predictor(model_of(model).base, model_of(model).head, schema)
    if schema.task != "classification":
        return predict

    def softmax(inputs: np.ndarray) -> np.ndarray:
        logits = predict(inputs).astype(np.float64)  # (n, C)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return softmax


def kept_at(path: Path, model: Adapted, make: Callable[[], Adapted]) -> Adapted:
    """Load a model's trainable weights, or make them and keep them.

    Args:
        model: of the same frozen weights; it is not changed.
    """
    if not path.exists():
        made = {name: p.detach().contiguous() for name, p in make().named_parameters() if p.requires_grad}
        part = path.with_suffix(".part")
        save_file(made, part)
        part.rename(path)
    found = copy.deepcopy(model)
    missing, unexpected = found.load_state_dict(load_file(path), strict=False)
    changing = {name for name, p in found.named_parameters() if p.requires_grad}
    assert not unexpected
    assert changing.isdisjoint(missing)
    return found
