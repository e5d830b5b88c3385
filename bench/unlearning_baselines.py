"""What S3T is held against: the base alone, heads on it, and all weights fine-tuned on all private data."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.datasets import Data
from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import load_model
from s3t_ext.models.heads import orthonormal
from s3t_ext.system.ingest import Table, lay_out

Predictor = Callable[[np.ndarray], np.ndarray]  # inputs (n, *shape) to scores (n, C)
CHUNK = 500


def without(table: Table, people: Set[str]) -> Table:
    """Give a table less the records of some people."""
    return rows_of(table, [i for i, names in enumerate(table.subjects) if people.isdisjoint(names)])


def rows_of(table: Table, rows: list[int]) -> Table:
    """Give some records of a table."""
    return Table([table.subjects[i] for i in rows], table.inputs[rows], table.labels[rows])


def features(model: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Compute a frozen base's features (n, F)."""
    with torch.no_grad():
        chunks = torch.from_numpy(inputs).split(CHUNK)
        return torch.cat([model(chunk) for chunk in chunks]).numpy()


def base_alone(data: Data, base: Path, key: Key) -> Predictor:
    """Give the base under the frozen head: what is served when nothing is learnt."""
    model = load_model(base)
    head = orthonormal(key.derive("head").mac(), len(data.schema.classes), model.features).numpy()
    return lambda inputs: features(model, inputs) @ head.T


def heads(data: Data, base: Path, key: Key, shards: int) -> tuple[Predictor, float]:
    """Train a linear head a shard on the frozen base, to convergence; their mean answers.

    Returns:
        The ensemble, and the seconds that one head takes: what a deletion costs, exactly retrained.
    """
    from sklearn.linear_model import LogisticRegression

    model = load_model(base)
    parts = [
        (features(model, part.inputs), part.labels) for part in lay_out(data.private, key, shards, 1).slices.values()
    ]
    start = time.perf_counter()
    fitted = [LogisticRegression(C=10.0, max_iter=5000).fit(x, y) for x, y in parts]
    seconds = (time.perf_counter() - start) / shards

    def predict(inputs: np.ndarray) -> np.ndarray:
        x, total = features(model, inputs), np.zeros((len(inputs), len(data.schema.classes)))
        for head in fitted:
            total[:, head.classes_] += head.predict_proba(x)
        return total

    return predict, seconds


def fine_tune(data: Data, base: Path, table: Table, seed: int, batch: int = 64) -> tuple[Predictor, float, int]:
    """Train all weights and a head on a table, by AdamW with a cosine schedule.

    Returns:
        The model, the seconds that training took, and the bytes of its weights.
    """
    epochs, lr = data.fine_tuning["epochs"], data.fine_tuning["lr"]
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_model(base).requires_grad_(True).train()
        head = nn.Linear(model.features, len(data.schema.classes))
        both = nn.Sequential(model, head)
        optimizer = torch.optim.AdamW(both.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=epochs * -(-len(table) // batch), pct_start=0.1
        )
        x, y = torch.from_numpy(table.inputs), torch.from_numpy(table.labels)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch):
                F.cross_entropy(both(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    seconds = time.perf_counter() - start
    both.eval()
    return lambda inputs: features(both, inputs), seconds, sum(p.nbytes for p in both.parameters())
