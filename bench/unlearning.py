"""S3T on real data beside what it competes with: accuracy by depth and under requests, time, storage.

    python -m bench.unlearning --data FOLDER [--model FOLDER] [--only mnist subsets-stack 0] [--plan]

FOLDER holds a folder for each data set. A run is cut in cells, one for each data set, method and seed, of minutes each;
the plan of them and of their time is printed first. What a cell makes stays in --work, its rows are appended to
unlearning.csv when it is whole, and a run does only those that are missing there: killed, it goes on.
`--only` takes names of data sets and methods, and seeds, in any order.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, unlearning_stores
from bench.datasets import DATASETS, Data
from bench.rows import RESULTS, append
from bench.unlearning_baselines import base_alone, fine_tune, heads, without
from bench.unlearning_rates import rates
from bench.unlearning_report import RATES, draw, table
from bench.unlearning_stores import Cell, Row, config_of, deleted_people, judged, parts_of_memory, people_in_turn
from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import build, save_model
from s3t_ext.models.pretrain import pretrain

COLUMNS = (
    *("data", "method", "seed", "metric", "x", "value", "unit", "records", "settings"),
    *("load", "device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
SEEDS = (0, 1, 2)
RETRAINED = 40  # requests after which all data less the deleted are trained on anew, beside the 40 people of `memory`


# --- methods ---------------------------------------------------------------------------------------------------------


def alone(cell: Cell) -> Iterator[Row]:
    """Score the base under the frozen head."""
    predict = base_alone(cell.data, cell.base, cell.key)
    yield {
        "metric": "score at depth",
        "x": 0,
        **judged(cell.data, predict(cell.data.test.inputs), cell.data.test.labels),
    }


def head_only(cell: Cell) -> Iterator[Row]:
    """Score linear heads on the frozen base, one a shard."""
    predict, seconds = heads(cell.data, cell.base, cell.key, cell.data.configs["stack"].shards)
    yield {"metric": "training", "value": round(seconds * cell.data.configs["stack"].shards, 3), "unit": "s"}
    yield {"metric": "retrained", "value": round(1e3 * seconds, 3), "unit": "ms"}
    yield {
        "metric": "score at depth",
        "x": 0,
        **judged(cell.data, predict(cell.data.test.inputs), cell.data.test.labels),
    }


def full(cell: Cell) -> Iterator[Row]:
    """Fine-tune all weights on all private data, which cannot forget; score those that would be deleted too."""
    predict, seconds, size = fine_tune(cell.data, cell.base, cell.data.private, cell.seed)
    yield {"metric": "training", "value": round(seconds, 3), "unit": "s"}
    yield {"metric": "stored", "x": "nodes", "value": size, "unit": "bytes"}
    for part, records in parts_of_memory(cell.data, cell.seed, _gone(cell)).items():
        yield {"metric": "score before", "x": part, **judged(cell.data, predict(records.inputs), records.labels)}


def retrain(cell: Cell) -> Iterator[Row]:
    """Fine-tune all weights on the rest: what each request costs where nothing is prepared."""
    for gone, metric in ((_gone(cell), "score after"), (set(people_in_turn(cell.data, cell.seed)[:RETRAINED]), "")):
        predict, seconds, _ = fine_tune(cell.data, cell.base, without(cell.data.private, gone), cell.seed)
        yield {"metric": "retrained", "value": round(1e3 * seconds, 3), "unit": "ms"}
        if metric:
            for part, records in parts_of_memory(cell.data, cell.seed, gone).items():
                yield {"metric": metric, "x": part, **judged(cell.data, predict(records.inputs), records.labels)}
        else:
            answers = predict(cell.data.test.inputs)
            yield {"metric": "score after", "x": RETRAINED, **judged(cell.data, answers, cell.data.test.labels)}


def _gone(cell: Cell) -> set[str]:
    usual = cell.data.configs["stack"]
    return deleted_people(cell.data, cell.seed, cell.key, usual.shards, usual.slices)


METHODS: dict[str, Callable[[Cell], Iterator[Row]]] = {
    "base": alone, "heads": head_only, "full": full, "retrain": retrain, **unlearning_stores.METHODS,
}  # fmt: skip


# --- cells -----------------------------------------------------------------------------------------------------------


def settings(data: Data, method: str) -> str:
    """Name what a cell's rows depend on beside code: another declared constant, and the cell is run again."""
    told: dict[str, Any] = {"model": data.model, "epochs": data.epochs, "sizes": [len(data.private), len(data.test)]}
    if method in unlearning_stores.METHODS:
        told |= dataclasses.asdict(config_of(data, method))
    else:
        told |= {"fine_tuning": data.fine_tuning, "stack": dataclasses.asdict(data.configs["stack"])}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def expected(data: Data, method: str) -> float:
    """Foretell the minutes of a cell, on one thread."""
    if method not in unlearning_stores.METHODS:
        return {"base": 0.1, "heads": 0.3, "full": 2.0, "retrain": 4.0}[method]
    config = config_of(data, method)
    steps = config.shards * config.tree().stages * config.steps
    cells = config.shards * config.slices
    evaluations = 1 if method == "unsharded" else config.slices + 0.7 * cells + 6
    seconds = steps * data.milliseconds[config.placement] / 1e3
    return (seconds + evaluations * config.shards * data.evaluation) / 60


def base_of(data: Data, seed: int, folder: Path) -> Path:
    """Pretrain the base on the public part, once; it appears whole."""
    base = folder / "base"
    if not base.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder))
        architecture, arguments = data.model
        torch.manual_seed(seed)
        model = build(architecture, dict(arguments))
        assert data.public is not None
        classes = len(data.schema.public_classes)
        pretrain(model, data.public.inputs, data.public.labels, classes, epochs=data.epochs, seed=seed)
        save_model(part, model, architecture, dict(arguments))
        part.rename(base)
    return base


def done(path: Path) -> set[tuple[str, str, int, str]]:
    """List the cells whose rows are there."""
    if not path.exists():
        return set()
    with path.open(newline="") as lines:
        return {(r["data"], r["method"], int(r["seed"]), r["settings"]) for r in csv.DictReader(lines)}


def rows(data: Data, method: str, seed: int, work: Path) -> Iterator[Row]:
    """Run one cell."""
    folder = work / data.name / str(seed)
    base = base_of(data, seed, folder)
    key = Key(Key(bytes(32)).derive(f"unlearning {seed}").mac())
    start = time.perf_counter()
    at = folder / f"{method}-{settings(data, method)}"
    at.mkdir(exist_ok=True)
    yield from METHODS[method](Cell(data, method, seed, base, at, key))
    yield {"metric": "cell", "value": round(time.perf_counter() - start, 1), "unit": "s"}
    shutil.rmtree(at)  # its rows are all that is wanted of it


def main(argv: list[str] | None = None) -> int:
    """Print the plan, run what is missing, append its rows, print the table, draw."""
    p = argparse.ArgumentParser(
        prog="python -m bench.unlearning", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--data", type=Path, help="folder of the data sets; without it the table alone is printed")
    p.add_argument("--only", nargs="+", default=[], help="names of data sets and methods, and seeds")
    p.add_argument("--plan", action="store_true", help="print the plan of time, and nothing else")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "s3t-unlearning")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    unknown = [n for n in args.only if n not in {*DATASETS, *METHODS, *map(str, SEEDS)}]
    if unknown:
        p.error(f"--only: expected some of {[*DATASETS, *METHODS, *SEEDS]}, got {unknown}")
    path = args.out / "unlearning.csv"
    if args.data:
        torch.set_num_threads(args.threads)
        _run(args, path)
    if path.exists() and not args.plan:
        print(table(path))
        for made in draw(path, args.out):
            print(f"drew {made}")
    return 0


def _chosen(names: Any, only: list[str]) -> list[Any]:
    return [name for name in names if str(name) in only] or list(names)


def _run(args: argparse.Namespace, path: Path) -> None:
    found, left = done(path), []
    print(f"{'data':<12}{'method':<18}{'seed':>4}  {'minutes on one thread':>21}")
    for seed in _chosen(SEEDS, args.only):
        for name in _chosen(DATASETS, args.only):
            data = DATASETS[name](args.data, seed)
            for method in _chosen(METHODS, args.only):
                there = (name, method, seed, settings(data, method)) in found
                minutes = expected(data, method)
                print(f"{name:<12}{method:<18}{seed:>4}  {'done' if there else f'{minutes:.1f}':>21}")
                if not there:
                    left.append((name, method, seed, minutes))
    print(f"{len(left)} cells, {sum(minutes for *_, minutes in left):.0f} minutes", flush=True)
    if args.plan:
        return
    if not any(cell[0] == RATES for cell in found):
        shared = {k: v for k, v in machine.describe("cpu", "bench.unlearning").items() if k in COLUMNS}
        append(path, [{"data": RATES, "seed": 0} | row | shared for row in rates(0)], COLUMNS)
    for name, method, seed, minutes in left:
        data = DATASETS[name](args.data, seed)
        shared = {k: v for k, v in machine.describe("cpu", "bench.unlearning").items() if k in COLUMNS}
        shared |= {"data": name, "method": method, "seed": seed, "settings": settings(data, method)}
        made = [row | shared | {"load": round(os.getloadavg()[0], 2)} for row in rows(data, method, seed, args.work)]
        append(path, made, COLUMNS)
        print(f"{name} {method} {seed}: {made[-1]['value'] / 60:.1f} minutes, foretold {minutes:.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
