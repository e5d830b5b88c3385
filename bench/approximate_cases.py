"""What is forgotten in the table of approximate methods, and all that is declared for it: sizes, training, settings.

Settings of a method that differ from its defaults were chosen on seed 100 alone, which is never reported.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.datasets import CIFAR10, DATASETS, MNIST, STACK, TABULAR, TOFU, Data, Training
from bench.unlearning_baselines import IGNORED, rows_of
from s3t_ext import Config, demo
from s3t_ext.ledger.identity import Key
from s3t_ext.ledger.partition import place
from s3t_ext.system.data.tables import Table

PEOPLE, AUTHORS = 30, 4  # forgotten together, from one slice of every shard, so that every shard of S3T goes on serving
CLASS = 2  # the third of the private classes is forgotten
NOISY = 0.1  # of the people: their labels are wrong, in training too, and they are forgotten
REGION = 1.5  # targets above it are forgotten, in units of the head: 350,000 dollars
WRONG = 3  # answers of others to a question, for TOFU's truth ratio


@dataclass(frozen=True)
class Setting:
    """What is declared for a data set.

    Args:
        scenarios: what is forgotten; ``private``, ``test``: records.
        training: of the adapter that is fine-tuned on all of them, and of the one on the rest.
        config: of S3T's store; its adapters' rank and scale are those of all methods.
        milliseconds: of one record in training, on one thread: for the printed plan of time.
        settings: by method, where they differ from its defaults.
    """

    scenarios: tuple[str, ...]
    private: int
    test: int
    training: Mapping[str, Any]
    config: Config
    milliseconds: float
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _training(epochs: int, learning_rate: float, batch: int = 32) -> dict[str, Any]:
    return {"epochs": epochs, "batch": batch, "learning_rate": learning_rate}


def _with(**of_images: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give settings by method; names are written with underscores."""
    return {name.replace("_", "-"): given for name, given in of_images.items()}


IMAGES = replace(STACK, shards=3, slices=3, lr=1e-2, steps=58)
ON_IMAGES = _with(  # chosen on digits
    fine_tune={"learning_rate": 5e-3},
    gradient_ascent={"learning_rate": 3e-4},
    neggrad_plus={"alpha": 0.9, "learning_rate": 0.05},
    laf={"epochs": 10, "unlearning_rate": 1e-3, "alignment_rate": 1e-3},
    laf_repair={"epochs": 10, "unlearning_rate": 1e-3, "alignment_rate": 1e-3, "repair_learning_rate": 1e-3},
    ssd_label_free={"alpha": 1.5},
    iau={"learning_rate": 0.2},
    prune_first={"settings": {"epochs": 20, "learning_rate": 0.01}},
    rum={"settings": [{"alpha": 0.9, "epochs": epochs, "learning_rate": 0.05} for epochs in (5, 5, 10)]},
)
ON_NUMBERS = _with(
    fine_tune={"learning_rate": 5e-3},
    gradient_ascent={"learning_rate": 3e-4},
    neggrad_plus={"alpha": 0.97},
    blindspot={"epochs": 10, "batch": 64, "learning_rate": 3e-3},
    gaussian={"epochs": 5, "learning_rate": 3e-3},
    ssd={"alpha": 1.5},
    ssd_label_free={"alpha": 3},
    iau={"learning_rate": 0.05},
    iau_released={"learning_rate": 3e-3},
    prune_first={"sparsity": 0.5, "settings": {"epochs": 10, "learning_rate": 5e-3}},
    l1_sparse={"gamma": 2e-3},
)
ON_TEXTS = _with(
    fine_tune={"learning_rate": 2e-3},
    neggrad_plus={"alpha": 0.9, "learning_rate": 1},
    laf={"epochs": 5, "unlearning_rate": 1e-3, "alignment_rate": 1e-3},
    laf_repair={"epochs": 5, "unlearning_rate": 1e-3, "alignment_rate": 1e-3},
    ssd={"alpha": 0.3, "lam": 0.1},
    ssd_label_free={"alpha": 0.8, "lam": 0.1},
    iau={"learning_rate": 400},
    iau_released={"learning_rate": 1.5e-3},
    prune_first={"sparsity": 0.98},
    l1_sparse={"gamma": 1e-3, "learning_rate": 0.03},
)
ON_STORIES = _with(
    fine_tune={"learning_rate": 0.02},
    gradient_ascent={"learning_rate": 4e-4},
    neggrad_plus={"alpha": 0.9, "learning_rate": 0.4},
    ssd={"alpha": 5},
    ssd_label_free={"alpha": 2},
    iau={"learning_rate": 3},
    iau_released={"learning_rate": 0.01},
    prune_first={"sparsity": 0.9, "settings": {"epochs": 10, "learning_rate": 0.01}},
    l1_sparse={"learning_rate": 0.2},
    rum={"settings": [{"alpha": 0.9, "epochs": epochs, "learning_rate": 0.3} for epochs in (2, 2, 4)]},
)
COASTS, STORIES = replace(TABULAR, shards=3, slices=3, steps=116), replace(TOFU, slices=3, steps=58)
ENCODER = replace(IMAGES, lr=2e-3, precision="bfloat16")
SETTINGS = {
    "digits": Setting(("people", "class", "noisy"), 240, 179, _training(40, 2e-3), IMAGES, 0.9, ON_IMAGES),
    "mnist": Setting(("people", "class", "noisy"), 300, 800, _training(40, 2e-3), IMAGES, 1.0, ON_IMAGES),
    "cifar10": Setting(("people", "class"), 400, 500, _training(20, 2e-3), IMAGES, 4.0, ON_IMAGES),
    "sst2": Setting(("people",), 200, 300, _training(10, 1e-3), ENCODER, 20.0, ON_TEXTS),
    "california": Setting(("people", "region"), 600, 1000, _training(60, 3e-3), COASTS, 0.4, ON_NUMBERS),
    "tofu": Setting(("authors",), 480, 200, _training(10, 5e-3), STORIES, 5.0, ON_STORIES),
}


class Case(NamedTuple):
    """What one scenario forgets and keeps, of one seed."""

    data: Data
    scenario: str
    seed: int
    forget: Table
    retain: Table
    test: Table  # of what is to be known after it: without the class or the region
    others: Table  # never trained on, of the distribution of ``forget``
    wrong: tuple[Table, ...] = ()  # the forgotten questions with answers of others

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.data.name]

    @property
    def declared(self) -> dict[str, Any]:
        """Give what its records and its adapter depend on."""
        of_forgetting = [PEOPLE, AUTHORS, CLASS, NOISY, REGION, WRONG]
        told = {"sizes": [self.setting.private, self.setting.test], "training": dict(self.setting.training)}
        adapter = [self.setting.config.rank, self.setting.config.scale]
        return told | {"adapter": adapter, "forgotten": of_forgetting, "pretraining": str(self.data.pretraining)}

    @property
    def key(self) -> Key:
        """Give what S3T places by, and its frozen head comes from."""
        return key_of(self.seed)


def key_of(seed: int) -> Key:
    """Give a seed's key."""
    return Key(Key(bytes(32)).derive(f"approximate {seed}").mac())


def digits(_: Path, seed: int, __: Path | None = None) -> Data:
    """Give scikit-learn's digits as the demo splits them."""
    public, private, test = demo.parts(seed)
    return Data(
        "digits", public, private, test, demo.SCHEMA, replace(demo.SCHEMA, classes=demo.PUBLIC, public_classes=()),
        ("vit", {}), {"stack": IMAGES}, Training(60, 2e-3), Training(10, 1e-3), {"stack": 4.0, "full": 0.5}, 0.2,
    )  # fmt: skip


READ: dict[str, Callable[[Path, int, Path | None], Data]] = {"digits": digits, **DATASETS}
assert MNIST["private"] >= 1000
assert CIFAR10["private"] >= 800


def read(name: str, folder: Path, seed: int, model: Path | None) -> Data:
    """Read a data set, cut to what is declared here; two records a person, of one class or side of the region."""
    data, setting = READ[name](folder, seed, model), SETTINGS[name]
    private, test = (
        rows_of(part, list(range(min(count, len(part)))))
        for part, count in ((data.private, setting.private), (data.test, setting.test))
    )
    if data.schema.task != "causal":
        private = replace(private, subjects=_paired(kinds(data, private)))
    return replace(data, private=private, test=test, configs={"stack": setting.config})


def kinds(data: Data, table: Table) -> np.ndarray:
    """Give what a record is forgotten for, (n,): its class, or whether its target lies in the region."""
    return table.labels[:, 0] > REGION if data.schema.task == "regression" else table.labels


def _paired(kind: np.ndarray) -> list[tuple[str, ...]]:
    owners, seen = [], dict[Any, int]()
    for value in kind.tolist():
        seen[value] = seen.get(value, -1) + 1
        owners.append((f"person {int(value)} {seen[value] // 2}",))
    return owners


def case(data: Data, scenario: str, seed: int) -> Case:
    """Split a data set as a scenario says."""
    return SCENARIOS[scenario](data, seed)


def _split(data: Data, scenario: str, seed: int, gone: np.ndarray, test: np.ndarray, others: np.ndarray) -> Case:
    parts = [_take(data.private, gone), _take(data.private, ~gone), _take(data.test, test), _take(data.test, others)]
    return Case(data, scenario, seed, *parts)


def _take(table: Table, rows: np.ndarray) -> Table:
    return rows_of(table, np.flatnonzero(rows).tolist())


def _people(data: Data, seed: int, scenario: str, count: int) -> Case:
    """Forget people drawn from one slice of every shard, as deletions between two healings may be."""
    config, rng = SETTINGS[data.name].config, random.Random(f"forgotten {seed}")
    cells = {(shard, rng.randrange(config.slices)) for shard in range(config.shards)}
    names = sorted({names[0] for names in data.private.subjects})
    key = key_of(seed)
    near = [name for name in names if place(key, name, config.shards, config.slices) in cells]
    chosen = set(rng.sample(near, min(count, len(near))))
    gone = np.array([names[0] in chosen for names in data.private.subjects])
    everything = np.ones(len(data.test), bool)
    return _split(data, scenario, seed, gone, everything, everything)


def _authors(data: Data, seed: int) -> Case:
    """Forget authors; each of their questions also gets answers of authors who are held out, to one place in theirs."""
    made = _people(data, seed, "authors", AUTHORS)
    wrong = tuple(
        replace(made.forget, **_answered(made.forget, made.test, [20 * k + i % 20 for i in range(len(made.forget))]))
        for k in range(min(WRONG, len(made.test) // 20))
    )
    return made._replace(wrong=wrong)


def _answered(questions: Table, answers: Table, rows: list[int]) -> dict[str, np.ndarray]:
    """Give token ids and labels of questions with answers of another table, cut at the same length."""
    inputs, labels = np.full_like(questions.inputs, -1), np.full_like(questions.labels, IGNORED)
    for i, row in enumerate(rows):
        start = int(np.flatnonzero(questions.labels[i] != IGNORED)[0])
        answer = answers.inputs[row][answers.labels[row] != IGNORED][: inputs.shape[1] - start]
        inputs[i, :start] = questions.inputs[i, :start]
        inputs[i, start : start + len(answer)] = labels[i, start : start + len(answer)] = answer
    return {"inputs": inputs, "labels": labels}


def _kind(data: Data, seed: int, scenario: str, wanted: Any) -> Case:
    """Forget all records of a class or a region."""
    there = kinds(data, data.test) == wanted
    return _split(data, scenario, seed, kinds(data, data.private) == wanted, ~there, there)


def _noisy(data: Data, seed: int) -> Case:
    """Forget people whose labels are wrong; those who stand beside them are given wrong ones alike."""
    rng, classes = random.Random(f"noisy {seed}"), len(data.schema.classes)
    names = sorted({names[0] for names in data.private.subjects})
    chosen = set(rng.sample(names, round(NOISY * len(names))))
    gone = np.array([names[0] in chosen for names in data.private.subjects])
    shift = np.array([rng.randrange(1, classes) for _ in range(len(data.private) + len(data.test))])
    own, theirs = shift[: len(gone)], shift[len(gone) :]
    private = replace(data.private, labels=np.where(gone, (data.private.labels + own) % classes, data.private.labels))
    everything = np.ones(len(data.test), bool)
    made = _split(replace(data, private=private), "noisy", seed, gone, everything, everything)
    return made._replace(others=replace(data.test, labels=(data.test.labels + theirs) % classes))


SCENARIOS: dict[str, Callable[[Data, int], Case]] = {
    "people": lambda data, seed: _people(data, seed, "people", PEOPLE),
    "authors": _authors,
    "class": lambda data, seed: _kind(data, seed, "class", CLASS),
    "region": lambda data, seed: _kind(data, seed, "region", True),
    "noisy": _noisy,
}


def hashed(told: Any) -> str:
    """Name what was declared, in twelve letters."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
