"""Data sets read from a folder, split in a public, a private and a test part, with the settings declared for each.

The border between public and private is a function of a record alone (its class). What training needs (steps, learning
rate, rank) was found on public parts or is stated in the literature; none of it was fitted to a private record.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext import Config, Schema
from s3t_ext.system.ingest import Table

RECORDS_OF_A_PERSON = 2


@dataclass(frozen=True)
class Data:
    """What is trained on, and how.

    Args:
        public: what the base is pretrained on; None: the base is given.
        private: what people may have deleted; ``test``: never trained on.
        model: architecture and arguments of the base; ``epochs``: of its pretraining.
        configs: of a store, by placement.
        fine_tuning: epochs and learning rate of all weights on the whole private part.
        milliseconds: of one step of one node, on one thread, by placement; seconds of one evaluation of one shard: what
            the printed plan of time is made of.
    """

    name: str
    public: Table | None
    private: Table
    test: Table
    schema: Schema
    model: tuple[str, Mapping[str, Any]]
    epochs: int
    configs: Mapping[str, Config]
    fine_tuning: Mapping[str, Any]
    milliseconds: Mapping[str, float]
    evaluation: float


MNIST = {"public": 5000, "private": 10_000, "test": 2000}  # of 60,000 and 10,000 images
CIFAR10 = {"public": 5000, "private": 5000, "test": 1000}  # all there is of the classes
PUBLIC = range(5)  # classes 0-4 train the base, 5-9 are private
STACK = Config(shards=5, slices=4, strategy="subsets", placement="stack", lr=5e-3, steps=232)
LAYERS = replace(STACK, placement="layers", lr=1e-2)


def mnist(folder: Path, seed: int) -> Data:
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
    return Data(
        "mnist",
        **parts,
        schema=Schema(classes=tuple("56789"), shape=(1, 28, 28), scale=1 / 255, public_classes=tuple("01234")),
        model=("vit", {"shape": [1, 28, 28], "patch": 7}),
        epochs=15,
        configs={"stack": STACK, "layers": LAYERS},
        fine_tuning={"epochs": 10, "lr": 1e-3},
        milliseconds={"stack": 6.5, "layers": 4.5},
        evaluation=1.0,
    )


def cifar10(folder: Path, seed: int) -> Data:
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
    return Data(
        "cifar10",
        **parts,
        schema=Schema(classes=names[5:], shape=(3, 32, 32), scale=1 / 255, public_classes=names[:5]),
        model=("vit", {"shape": [3, 32, 32], "patch": 4}),
        epochs=15,
        configs={"stack": STACK, "layers": LAYERS},
        fine_tuning={"epochs": 15, "lr": 1e-3},
        milliseconds={"stack": 26.0, "layers": 18.0},
        evaluation=2.0,
    )


DATASETS = {"mnist": mnist, "cifar10": cifar10}


def idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _images(
    images: np.ndarray, labels: np.ndarray, classes: range, count: int, people: str, rng: random.Random
) -> Table:
    """Draw images of some classes; each person of a part owns two."""
    rows = rng.sample(np.flatnonzero(np.isin(labels, classes)).tolist(), count)
    subjects = [(f"{people} {i // RECORDS_OF_A_PERSON}",) for i in range(count)]
    return Table(subjects, images[rows].astype(np.float32) / 255, labels[rows].astype(np.int64) - classes[0])
