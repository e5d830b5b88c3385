"""The adapters of the table: plain PEFT LoRA on S3T's base and under its head, made once for all methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.approximate_cases import Case, hashed
from bench.approximate_scores import Seen, see
from bench.datasets import Data
from bench.unlearning import base_of
from bench.unlearning_baselines import Predictor, head_of, predictor
from s3t_ext import Schema
from s3t_ext.approximate import Records
from s3t_ext.approximate.references import fine_tune
from s3t_ext.approximate.regression import absolute_error, relearn_steps
from s3t_ext.approximate.work import Work
from s3t_ext.ledger.identity import Key
from s3t_ext.models.base import BaseModel
from s3t_ext.models.folder import load_model
from s3t_ext.models.heads import orthonormal
from s3t_ext.system.config import Config
from s3t_ext.system.data.tables import Table, join

RELEARN = 300  # steps at most; relearn: of a method over those of the oracle, the anamnesis index


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


class Group:
    """What all cells of a data set, scenario and seed share, made once and kept in a folder."""

    def __init__(self, made: Case, folder: Path) -> None:
        self.case, self.folder = made, folder
        self.variant = folder / ("noisy" if made.scenario == "noisy" else "clean")  # the records that are trained on
        self.variant.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base(self) -> Path:
        return base_of(self.case.data, self.case.seed, self.folder)

    @cached_property
    def initial(self) -> Adapted:
        made = self.case
        return adapted(made.data, self.base, made.setting.config, made.key, made.seed)

    @cached_property
    def parts(self) -> tuple[Records, Records]:
        """Give the records to forget and those to keep."""
        schema = self.case.data.schema
        both = records(join([self.case.forget, self.case.retain]), schema)
        rows = torch.arange(len(both))
        return both[rows[: len(self.case.forget)]], both[rows[len(self.case.forget) :]]

    def _kept_at(self, name: str, kept: Callable[[], Records], where: Path) -> Adapted:
        how = self.case.setting.training
        path = where / f"{name}-{hashed(self.case.declared)}.safetensors"
        return kept_at(path, self.initial, lambda: trained(self.initial, kept(), how, self.case.seed))

    @cached_property
    def tuned(self) -> Adapted:
        return self._kept_at("tuned", lambda: records(self.case.data.private, self.case.data.schema), self.variant)

    @cached_property
    def retrained(self) -> Adapted:
        """Give the oracle: the adapter trained on the rest alone."""
        path = self.folder / self.case.scenario
        path.mkdir(exist_ok=True)
        return self._kept_at("oracle", lambda: self.parts[1], path)

    @cached_property
    def oracle(self) -> Seen:
        return self.see(self.retrained)

    @cached_property
    def control(self) -> Seen:
        return self.see(self.tuned)

    def relearnt(self, model: torch.nn.Module) -> int:
        """Count the steps after which a regression is as good on the forgotten as before."""
        (gone, _), limit = self.parts, 1.05 * absolute_error(self.tuned, self.parts[0])
        everything = records(self.case.data.private, self.case.data.schema)
        return relearn_steps(model, everything, gone, limit, seed=self.case.seed, limit=RELEARN)

    @cached_property
    def relearnt_by_oracle(self) -> int:
        return self.relearnt(self.retrained)

    def see(self, model: torch.nn.Module) -> Seen:
        return see(said_by(model, self.case.data.schema), self.case)
