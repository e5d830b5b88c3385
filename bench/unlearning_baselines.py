"""What S3T is held against: the base alone, heads on it, and all weights fine-tuned on all private data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.datasets import Data, Training
from s3t_ext import Schema
from s3t_ext.ledger.identity import Key
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length
from s3t_ext.models.folder import load_model
from s3t_ext.models.heads import orthonormal
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.tables import Table

Row = dict[str, Any]
Predictor = Callable[[np.ndarray], np.ndarray]  # inputs to scores (n, C), targets in their units, or (n, l, C)
CHUNK = 250
IGNORED = -100  # a label at which no loss is taken


def without(table: Table, people: Set[str]) -> Table:
    """Give a table less the records of some people."""
    return rows_of(table, [i for i, names in enumerate(table.subjects) if people.isdisjoint(names)])


def rows_of(table: Table, rows: list[int]) -> Table:
    """Give some records of a table."""
    return Table([table.subjects[i] for i in rows], table.inputs[rows], table.labels[rows])


# --- scores ----------------------------------------------------------------------------------------------------------


def score(predict: Predictor, schema: Schema, table: Table) -> Row:
    """Score answers: accuracy, the root of the mean squared error in the target's unit, or nats a token."""
    total, count = 0.0, 0
    chunk = CHUNK // 5 if schema.task == "causal" else CHUNK
    for start in range(0, len(table), chunk):
        labels = table.labels[start : start + chunk]
        found, seen = _judge(predict(table.inputs[start : start + chunk]), labels, schema)
        total, count = total + found, count + seen
    mean = total / count
    unit = {"classification": "accuracy", "regression": "rmse", "causal": "nats"}[schema.task]
    return {"value": round(mean**0.5 if unit == "rmse" else mean, 5), "unit": unit, "records": len(table)}


def _judge(answers: np.ndarray, labels: np.ndarray, schema: Schema) -> tuple[float, int]:
    if schema.task == "classification":
        return float((answers.argmax(-1) == labels).sum()), len(labels)
    if schema.task == "regression":
        return float(((answers - schema.values(labels)) ** 2).sum()), labels.size
    rows, places = np.nonzero(labels != IGNORED)
    chosen = answers[rows, places - 1, labels[rows, places]].astype(np.float64)  # (tokens,), foretold one before
    return float(-np.log(np.maximum(chosen, 1e-30)).sum()), len(rows)


# --- models ----------------------------------------------------------------------------------------------------------


def _outputs(model: BaseModel, head: nn.Module, inputs: np.ndarray, schema: Schema) -> Iterator[tuple[Tensor, Tensor]]:
    """Give rows and what head and model say of them, a padded length at a time; no record has a part in another's."""
    for rows, x in by_length(torch.from_numpy(schema.scaled(inputs))):
        yield rows, head(model(x))


@torch.no_grad()
def features(model: BaseModel, inputs: np.ndarray, schema: Schema) -> np.ndarray:
    """Compute a base's features (n, F)."""
    found = np.zeros((len(inputs), model.features), np.float32)
    for start in range(0, len(inputs), CHUNK):
        for rows, y in _outputs(model, nn.Identity(), inputs[start : start + CHUNK], schema):
            found[start + rows.numpy()] = y.numpy()
    return found


def predictor(model: BaseModel, head: nn.Module, schema: Schema) -> Predictor:
    """Give a model's answers: of a causal one the probabilities of each next token (n, l, C)."""

    @torch.no_grad()
    def predict(inputs: np.ndarray) -> np.ndarray:
        found: np.ndarray | None = None
        for rows, y in _outputs(model, head, inputs, schema):
            y = y.softmax(-1) if schema.task == "causal" else y
            if found is None:
                length = inputs.shape[1:2] if schema.task == "causal" else ()
                found = np.zeros((len(inputs), *length, y.shape[-1]), np.float32)
            place = (rows.numpy(), slice(y.shape[1])) if schema.task == "causal" else rows.numpy()
            found[place] = y.numpy()
        assert found is not None
        return schema.values(found) if schema.task == "regression" else found

    return predict


def train(
    model: BaseModel, head: nn.Module, table: Table, schema: Schema, how: Training, seed: int
) -> tuple[BaseModel, nn.Module]:
    """Train all weights of a model and its head on a table, in place, by AdamW with warm-up and a cosine."""
    labels = torch.from_numpy(table.labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.requires_grad_(True).train()
        parameters = list({id(p): p for p in [*model.parameters(), *head.parameters()]}.values())
        optimizer, schedule = how.optimizer(parameters, len(table))
        for _ in range(how.epochs):
            for rows in torch.randperm(len(table)).split(how.batch):
                for part, y in _outputs(model, head, table.inputs[rows], schema):
                    (loss(y, labels[rows[part]], schema.task) * len(part) / len(rows)).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model.requires_grad_(False).eval(), head.requires_grad_(False)


def loss(y: Tensor, labels: Tensor, task: str) -> Tensor:
    """Compute the mean loss of outputs (n, C), or of a causal model's (n, l, C)."""
    if task == "regression":
        return F.mse_loss(y, labels)
    if task == "causal":
        follows = labels[:, 1 : y.shape[1]]  # a token is foretold by the position before it
        return F.cross_entropy(y[:, :-1].flatten(0, 1), follows.flatten(), ignore_index=IGNORED)
    return F.cross_entropy(y, labels)


def head_of(model: BaseModel, schema: Schema) -> nn.Module:
    """Make a head: of a causal model its own output layer, else a linear one of zeros."""
    if schema.task == "causal":
        assert model.output is not None
        return model.output
    head = nn.Linear(model.features, schema.outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


# --- baselines -------------------------------------------------------------------------------------------------------


def base_alone(data: Data, base: Path, key: Key) -> Predictor:
    """Give the base under the head of a store without a node: what is served when nothing is learnt."""
    model = load_model(base, causal=data.schema.task == "causal")
    head = head_of(model, data.schema)
    if data.schema.task == "classification":
        frozen = orthonormal(key.derive("head").mac(), data.schema.outputs, model.features)
        head.load_state_dict({"weight": frozen, "bias": torch.zeros(len(frozen))})
    return predictor(model, head, data.schema)


def heads(data: Data, base: Path, key: Key, shards: int) -> tuple[Predictor, float]:
    """Train a linear head a shard on the frozen base, to convergence; their mean answers.

    Returns:
        The ensemble, and the processor's seconds that one head takes: what a deletion costs, exactly retrained.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    model, schema = load_model(base), data.schema
    parts = [
        (features(model, part.inputs, schema), part.labels)
        for part in lay_out(data.private, key, shards, 1).slices.values()
    ]
    start = time.process_time()
    classes = schema.task == "classification"
    fitted = [(LogisticRegression(C=10.0, max_iter=5000) if classes else Ridge()).fit(x, y) for x, y in parts]
    seconds = (time.process_time() - start) / shards

    def predict(inputs: np.ndarray) -> np.ndarray:
        x, total = features(model, inputs, schema), np.zeros((len(inputs), schema.outputs))
        for head in fitted:
            if classes:
                total[:, head.classes_] += head.predict_proba(x)
            else:
                total += head.predict(x).reshape(len(x), -1)
        return total / shards if classes else schema.values(total / shards)

    return predict, seconds


def fine_tune(data: Data, base: Path, table: Table, seed: int) -> tuple[Predictor, float, int]:
    """Train all weights and a head on a table.

    Returns:
        The model, the processor's seconds that training took, and the bytes of its weights.
    """
    model = load_model(base, causal=data.schema.task == "causal")
    start = time.process_time()
    model, head = train(model, head_of(model, data.schema), table, data.schema, data.fine_tuning, seed)
    seconds = time.process_time() - start
    weights = {id(p): p for p in [*model.parameters(), *head.parameters()]}
    return predictor(model, head, data.schema), seconds, sum(p.nbytes for p in weights.values())
