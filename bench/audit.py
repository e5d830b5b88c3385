"""Audits on real images: digits, and MNIST where its folder is given. Classes 0-4 are public, 5-9 private.

    python -m bench.audit [--seeds 0 1 2] [--data FOLDER] [--out FOLDER]

FOLDER holds MNIST's idx files, gzipped. A store is trained, people are deleted from it, and it is audited. Rows are
appended to audit.csv.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import machine
from bench.datasets import idx
from bench.rows import RESULTS, append
from s3t_ext import demo
from s3t_ext.ledger.identity import Key
from s3t_ext.ledger.partition import place
from s3t_ext.models.folder import build, save_model
from s3t_ext.models.pretrain import pretrain
from s3t_ext.system.audit import ORACLES, POWER, audit
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.fit import fit
from s3t_ext.system.unlearn import delete

MODELS = ("before", "served", *ORACLES)
COLUMNS = (
    *("data", "seed", "shards", "slices", "records", "references", "group", "attack", "members", "others"),
    *(f"{model}{what}" for model in MODELS for what in ("", "_se", "_tpr")),
    *(f"{model}_{what}" for model in ORACLES for what in ("difference", "difference_se", "bound", "within")),
    *("moved", "seen", "seconds", "device", "versions", "commit", "dirty", "utc", "command"),
)
DELETED = 40  # people, from one slice of every shard
CANARIES, REFERENCES, ISOLATION = 40, 4, 2
MNIST = {"public": 4000, "private": 4000, "test": 1000}  # of 60,000 and 10,000


class Data(NamedTuple):
    """A public, a private and a test part, and how a store is made of them."""

    public: Table
    private: Table
    test: Table
    schema: Schema
    config: Config
    model: dict[str, Any]
    epochs: int


def digits(seed: int) -> Data:
    """Give scikit-learn's digits as the demo splits them."""
    return Data(*demo.parts(seed), demo.SCHEMA, demo.CONFIG, {}, 60)


def mnist(folder: Path, seed: int) -> Data:
    """Give a subset of MNIST: private and public images of the training part, test images of the test part."""
    rng = random.Random(seed)

    def part(name: str, classes: range, count: int, people: str) -> Table:
        images = idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None]  # (n, 1, 28, 28)
        labels = idx(folder / f"{name}-labels-idx1-ubyte.gz")  # (n,)
        rows = rng.sample(np.flatnonzero(np.isin(labels, classes)).tolist(), count)
        subjects = [(f"{people} {i // 2}",) for i in range(count)]
        return Table(subjects, images[rows].astype(np.float32) / 255, labels[rows].astype(np.int64) - classes[0])

    return Data(
        part("train", range(5), MNIST["public"], "volunteer"),
        part("train", range(5, 10), MNIST["private"], "person"),
        part("t10k", range(5, 10), MNIST["test"], "tester"),
        replace(demo.SCHEMA, shape=(1, 28, 28), scale=1 / 255),
        replace(demo.CONFIG, lr=5e-3, steps=232),
        {"shape": [1, 28, 28], "patch": 7},
        15,
    )


def rows(name: str, data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """Train, delete, audit; a row for each group and attack, and for each slice of which isolation was tested."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        base, store = Path(scratch) / "base", Path(scratch) / "store"
        torch.manual_seed(seed)
        model = build("vit", data.model)
        pretrain(model, data.public.inputs, data.public.labels, 5, epochs=data.epochs, seed=seed)
        save_model(base, model, "vit", data.model)
        key = Key(bytes(32)).derive(f"audit {seed}")
        fit(store, data.private, data.schema, base, data.config, key=key.mac(), progress=False)
        delete(store, _people(data, Key(key.mac()), seed))
        report = audit(
            store,
            data.private,
            nonmembers=data.test,
            canaries=CANARIES,
            references=REFERENCES,
            isolation=ISOLATION,
            seed=seed,
            progress=False,
        )
    shared = {
        "data": name,
        "seed": seed,
        "shards": data.config.shards,
        "slices": data.config.slices,
        "records": len(data.private),
        "references": REFERENCES,
        "seconds": round(time.perf_counter() - start, 1),
    }
    for group, found in report["groups"].items():
        for attack, row in found["attacks"].items():
            sizes = {"members": found["members"], "others": found["others"]}
            cells = {_column(model, name): value for model in row for name, value in row[model].items()}
            yield {**shared, "group": group, "attack": attack, **sizes, **cells}
    for row in report["isolation"]:
        told = {"members": row["nodes"], "moved": len(row["differing"]), "seen": row["moved"]}
        yield {**shared, "group": "isolation", "attack": row["change"], **told}


def _column(model: str, name: str) -> str:
    return model if name == "auc" else f"{model}_{name}"


def _people(data: Data, key: Key, seed: int) -> list[str]:
    """Draw people to delete from one slice of every shard, so that every shard goes on serving."""
    rng = random.Random(f"deleted {seed}")
    cells = {(shard, rng.randrange(data.config.slices)) for shard in range(data.config.shards)}
    names = sorted({names[0] for names in data.private.subjects})
    return rng.sample([n for n in names if place(key, n, data.config.shards, data.config.slices) in cells], DELETED)


def main(argv: list[str] | None = None) -> int:
    """Audit, append rows, print them; 1 where a row differs from the oracle or a control is below 0.70."""
    p = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--data", type=Path, help="folder with MNIST's idx files; without it MNIST is skipped")
    p.add_argument("--only", choices=("digits", "mnist"), help="one of the two")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    shared = {k: v for k, v in machine.describe("cpu", "bench.audit").items() if k in COLUMNS}
    if not args.data:
        print("mnist: skipped, no --data")
    wrong = 0
    for name in ("digits", "mnist"):
        if (name == "mnist" and not args.data) or args.only not in (None, name):
            continue
        for seed in args.seeds:
            found = [
                row | shared for row in rows(name, digits(seed) if name == "digits" else mnist(args.data, seed), seed)
            ]
            append(args.out / "audit.csv", found, COLUMNS)
            print("\n".join(map(_line, found)), flush=True)
            control = max(row["before"] for row in found if row["group"] == "canaries")
            wrong += sum(map(_wrong, found)) + (control < POWER)
    print(f"{wrong} rows differ from the oracle or have no power")
    return int(wrong > 0)


def _wrong(row: dict[str, Any]) -> bool:
    return bool(row["moved"]) or not row["seen"] if row["group"] == "isolation" else not row["oracle_within"]


def _line(row: dict[str, Any]) -> str:
    head = f"{row['data']:<7}{row['seed']:>3} {row['group']:<10}{row['attack']:<11}"
    if row["group"] == "isolation":
        return f"{head}{row['moved']} of {row['members']} nodes that never saw the slice moved"
    cells = "".join(f"{row[m]:>8.3f}+-{row[f'{m}_se']:.3f}" if m in row else " " * 15 for m in MODELS)
    gaps = (f"{row[f'{m}_difference']:+.3f} ({row[f'{m}_bound']:.3f})" for m in ORACLES)
    return f"{head}{cells}   {', '.join(gaps)}"


if __name__ == "__main__":
    sys.exit(main())
