"""Time training of a plan: ``python -m bench.training DATASET --data FOLDER [--model FOLDER]``.

One shard after another by Trainer and PEFT, as a user first writes it and tuned, beside this package with its parts put
in one by one: kernels, trunk, lock-step, lanes, precision; and the plan, `subsets` beside `rotation`. Same optimisation
steps and batch size for all. A stage costs the same at every place of its depth, so some steps of some stages of each
depth are timed, providers in turn, and multiplied by the counts of the plan: rows say how many were timed. What is done
once for all steps (states of the trunk) is timed apart and added in full. The ancestors of what is timed are random
adapters.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from bench import machine
from bench.datasets import DATASETS, Data
from bench.rows import RESULTS, append
from bench.timing import shuffled
from bench.training_baselines import How, Stages, Tokens, Took
from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import build, load_model, model_hash, save_model
from s3t_ext.plan import Node
from s3t_ext.plan import build as build_tree
from s3t_ext.store.crypt import StoreKey
from s3t_ext.system.config import Config
from s3t_ext.system.creation import admit, creating
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import Slices, StoreFolder
from s3t_ext.system.network import declare_head
from s3t_ext.system.training.lockstep import Held
from s3t_ext.system.training.progress import Progress
from s3t_ext.system.training.train import Settings, Trainer

COLUMNS = (
    *("data", "placement", "provider", "depth", "metric", "p20", "p50", "p80", "unit", "repeats", "threads", "note"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
KEY = bytes(range(32))
TRAINERS = {"trainer": How(False, False), "trainer-tuned": How(True, False), "trainer-tuned-bf16": How(True, True)}


ONE = ("s3t-kernels", "s3t-trunk")  # one node at a time


class Ours(NamedTuple):
    """A way to run this package."""

    settings: Settings
    precision: str = "float32"


def ours(lanes: int) -> dict[str, Ours]:
    """List what is timed: each adds one part to the one before, the last the other precision."""
    one = Settings(nodes_per_pass=1, lanes=1, trunk="off", device="cuda" if torch.cuda.is_available() else "cpu")
    together = replace(one, nodes_per_pass=0, trunk="memory")  # kept, as it is over all steps of a stage
    return {
        "s3t-kernels": Ours(one),
        "s3t-trunk": Ours(replace(one, trunk="memory")),
        "s3t-lockstep": Ours(together),
        "s3t": Ours(replace(together, lanes=lanes)),
        "s3t-bf16": Ours(replace(together, lanes=lanes), "bfloat16"),
    }


class Store:
    """A store with a data set's records and random nodes, of which those of one depth are trained again and again."""

    def __init__(self, at: Path, data: Data, base: Path, config: Config, way: Ours) -> None:
        config = replace(config, precision=way.precision)
        model, key, store_key = load_model(base), Key(KEY), StoreKey.new()
        head = declare_head(key, data.schema, config, model)
        with creating(at, data.schema, config, key, base, model_hash(model), head, store_key=store_key) as folder:
            admit(folder, lay_out(data.private, key, config.shards, config.slices), {})
        self.folder = StoreFolder(at, store_key)
        self.trainer = Trainer(self.folder, way.settings)
        self.ids = self.folder.identities(self.folder.ledger.slices())
        self.timed: list[Tokens] = []  # of every sample of texts
        self._fill()

    def _fill(self) -> None:
        """Put random weights in the place of all nodes but the deepest, whose weights nobody reads."""
        slices, chance = self.folder.ledger.slices(), np.random.default_rng(0)
        network = self.trainer.network
        for (shard, path), _ in self.ids.items():
            tensors = {}
            for name, layer in network.layers.items():
                if len(path) - 1 in layer.stages:
                    for part, width in (("a", layer.in_features), ("b", layer.out_features)):
                        tensors[f"{name}.{part}"] = chance.normal(0, 1e-3, (layer.rank, width)).astype(np.float32)
            if network.kind == "trained":
                tensors["head.weight"] = np.zeros((network.head.outputs, network.head.features), np.float32)
                tensors["head.bias"] = np.zeros(network.head.outputs, np.float32)
            if len(path) < self.folder.tree.depth:
                identity = self.folder.identity(shard, path, slices, self.ids.get((shard, path[:-1]), ""))
                self.folder.nodes.put(identity, tensors, {})

    def sample(self, depth: int, nodes: int) -> tuple[Took, Took]:
        """Train some nodes of a depth for the configuration's steps and publish nothing.

        Returns:
            Seconds of a step of a node, and of reading a record and computing its state of the trunk.
        """
        trainer, prepare = self.trainer, self.trainer._hold
        chosen = [node for node in self.ids if len(node[1]) == depth][:nodes]
        ready: list[tuple[float, float, int]] = []

        def hold(given: Sequence[Node], slices: Slices) -> Held:
            held = prepare(given, slices)
            if self.folder.schema.is_text:
                drawn = np.concatenate(list(held.orders.values()))
                x, _ = held.records.batch(held.records.part[drawn], held.records.row[drawn])
                own = int((x >= 0).sum())  # no padding is computed
                self.timed.append((len(drawn), own, own))
            ready.append((time.perf_counter(), time.process_time(), held.trunk.notes()["records"] if held.trunk else 0))
            return held

        with mock.patch.object(trainer, "_publish", return_value=[]), mock.patch.object(trainer, "_hold", hold):
            start, cpu = time.perf_counter(), time.process_time()
            trainer.job(chosen, self.ids, Progress(0, False))
            end, spent = time.perf_counter(), time.process_time()
        ((wall, work, records),) = ready
        done = len(chosen) * trainer.config.steps_at(depth)
        prepared = Took((wall - start) / records, (work - cpu) / records) if records else Took(0.0, 0.0)
        return Took((end - wall) / done, (spent - work) / done), prepared


def baseline(data: Data, base: Path, config: Config, depth: int, how: How) -> Stages:
    """Give a stage over the records of the first slices of a shard."""
    layout = lay_out(data.private, Key(KEY), config.shards, config.slices).slices
    parts = [layout[0, k] for k in range(depth)]
    table = Table(
        [tuple(names) for part in parts for names in part.subjects],
        data.schema.scaled(np.concatenate([part.inputs for part in parts])),
        np.concatenate([part.labels for part in parts]),
    )
    return Stages(base, config, depth, table, len(data.schema.classes), how)


def measure(
    data: Data, base: Path, config: Config, wanted: list[str], arguments: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Time all providers at every depth, in turn; give rows."""
    lanes, steps = arguments.threads, arguments.steps
    few = replace(config, steps=steps)
    stores = {
        name: Store(scratch / f"{config.placement}-{name}", data, base, few, way)
        for name, way in ours(lanes).items()
        if name in wanted
    }
    tree = config.tree()
    for depth in range(1, tree.depth + 1):
        calls: dict[str, Callable[[], tuple[Took, Took]]] = {}
        timed: dict[str, list[Tokens]] = {}
        for name, how in TRAINERS.items():
            if name in wanted:
                stages, seeds = baseline(data, base, few, depth, how), itertools.count()
                calls[name] = lambda s=stages, n=seeds: (s.steps(steps, next(n)), Took(0.0, 0.0))
                timed[name] = stages.timed
        for name, store in stores.items():
            nodes = 1 if name in ONE else arguments.nodes
            calls[name] = lambda s=store, d=depth, n=nodes: s.sample(d, n)
            timed[name] = store.timed = []
        taken: dict[str, list[tuple[Took, Took]]] = {name: [] for name in calls}
        for turn in range(arguments.rounds + 1):
            for name in shuffled(calls, turn):
                found = calls[name]()
                if turn:  # the first is to warm up
                    taken[name].append(found)
        for name, samples in taken.items():
            at = {"data": data.name, "placement": config.placement, "provider": name, "depth": depth, "unit": "ms"}
            note = f"{steps} steps of {1 if name in ONE or name in TRAINERS else arguments.nodes} nodes timed"
            note += _told(timed[name])
            for metric, values in (
                ("step", [step.wall for step, _ in samples]),
                ("step_cpu", [step.cpu for step, _ in samples]),
                ("record", [record.wall for _, record in samples]),
                ("record_cpu", [record.cpu for _, record in samples]),
            ):
                yield {**at, "metric": metric, **_spread(values), "note": note}


def _told(timed: list[Tokens]) -> str:
    """Tell how long the texts of timed batches were: providers draw their own, and must draw alike."""
    if not timed:
        return ""
    records, own, padded = (sum(column) for column in zip(*timed, strict=True))
    return f", of {own / records:.1f} tokens a record, {padded / records:.1f} with padding"


def _spread(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] * 1e3 for q in (0.2, 0.5, 0.8))
    return {"p20": f"{p20:.4f}", "p50": f"{p50:.4f}", "p80": f"{p80:.4f}", "repeats": len(values)}


def totals(
    rows: list[dict[str, Any]], config: Config, records: int, cpu: str, by_depth: bool
) -> dict[tuple[str, str], float]:
    """Add up a plan by (provider, strategy): seconds of all its stages.

    Args:
        cpu: ``""`` for the clock, ``"_cpu"`` for the processor's time.
        by_depth: steps in proportion to the depth of a stage, as many as configured at the greatest.
    """
    times = {(r["provider"], r["depth"], r["metric"]): float(r["p50"]) / 1e3 for r in rows}
    found: dict[tuple[str, str], float] = {}
    for strategy, budget in (("rotation", config.slices), ("subsets", None)):
        tree = build_tree(strategy, config.slices, budget)
        for name in dict.fromkeys(row["provider"] for row in rows):
            found[name, strategy] = 0.0
            for depth, count in tree.stages_by_depth.items():
                steps = config.steps_at(depth) * (depth / tree.depth if by_depth else 1)
                found[name, strategy] += config.shards * count * steps * times[name, depth, f"step{cpu}"]
                found[name, strategy] += records * times[name, depth, f"record{cpu}"]
    return found


def summary(rows: list[dict[str, Any]], config: Config, records: int) -> str:
    """Tell milliseconds by depth, a plan's seconds, and how many times as long the tuned trainers take."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [f"{rows[0]['data']}, {config.placement}: ms of a step of a node by depth, then seconds of the plan"]
    for cpu, told in (("", "the clock"), ("_cpu", "the processors, all threads together")):
        equal, deep = (totals(rows, config, records, cpu, by_depth) for by_depth in (False, True))
        tuned = {name: equal[name, "rotation"] for name in names if name.startswith("trainer-tuned")}
        lines.append(f"-- by {told}")
        for name in names:
            at = [float(r["p50"]) for r in rows if r["provider"] == name and r["metric"] == f"step{cpu}"]
            seconds = equal[name, "rotation"]
            gain = seconds / equal[name, "subsets"], deep[name, "rotation"] / deep[name, "subsets"]
            times = "".join(f"  {other} takes {spent / seconds:5.2f}x" for other, spent in tuned.items())
            lines.append(
                f"{name:20} {' '.join(f'{ms:8.1f}' for ms in at)}  rotation {seconds:8.1f} s  "
                f"subsets gain {gain[0]:.2f} (steps by depth {gain[1]:.2f}){times}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=[name for name in DATASETS if name in ("sst2", "mnist", "cifar10")])
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets, see bench.datasets")
    parser.add_argument("--model", type=Path, help="folder of the base for texts")
    parser.add_argument("--placement", nargs="+", default=["layers", "stack"])
    parser.add_argument("--provider", nargs="+", default=[*TRAINERS, *ours(1)])
    parser.add_argument("--steps", type=int, default=8, help="timed of each stage (default 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=20, help="trained together at most (default 20: all of a depth)")
    parser.add_argument("--threads", type=int, default=machine.threads("all"))
    parser.add_argument("--batch", type=int, help="records of a step (default: the data set's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows go to training.csv there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = DATASETS[arguments.dataset](arguments.data, 0, arguments.model)
    about = machine.describe("cuda" if torch.cuda.is_available() else "cpu", "bench.training")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = data.model if isinstance(data.model, Path) else scratch / "base"
        if not isinstance(data.model, Path):
            torch.manual_seed(0)
            save_model(base, build(data.model[0], dict(data.model[1])), data.model[0], dict(data.model[1]))
        for placement in arguments.placement:
            config = replace(data.configs[placement], shards=5, slices=4, strategy="rotation", budget=4)
            config = replace(config, batch=arguments.batch or config.batch, ensemble="best")
            rows = list(measure(data, base, config, arguments.provider, arguments, scratch))
            append(
                arguments.out / "training.csv", [{**r, "threads": arguments.threads, **about} for r in rows], COLUMNS
            )
            print(summary(rows, config, len(data.private)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
