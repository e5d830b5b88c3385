"""S3T on real data beside what it competes with: accuracy by depth and under requests, time, storage.

    python -m bench.unlearning --data FOLDER [--model FOLDER] [--only mnist subsets-stack 0] [--plan]

FOLDER holds a folder for each data set. A run is cut in cells, one for each data set, method and seed, of minutes each;
the plan of them and of their time is printed first. What a cell makes stays in --work, its rows are appended to
unlearning.csv when it is whole, and a run does only those that are missing there: killed, it goes on. Several runs may
go on beside each other, each with a choice of its own.
`--only` takes names of data sets and methods, and seeds, in any order.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
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

from bench import decoder, machine, unlearning_stores
from bench.datasets import DATASETS, Data
from bench.rows import RESULTS, append
from bench.unlearning_baselines import Row, base_alone, fine_tune, head_of, heads, score, train, without
from bench.unlearning_rates import rates
from bench.unlearning_report import RATES, draw, table
from bench.unlearning_stores import Cell, config_of, deleted_people, parts_of_memory, people_in_turn
from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import build, save_model

COLUMNS = (
    *("data", "method", "seed", "metric", "x", "value", "unit", "records", "settings"),
    *("load", "device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
SEEDS = (0, 1, 2)
RETRAINED = 40  # requests after which all data less the deleted are trained on anew, beside the 40 people of `memory`


# --- methods ---------------------------------------------------------------------------------------------------------


def alone(cell: Cell) -> Iterator[Row]:
    """Score the base under the head of a store without a node."""
    predict = base_alone(cell.data, cell.base, cell.key)
    yield {"metric": "score at depth", "x": 0, **score(predict, cell.data.schema, cell.data.test)}


def head_only(cell: Cell) -> Iterator[Row]:
    """Score linear heads on the frozen base, one a shard."""
    shards = cell.data.configs["stack"].shards
    predict, seconds = heads(cell.data, cell.base, cell.key, shards)
    yield {"metric": "training", "value": round(seconds * shards, 3), "unit": "s of processors"}
    yield {"metric": "retrained", "value": round(1e3 * seconds, 3), "unit": "ms of processors"}
    yield {"metric": "score at depth", "x": 0, **score(predict, cell.data.schema, cell.data.test)}


def full(cell: Cell) -> Iterator[Row]:
    """Fine-tune all weights on all private data, which cannot forget; score those that would be deleted too."""
    predict, seconds, size = fine_tune(cell.data, cell.base, cell.data.private, cell.seed)
    yield {"metric": "training", "value": round(seconds, 3), "unit": "s of processors"}
    yield {"metric": "stored", "x": "nodes", "value": size, "unit": "bytes"}
    for part, records in parts_of_memory(cell.data, cell.seed, _gone(cell)).items():
        yield {"metric": "score before", "x": part, **score(predict, cell.data.schema, records)}


def retrain(cell: Cell) -> Iterator[Row]:
    """Fine-tune all weights on the rest: what each request costs where nothing is prepared."""
    together, one_by_one = _gone(cell), set(people_in_turn(cell.data, cell.seed)[:RETRAINED])
    for gone, parts in (
        (together, parts_of_memory(cell.data, cell.seed, together)),
        (one_by_one, {str(RETRAINED): cell.data.test}),
    ):
        predict, seconds, _ = fine_tune(cell.data, cell.base, without(cell.data.private, gone), cell.seed)
        yield {"metric": "retrained", "value": round(1e3 * seconds, 3), "unit": "ms of processors"}
        for part, records in parts.items():
            yield {"metric": "score after", "x": part, **score(predict, cell.data.schema, records)}


def _gone(cell: Cell) -> set[str]:
    usual = cell.data.configs["stack"]
    return deleted_people(cell.data, cell.seed, cell.key, usual.shards, usual.slices)


METHODS: dict[str, Callable[[Cell], Iterator[Row]]] = {
    "base": alone, "heads": head_only, "full": full, "retrain": retrain, **unlearning_stores.METHODS,
}  # fmt: skip


# --- cells -----------------------------------------------------------------------------------------------------------


def settings(data: Data, method: str) -> str:
    """Name what a cell's rows depend on beside code: another declared constant, and the cell is run again."""
    model = data.model.name if isinstance(data.model, Path) else data.model
    told: dict[str, Any] = {"model": model, "sizes": [len(data.private), len(data.test)]}
    told |= {"pretraining": data.pretraining and dataclasses.asdict(data.pretraining)}
    if method in unlearning_stores.METHODS:
        told |= dataclasses.asdict(config_of(data, method))
    else:
        told |= {
            "fine_tuning": dataclasses.asdict(data.fine_tuning),
            "stack": dataclasses.asdict(data.configs["stack"]),
        }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def expected(data: Data, method: str) -> float:
    """Foretell the minutes of a cell, on one thread."""
    if method not in unlearning_stores.METHODS:
        whole = len(data.private) * data.fine_tuning.epochs * data.milliseconds["full"] / 60e3
        return {"base": 0.1, "heads": 0.5, "full": whole, "retrain": 2 * whole}[method]
    config = config_of(data, method)
    each = config.steps if isinstance(config.steps, tuple) else (config.steps,) * config.slices
    steps = config.shards * sum(count * each[depth - 1] for depth, count in config.tree().stages_by_depth.items())
    cells = config.shards * config.slices
    evaluations = 1 if method == "unsharded" else config.slices + 0.7 * cells + 6
    seconds = steps * data.milliseconds[config.placement] / 1e3
    return (seconds + evaluations * config.shards * data.evaluation) / 60


def base_of(data: Data, seed: int, folder: Path) -> Path:
    """Train the base on the public part, once; it appears whole."""
    base = folder / "base"
    if isinstance(data.model, Path):
        return data.model
    if not base.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder))
        make_base(data, seed, part)
        try:
            part.rename(base)
        except OSError:  # another run made it meanwhile
            shutil.rmtree(part)
    return base


def make_base(data: Data, seed: int, folder: Path) -> None:
    """Train a base on a data set's public part and write its folder."""
    assert data.public
    assert data.public_schema
    assert data.pretraining
    assert not isinstance(data.model, Path)
    name, arguments = data.model
    if name == "decoder":
        decoder.make(folder, arguments["words"], data.public.inputs, data.public.labels, data.pretraining, seed)
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(name, dict(arguments))
    train(model, head_of(model, data.public_schema), data.public, data.public_schema, data.pretraining, seed)
    save_model(folder, model, name, dict(arguments))


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
    at.mkdir(parents=True, exist_ok=True)
    yield from METHODS[method](Cell(data, method, seed, base, at, key))
    yield {"metric": "cell", "value": round(time.perf_counter() - start, 1), "unit": "s"}
    shutil.rmtree(at)  # its rows are all that is wanted of it


def main(argv: list[str] | None = None) -> int:
    """Print the plan, run what is missing, append its rows, print the table, draw."""
    p = argparse.ArgumentParser(
        prog="python -m bench.unlearning", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--data", type=Path, help="folder of the data sets; without it the table alone is printed")
    p.add_argument("--model", type=Path, help="folder of an encoder, for sst2; without it sst2 is left out")
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
            if name == "sst2" and args.model is None:
                print("sst2: left out, no --model")
                continue
            data = DATASETS[name](args.data, seed, args.model)
            for method in _chosen(METHODS, args.only):
                if method == "heads" and data.schema.task == "causal":
                    continue  # a decoder's own output layer is its head
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
        _append(path, [{"data": RATES, "seed": 0} | row | shared for row in rates(0)], args.work)
    for name, method, seed, minutes in left:
        data = DATASETS[name](args.data, seed, args.model)
        shared = {k: v for k, v in machine.describe("cpu", "bench.unlearning").items() if k in COLUMNS}
        shared |= {"data": name, "method": method, "seed": seed, "settings": settings(data, method)}
        made = [row | shared | {"load": round(os.getloadavg()[0], 2)} for row in rows(data, method, seed, args.work)]
        _append(path, made, args.work)
        print(f"{name} {method} {seed}: {made[-1]['value'] / 60:.1f} minutes, foretold {minutes:.1f}", flush=True)


def _append(path: Path, made: list[Row], work: Path) -> None:
    """Append a cell's rows as a whole: no other run writes between them."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        append(path, made, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
