"""How long a deletion takes while threads predict: from the request to its effect, and to its acknowledgement.

    python -m bench.deletion [--threads 0 cores 64] [--deletions 200] [--folder DIR] [--out FOLDER]

A store of the demo's size, 5 shards of 4 slices, 75 nodes of a little vision transformer. Every deletion counted makes
nodes die. `effect`: they are masked, from when on no answer that used them is released. `acknowledgement`:
the receipt is there. `erasure`: dead weights and records are gone too. A request made in another process takes effect
here when that one writes the epoch word, after the durable record; `seen`: from then until it is masked here.
Rows are appended to deletion.csv. Goal, with as many threads as cores: p99 of acknowledgement 50 ms, of effect 5 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import ROOT, machine
from bench.rows import RESULTS, append
from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import build, save_model
from s3t_ext.system.config import Config
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.fit import fit
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.unlearn import erase_or_warn

COLUMNS = (
    *("case", "metric", "threads", "deletions", "p50", "p99", "max", "unit", "answers", "load", "disk"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
SHARDS, SLICES, PEOPLE, KEY = 5, 4, 400, Key(bytes(32))
SCHEMA = Schema(classes=("a", "b", "c", "d", "e"), shape=(1, 8, 8))
GOALS = {  # p99 in ms, with as many threads as cores
    ("here", "effect"): 5.0, ("here", "acknowledgement"): 50.0, ("another process", "acknowledgement"): 50.0,
}  # fmt: skip

OTHER = """
import json, sys, time
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.unlearn import delete_from, erase_or_warn
now = time.monotonic
with StoreFolder(sys.argv[1]) as folder:
    fence = folder.ledger.fence
    raise_to, at = fence.raise_to, []
    fence.raise_to = lambda epoch: (raise_to(epoch), at.append(now()))
    for line in sys.stdin:
        start = now()
        delete_from(folder, [line.strip()], None)
        acknowledged = now()
        effect = at[-1]
        erase_or_warn(folder)
        print(json.dumps([start, effect, acknowledged, now()]), flush=True)
"""


class Timed(Service):
    """A service that notes when its table is rewritten."""

    def __init__(self, path: Path) -> None:
        self.masks: list[tuple[float, int]] = []
        super().__init__(path)

    def _leave(self, cells: Any) -> None:
        super()._leave(cells)
        self.masks.append((time.monotonic(), threading.get_ident()))

    def masked(self, after: float, by: int | None = None) -> float | None:
        """Tell when it was first rewritten after a time, by a thread, or by any."""
        return next((at for at, thread in self.masks if at > after and by in (None, thread)), None)


def make(folder: Path) -> list[list[str]]:
    """Make the store, trained for two steps; list the people of each slice."""
    chance = np.random.default_rng(0)
    table = Table(
        [(f"person {i}",) for i in range(PEOPLE)],
        chance.normal(size=(PEOPLE, *SCHEMA.shape)).astype(np.float32),
        chance.integers(0, len(SCHEMA.classes), PEOPLE),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(folder / "base", build("vit", {}), "vit", {})
    config = Config(shards=SHARDS, slices=SLICES, steps=2)
    key = bytes.fromhex(KEY.hex())
    fit(folder / "whole" / "store", table, SCHEMA, folder / "base", config, key=key, progress=False)
    layout = lay_out(table, KEY, SHARDS, SLICES)
    return [sorted(names[0] for names in rows.subjects) for rows in layout.slices.values()]


def one_store(folder: Path, cells: list[list[str]], threads: int, other: bool, chance: random.Random) -> Iterator[Any]:
    """Delete one person of every slice but the last, from a fresh copy; give the samples of each, then the answers."""
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "now")
    stop, answers = threading.Event(), [0] * threads
    x = np.zeros((4, *SCHEMA.shape), np.float32)

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                service.predict(x)
            except Refused:
                return
            answers[number] += 1

    with Timed(folder / "now" / "store") as service:
        service.predict(x)
        askers = [threading.Thread(target=ask, args=(n,)) for n in range(threads)]
        for asker in askers:
            asker.start()
        people = [chance.choice(names) for names in cells[:-1]]
        chance.shuffle(people)
        try:
            yield from (_elsewhere if other else _here)(service, people, bool(threads))
        finally:
            stop.set()
            for asker in askers:
                asker.join()
    yield sum(answers)


def _here(service: Timed, people: list[str], _: bool) -> Iterator[dict[str, float]]:
    for person in people:
        start = time.monotonic()
        service.acknowledge([person])
        acknowledged = time.monotonic()
        erase_or_warn(service.folder)
        times = {
            "effect": service.masked(start, threading.get_ident()),
            "acknowledgement": acknowledged,
            "erasure": time.monotonic(),
        }
        yield {name: 1000 * (at - start) for name, at in times.items()}


def _elsewhere(service: Timed, people: list[str], asked: bool) -> Iterator[dict[str, float]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])}
    child = subprocess.Popen(
        [sys.executable, "-c", OTHER, service.folder.path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdin
    assert child.stdout
    with child:
        for person in people:
            print(person, file=child.stdin, flush=True)
            start, effect, acknowledged, erased = json.loads(child.stdout.readline())
            found = {"effect": effect - start, "acknowledgement": acknowledged - start, "erasure": erased - start}
            if asked:
                while (seen := service.masked(effect)) is None:
                    time.sleep(0.0005)
                found["seen"] = seen - effect
            yield {name: 1000 * seconds for name, seconds in found.items()}
        child.stdin.close()


def study(folder: Path, cells: list[list[str]], threads: int, deletions: int) -> Iterator[dict[str, Any]]:
    """Measure requests here and in another process beside so many predicting threads."""
    for case, other in (("here", False), ("another process", True)):
        chance, samples, answers = random.Random(0), [], 0
        while len(samples) < deletions:
            *found, answered = one_store(folder, cells, threads, other, chance)
            samples += found
            answers += answered
        for metric in samples[0]:
            values = sorted(sample[metric] for sample in samples)
            at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
            figures = {name: round(values[min(len(values) - 1, int(q * len(values)))], 3) for name, q in at.items()}
            row = {"case": case, "metric": metric, "threads": threads, "deletions": len(values), **figures}
            yield {**row, "unit": "ms", "answers": answers, "load": round(os.getloadavg()[0], 2)}


def disk(folder: Path) -> str:
    """Name the type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    real = folder.resolve()
    return max(((where, kind) for where, kind in mounts if real.is_relative_to(where)), key=lambda m: len(m[0]))[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, append rows, print them; 1 if a goal is missed."""
    p = argparse.ArgumentParser(
        prog="python -m bench.deletion", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    p.add_argument("--threads", nargs="+", default=["0", "cores", "64"], help="that predict; cores: one a core")
    p.add_argument("--deletions", type=int, default=200, help="of each case, at least")
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the store is made")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    shared = {k: v for k, v in machine.describe("cpu", "bench.deletion").items() if k in COLUMNS}
    torch.set_num_threads(1)  # of each predicting thread
    missed = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        shared["disk"] = disk(Path(scratch))
        cells = make(Path(scratch))
        print(f"{'case':16}{'metric':16}{'threads':>8}{'deletions':>10}{'p50':>9}{'p99':>9}{'max':>9} ms")
        for threads in (cores if name == "cores" else int(name) for name in args.threads):
            rows = [{**row, **shared} for row in study(Path(scratch), cells, threads, args.deletions)]
            append(args.out / "deletion.csv", rows, COLUMNS)
            for row in rows:
                goal = GOALS.get((row["case"], row["metric"]), math.inf) if threads == cores else math.inf
                missed += row["p99"] > goal
                figures = "".join(f"{row[name]:9.2f}" for name in ("p50", "p99", "max"))
                verdict = "" if goal == math.inf else f"  goal {goal:g}: {'missed' if row['p99'] > goal else 'met'}"
                print(
                    f"{row['case']:16}{row['metric']:16}{threads:8}{row['deletions']:10}{figures}{verdict}", flush=True
                )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
