"""What is measured of forgetting: scores, tug of war, membership inference, forget quality; and memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ks_2samp, t, wasserstein_distance

from bench.approximate_cases import Case
from bench.unlearning_baselines import CHUNK, IGNORED, Predictor
from s3t_ext import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence import membership

UNITS = {"classification": "accuracy", "regression": "mae", "causal": "token accuracy"}
PARTS = ("forget", "retain", "test")


class Judged(NamedTuple):
    """What a model says of records, beside what they say themselves.

    Attributes:
        score: (n,) right or not; the absolute error in the unit of the head; the share of right tokens.
        loss: (n,) -log p, the squared error, or mean nats a token.
        values: (n, C) of a regression, in the unit of the head; else (n, 0).
    """

    score: np.ndarray
    loss: np.ndarray
    values: np.ndarray


def judge(predict: Predictor, table: Table, schema: Schema) -> Judged:
    """Judge answers: probabilities of classes (n, C), targets in their units, or probabilities of tokens (n, l, C)."""
    step = CHUNK // 5 if schema.task == "causal" else CHUNK
    found = [
        _judge(predict(table.inputs[at : at + step]), table.labels[at : at + step], schema)
        for at in range(0, len(table), step)
    ]
    return Judged(*(np.concatenate(part) for part in zip(*found)))


def _judge(answers: np.ndarray, labels: np.ndarray, schema: Schema) -> Judged:
    none = np.zeros((len(labels), 0))
    if schema.task == "classification":
        right = answers.argmax(-1) == labels
        return Judged(right.astype(np.float64), membership.log_loss(answers, labels), none)
    if schema.task == "regression":
        scale = np.array([target.scale for target in schema.targets])
        offset = np.array([target.offset for target in schema.targets])
        values = (answers.astype(np.float64) - offset) * scale  # (n, C)
        error = values - labels
        return Judged(np.abs(error).mean(1), (error**2).mean(1), values)
    rows, places = np.nonzero(labels != IGNORED)
    told = answers[rows, places - 1]  # (tokens, C)
    wanted = labels[rows, places]
    loss = -np.log(np.maximum(told[np.arange(len(rows)), wanted].astype(np.float64), 1e-30))
    count = np.maximum(1, np.bincount(rows, minlength=len(labels)))
    right = np.bincount(rows, told.argmax(-1) == wanted, minlength=len(labels)) / count
    return Judged(right, np.bincount(rows, loss, minlength=len(labels)) / count, none)


class Seen(NamedTuple):
    """A model, judged on all parts of a case."""

    parts: Mapping[str, Judged]  # forget, retain, test, others
    ratio: np.ndarray  # (n,) TOFU's truth ratio of the forgotten; empty elsewhere


def see(predict: Predictor, case: Case) -> Seen:
    """Judge a model on all parts of a case."""
    schema = case.data.schema
    parts = {name: judge(predict, getattr(case, name), schema) for name in (*PARTS, "others")}
    wrong = [np.exp(-judge(predict, table, schema).loss) for table in case.wrong]
    ratio = np.mean(wrong, 0) / np.exp(-parts["forget"].loss) if wrong else np.zeros(0)
    return Seen(parts, ratio)


def attack(seen: Seen) -> dict[str, float]:
    """Tell the forgotten from others by their loss: AUC, its standard error, TPR at 1% FPR."""
    members, others = (membership.by_loss(seen.parts[name].loss) for name in ("forget", "others"))
    area, error = membership.auc(members, others)
    return {"auc": area, "auc_se": error, "tpr": membership.tpr_at_fpr(members, others)}


def utility(seen: Seen, case: Case) -> float:
    """Score a model on the retained records as ``s3t unlearn`` does: accuracy, of a regression R^2."""
    if case.data.schema.task == "regression":
        return 1 - float(seen.parts["retain"].loss.mean() / case.retain.labels.var(0).mean())
    return float(seen.parts["retain"].score.mean())


def tug_of_war(seen: Seen, oracle: Seen) -> float:
    """Hold the scores on all three parts against the retrained oracle's.

        ToW = (1 - |dFA|) (1 - |dRA|) (1 - |dTA|)

    Notes:
        arXiv 2406.01257, section 3. Of a regression the mean absolute error in the unit of its head (100,000 dollars)
        stands for the accuracy, and a factor is at least 0.
    """
    apart = [abs(seen.parts[name].score.mean() - oracle.parts[name].score.mean()) for name in PARTS]
    return math.prod(max(0.0, 1 - float(d)) for d in apart)


def scores(seen: Seen, oracle: Seen) -> dict[str, Any]:
    """Give the columns of a model beside the oracle: scores, losses, and what the task alone has."""
    row = {name: float(seen.parts[name].score.mean()) for name in PARTS}
    row |= {f"{name}_loss": float(seen.parts[name].loss.mean()) for name in PARTS}
    row |= {f"oracle_{name}": float(oracle.parts[name].score.mean()) for name in PARTS}
    row |= {"tow": tug_of_war(seen, oracle), **attack(seen)}
    if seen.parts["forget"].values.size:
        ours, theirs = (one.parts["forget"].values[:, 0] for one in (seen, oracle))
        row["wasserstein"] = float(wasserstein_distance(ours, theirs))
    if len(seen.ratio):
        row["quality"] = float(ks_2samp(seen.ratio, oracle.ratio).pvalue)
    return row


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Give the mean over seeds and the half width of its 95% t-interval; NaN with one seed."""
    found: Sequence[float] = list(values)
    if len(found) < 2:
        return found[0], math.nan
    return fmean(found), float(t.ppf(0.975, len(found) - 1)) * stdev(found) / math.sqrt(len(found))


@contextmanager
def grown() -> Iterator[dict[str, float]]:
    """Measure by how many MB the process grows inside, at its peak, where Linux tells it."""
    found: dict[str, float] = {}
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        yield found
        return
    yield found
    found["megabytes"] = round((_status("VmHWM") - before) / 1e3, 1)


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))
