"""Data sets read from a folder, split in a public, a private and a test part, with the settings declared for each.

The border between public and private is a function of a record alone: its class, region or author. What training needs
(steps, learning rates, scaling) was found on public parts or is stated in the literature; nothing was fitted to a
private record. Subjects are invented where the data name none: two records each.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from bench import decoder
from s3t_ext import Config, Schema
from s3t_ext.system.data.schema import Column
from s3t_ext.system.data.tables import Table, as_table, read_table

RECORDS_OF_A_PERSON = 2


@dataclass(frozen=True)
class Training:
    """Of all weights, by AdamW."""

    epochs: int
    lr: float
    batch: int = 64
    weight_decay: float = 0.01

    def optimizer(self, parameters: Iterable[nn.Parameter], records: int) -> tuple[AdamW, LambdaLR]:
        """Make an optimizer and its schedule: warm-up over the first tenth, then half a cosine to zero."""
        steps = self.epochs * -(-records // self.batch)
        warm = max(1, steps // 10)

        def factor(step: int) -> float:
            return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))

        made = AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return made, LambdaLR(made, factor)


@dataclass(frozen=True)
class Data:
    """What is trained on, and how.

    Args:
        public: what the base is trained on, under ``public_schema``; None: the base is given.
        private: what people may have deleted; ``test``: never trained on.
        model: architecture and arguments of the base, or the folder of one that is given.
        configs: of a store, by placement.
        pretraining, fine_tuning: of the base, and of all weights on the private part.
        milliseconds: of one step of one node by placement, and of one record in ``fine_tuning``, on one thread;
            ``evaluation``: seconds of one path on the test part. Of them the printed plan of time is made.
    """

    name: str
    public: Table | None
    private: Table
    test: Table
    schema: Schema
    public_schema: Schema | None
    model: tuple[str, Mapping[str, Any]] | Path
    configs: Mapping[str, Config]
    pretraining: Training | None
    fine_tuning: Training
    milliseconds: Mapping[str, float]
    evaluation: float


# --- images ----------------------------------------------------------------------------------------------------------

MNIST = {"public": 5000, "private": 10_000, "test": 2000}  # of 60,000 and 10,000 images
CIFAR10 = {"public": 5000, "private": 5000, "test": 1000}  # all there is of the classes
PUBLIC = range(5)  # classes 0-4 train the base, 5-9 are private
STACK = Config(shards=5, slices=4, strategy="subsets", placement="stack", lr=5e-3, steps=232)
LAYERS = replace(STACK, placement="layers", lr=1e-2)


def mnist(folder: Path, seed: int, _: Path | None = None) -> Data:
    """Give MNIST: digits 0-4 public, 5-9 private, from idx files."""
    rng = random.Random(seed)
    parts = {}
    for part, name, classes in (
        ("public", "train", PUBLIC),
        ("private", "train", range(5, 10)),
        ("test", "t10k", range(5, 10)),
    ):
        images = idx(folder / "mnist" / f"{name}-images-idx3-ubyte.gz")[:, None]  # (n, 1, 28, 28)
        labels = idx(folder / "mnist" / f"{name}-labels-idx1-ubyte.gz")  # (n,)
        parts[part] = _images(images, labels, classes, MNIST[part], part, rng)
    schema = Schema(classes=tuple("56789"), shape=(1, 28, 28), scale=1 / 255, numbers="uint8")
    return Data(
        "mnist",
        **parts,
        schema=schema,
        public_schema=replace(schema, classes=tuple("01234")),
        model=("vit", {"shape": [1, 28, 28], "patch": 7}),
        configs={"stack": STACK, "layers": LAYERS},
        pretraining=Training(15, 2e-3),
        fine_tuning=Training(10, 1e-3),
        milliseconds={"stack": 6.5, "layers": 4.5, "full": 0.5},
        evaluation=1.0,
    )


def cifar10(folder: Path, seed: int, _: Path | None = None) -> Data:
    """Give a subset of CIFAR-10 in its binary layout: classes 0-4 public, 5-9 private."""
    rng = random.Random(seed)
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    parts = {}
    for part, name, classes in (
        ("public", "train_10k", PUBLIC),
        ("private", "train_10k", range(5, 10)),
        ("test", "test_2k", range(5, 10)),
    ):
        data = np.frombuffer(gzip.decompress((folder / "cifar10" / f"{name}.bin.gz").read_bytes()), np.uint8)
        rows = data.reshape(-1, 1 + 3 * 32 * 32)  # a label, then a plane each of red, green and blue
        parts[part] = _images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], classes, CIFAR10[part], part, rng)
    schema = Schema(classes=names[5:], shape=(3, 32, 32), scale=1 / 255, numbers="uint8")
    return Data(
        "cifar10",
        **parts,
        schema=schema,
        public_schema=replace(schema, classes=names[:5]),
        model=("vit", {"shape": [3, 32, 32], "patch": 4}),
        configs={"stack": replace(STACK, steps=116), "layers": replace(LAYERS, steps=116)},  # 232 are no better there
        pretraining=Training(15, 2e-3),
        fine_tuning=Training(15, 1e-3),
        milliseconds={"stack": 26.0, "layers": 18.0, "full": 2.5},
        evaluation=2.0,
    )


def idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _images(
    images: np.ndarray, labels: np.ndarray, classes: range, count: int, people: str, rng: random.Random
) -> Table:
    rows = rng.sample(np.flatnonzero(np.isin(labels, classes)).tolist(), count)
    return Table(_people(people, count), images[rows], labels[rows].astype(np.int64) - classes[0])


def _people(name: str, count: int) -> list[tuple[str, ...]]:
    return [(f"{name} {i // RECORDS_OF_A_PERSON}",) for i in range(count)]


# --- text ------------------------------------------------------------------------------------------------------------

SST2_LENGTH = 64  # tokens, as many as the longest sentence has
SST2_TEST = 900  # of 1,821 sentences: time
SST2 = Config(shards=5, slices=3, strategy="subsets", placement="stack", lr=2e-3, steps=116, precision="bfloat16")


def sst2(folder: Path, seed: int, model: Path | None = None) -> Data:
    """Give the whole sentences of SST-2 for an encoder that is given; all of them are private."""
    if model is None:
        raise ValueError("--model: expected the folder of an encoder for sst2, such as all-MiniLM-L6-v2, got none")
    schema, parts = Schema(classes=("negative", "positive"), max_length=SST2_LENGTH), {}
    for part, name in (("private", "train"), ("test", "test")):
        lines = (folder / "sst2" / f"sentence_{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t", 1) for line in lines]  # the label first
        random.Random(seed).shuffle(rows)
        rows = rows[:SST2_TEST] if part == "test" else rows
        labels = np.array([int(label) for label, _ in rows])
        parts[part] = as_table(Table(_people(part, len(rows)), [text for _, text in rows], labels), schema, model)
    return Data(
        "sst2",
        None,
        **parts,
        schema=schema,
        public_schema=None,
        model=model,
        configs={"stack": SST2, "layers": replace(SST2, placement="layers", steps=173)},
        pretraining=None,
        fine_tuning=Training(3, 5e-5, batch=32),
        milliseconds={"stack": 50.0, "layers": 40.0, "full": 35.0},
        evaluation=4.0,
    )


TOFU_LENGTH = 128  # tokens of a question and its answer
TOFU_PUBLIC, TOFU_TEST = range(100), range(160, 180)  # authors; the rest, 80 of 20 records each, are private
TOFU = Config(shards=2, slices=4, strategy="subsets", placement="stack", lr=5e-3, steps=116)


def tofu(folder: Path, seed: int, _: Path | None = None) -> Data:
    """Give TOFU's invented authors: 100 train a small decoder, 80 are private, each a person, 20 are held out."""
    authors: list[list[tuple[str, str]]] = []
    for name in ("retain90", "forget10"):
        lines = (folder / "tofu" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
        authors += [pairs[i : i + 20] for i in range(0, len(pairs), 20)]  # 20 of an author, one after the other
    words = decoder.words([text for k in TOFU_PUBLIC for pair in authors[k] for text in pair])
    schema = Schema(task="causal", input="question", label="answer", max_length=TOFU_LENGTH)
    private = [k for k in range(len(authors)) if k not in TOFU_PUBLIC and k not in TOFU_TEST]

    def part(chosen: Iterable[int]) -> Table:
        rows = [(f"author {k}", *pair) for k in chosen for pair in authors[k]]
        questions, answers = [question for _, question, _ in rows], [f" {answer}" for *_, answer in rows]
        with tempfile.TemporaryDirectory() as scratch:
            decoder.declare(Path(scratch), words)
            return as_table(Table([(name,) for name, *_ in rows], questions, answers), schema, scratch)

    return Data(
        "tofu",
        part(TOFU_PUBLIC),
        part(private),
        part(TOFU_TEST),
        schema,
        schema,
        ("decoder", {"words": words}),
        {"stack": TOFU, "layers": replace(TOFU, placement="layers", lr=1e-2)},
        Training(8, 5e-3, batch=16),
        Training(8, 2e-3, batch=16),
        {"stack": 60.0, "layers": 45.0, "full": 5.0},
        5.0,
    )


# --- numbers ---------------------------------------------------------------------------------------------------------

CALIFORNIA = {"private": 10_000, "test": 2000}
REGIONS = ("<1H OCEAN", "INLAND", "ISLAND", "NEAR BAY", "NEAR OCEAN")
COUNTS = ("total_rooms", "total_bedrooms", "population", "households", "median_income")  # read as logarithms
# Offsets and scales are round figures for the state: the middle of its map, a block of some hundred households, an
# income of 35,000 dollars. The 207 empty cells count 400 bedrooms.
INPUTS = (
    Column("longitude", -119.5, 0.5), Column("latitude", 36.0, 0.5), Column("housing_median_age", 28, 0.08),
    Column("total_rooms", math.log(2000), 1.3), Column("total_bedrooms", math.log(400), 1.3, blank=math.log(400)),
    Column("population", math.log(1100), 1.3), Column("households", math.log(400), 1.3),
    Column("median_income", math.log(3.5), 2.0), Column("ocean_proximity", values=REGIONS),
)  # fmt: skip
TABULAR = Config(shards=5, slices=4, strategy="subsets", placement="stack", lr=5e-3, steps=232)


def california(folder: Path, seed: int, _: Path | None = None) -> Data:
    """Give California housing: districts inland are public, those by the sea private; the value in dollars."""
    schema = Schema(
        task="regression",
        shape=(sum(column.width for column in INPUTS),),
        input=INPUTS,
        targets=(Column("median_house_value", 200_000, 1e-5),),
    )
    with (folder / "california_housing" / "housing.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        row |= {name: str(math.log(float(row[name]))) for name in COUNTS if row[name]}
    inland = [row for row in rows if row["ocean_proximity"] == "INLAND"]
    coast = [row for row in rows if row["ocean_proximity"] != "INLAND"]
    random.Random(seed).shuffle(coast)
    private, test = coast[: CALIFORNIA["private"]], coast[CALIFORNIA["private"] :][: CALIFORNIA["test"]]

    def part(name: str, chosen: list[dict[str, str]]) -> Table:
        with tempfile.TemporaryDirectory() as scratch:  # read as anybody's file would be
            path = Path(scratch) / "part.csv"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["subject", *chosen[0]])
                writer.writeheader()
                people = _people(name, len(chosen))
                writer.writerows({"subject": subject} | row for (subject,), row in zip(people, chosen))
            return read_table(path, schema)

    return Data(
        "california",
        part("public", inland),
        part("private", private),
        part("test", test),
        schema,
        schema,
        ("mlp", {"shape": list(schema.shape), "width": 64, "depth": 4}),
        {"stack": TABULAR, "layers": replace(TABULAR, placement="layers", lr=1e-2)},
        Training(30, 2e-3),
        Training(30, 1e-3),
        {"stack": 2.0, "layers": 1.5, "full": 0.1},
        0.2,
    )


DATASETS: dict[str, Callable[[Path, int, Path | None], Data]] = {
    "mnist": mnist, "cifar10": cifar10, "sst2": sst2, "california": california, "tofu": tofu,
}  # fmt: skip
