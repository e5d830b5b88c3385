"""Every approximate method beside S3T: what it keeps, what membership inference sees after it, what it costs.

    python -m bench.approximate --data FOLDER [--model FOLDER] [--only digits class ssd 0] [--plan]

FOLDER holds a folder for each data set; ``digits`` needs none. For each data set and seed there is one base, one PEFT
LoRA adapter fine-tuned on all private records, and one retrained on the rest, the oracle; every method starts from that
adapter and is attacked on the same records. S3T answers from its live nodes, on the same base; all its columns are held
against an oracle of its own, a fresh store without the forgotten. A run is cut in cells, one for each data set,
scenario, seed and method: the plan is printed first, rows are appended to approximate.csv, and a run does only what is
missing there: killed, it goes on. Seconds are by the clock. A row has `collapsed` where utility on the retained records
fell under 0.9 of what it was, as `s3t unlearn` has it.
`--only` takes names of data sets, scenarios and methods, and seeds, in any order.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import approximate_store, machine
from bench.approximate_cases import SCENARIOS, SETTINGS, Case, case, hashed, read
from bench.approximate_models import Group
from bench.approximate_report import draw, summary, table
from bench.approximate_scores import UNITS, attack, grown, scores, utility
from bench.rows import RESULTS, append
from bench.unlearning_baselines import Row
from s3t_ext.approximate import METHODS, Guarantee, Method, unlearn
from s3t_ext.cli.unlearn import FLOOR
from s3t_ext.cli.unlearn_report import holds

SEEDS = (0, 1, 2)
OF_CLASSES = ("concept-poisoning",)
OURS, NOTHING = "s3t", "nothing"  # nothing is done: the fine-tuned adapter as it is
COLUMNS = (
    *("data", "scenario", "method", "seed", "guarantee", "unit", "forget", "retain", "test"),
    *("forget_loss", "retain_loss", "test_loss", "oracle_forget", "oracle_retain", "oracle_test", "tow"),
    *("auc", "auc_se", "tpr", "oracle_auc", "oracle_tpr", "control_auc", "control_tpr"),
    *("wasserstein", "relearn", "quality", "collapsed"),
    *("seconds", "megabytes", "forgotten", "kept", "others", "changed", "note", "settings", "load"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)  # control: the model before it forgets; oracle: of S3T its own


# --- cells -----------------------------------------------------------------------------------------------------------


def fits(method: str, made: Case) -> str:
    """Say why a method is left out of a case; nothing: it is not."""
    if method in (OURS, NOTHING):
        return ""
    chosen = METHODS[method]
    if made.data.schema.task not in chosen.tasks:
        return f"for {' and '.join(chosen.tasks)}"
    if chosen.original not in ("", "initial"):
        return f"needs {chosen.original} of the original training"
    return "forgets a class" if method in OF_CLASSES and made.scenario != "class" else ""


def settings_of(method: str, made: Case) -> dict[str, Any]:
    """Give the settings of a method that are not its defaults."""
    if method in (OURS, NOTHING):
        return {}
    given = dict(made.setting.settings.get(method, {}))
    return given | dict(made.setting.training) if method == "retrain" else given


def run(method: str, group: Group) -> Row:
    """Run one cell and give its row."""
    made = group.case
    if method == OURS:
        at = group.variant / f"s3t-{identity(method, made)}"
        found = approximate_store.forget(made, made.data.private, group.base, at)
        before, after, oracle = found.before, found.after, found.oracle
        row = {
            "guarantee": found.guarantee.value,
            "seconds": found.seconds,
            **found.memory,
            "note": json.dumps(found.note),
        }
    else:
        before, oracle = group.control, group.oracle  # made before the clock runs
        with grown() as used:
            start = time.perf_counter()
            model, guarantee = _unlearnt(method, group)
            row = {"guarantee": guarantee.value, "seconds": time.perf_counter() - start}
        after = group.see(model)
        row |= used
        if made.data.schema.task == "regression":
            row["relearn"] = group.relearnt(model) / group.relearnt_by_oracle
    row |= scores(after, oracle)
    row |= {f"oracle_{name}": value for name, value in attack(oracle).items() if name != "auc_se"}
    row |= {f"control_{name}": value for name, value in attack(before).items() if name != "auc_se"}
    row |= {"collapsed": "" if holds(utility(before, made), utility(after, made), FLOOR) else "collapsed"}
    row |= {"unit": UNITS[made.data.schema.task]}
    row |= {"forgotten": len(made.forget), "kept": len(made.retain), "others": len(made.others)}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def _unlearnt(method: str, group: Group) -> tuple[torch.nn.Module, Guarantee]:
    if method == NOTHING:
        return group.tuned, Guarantee.NONE
    chosen, (gone, kept), made = METHODS[method], group.parts, group.case
    if not chosen.labels and gone.task == "classification":
        gone, kept = (dataclasses.replace(part, labels=None) for part in (gone, kept))
    given = settings_of(method, made)
    if chosen.original:
        given[chosen.original] = group.initial
    seed = 1000 + made.seed  # retraining is then another draw than the oracle: what chance alone does
    result = unlearn(method, group.tuned, gone, kept if chosen.retain else None, seed=seed, **given)
    return result.model, result.guarantee


def expected(method: str, made: Case) -> float:
    """Foretell the minutes of a cell, on one thread."""
    setting, chosen = made.setting, METHODS.get(method)
    size = len(made.forget) + len(made.retain)
    if method == OURS:
        config = setting.config
        passes = config.shards * len(config.tree().nodes) * config.steps_at(1) * config.batch
        return 2 * passes * setting.milliseconds / 60e3
    return 0.05 + size * _epochs(chosen, settings_of(method, made)) * setting.milliseconds / 60e3


def _epochs(method: Method | None, given: Mapping[str, Any]) -> float:
    told = method.settings.get("epochs") if method else None
    usual = told.default if told and isinstance(told.default, int) else 3
    return float(given.get("epochs", usual if method else 0))


# --- the run ---------------------------------------------------------------------------------------------------------


def identity(method: str, made: Case) -> str:
    """Name what a cell's row depends on beside code: another declared constant, and the cell is run again."""
    own = dataclasses.asdict(made.setting.config) if method == OURS else settings_of(method, made)
    return hashed(made.declared | {"own": own})


def done(path: Path) -> set[tuple[str, str, str, int, str]]:
    """List the cells whose rows are there."""
    if not path.exists():
        return set()
    with path.open(newline="") as lines:
        return {(r["data"], r["scenario"], r["method"], int(r["seed"]), r["settings"]) for r in csv.DictReader(lines)}


def main(argv: list[str] | None = None) -> int:
    """Print the plan, run what is missing, append its rows, print the tables, draw; 1 where a cell failed."""
    p = argparse.ArgumentParser(
        prog="python -m bench.approximate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--data", type=Path, help="folder of the data sets; without it the table alone is printed")
    p.add_argument("--model", type=Path, help="folder of an encoder, for sst2; without it sst2 is left out")
    p.add_argument("--only", nargs="+", default=[], help="names of data sets, scenarios and methods, and seeds")
    p.add_argument("--plan", action="store_true", help="print the plan of time, and nothing else")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "s3t-approximate")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    names = [OURS, NOTHING, *METHODS]
    unknown = [n for n in args.only if n not in {*SETTINGS, *SCENARIOS, *names} and not n.isdigit()]
    if unknown:
        p.error(f"--only: expected some of {[*SETTINGS, *SCENARIOS, *names]} and seeds, got {unknown}")
    path, failed = args.out / "approximate.csv", 0
    if args.data:
        torch.set_num_threads(args.threads)
        failed = _run(args, path, names)
    if path.exists() and not args.plan:
        print(f"ToW, |AUC - oracle's|, seconds\n\n{summary(path)}\n\n{table(path)}")
        for made in draw(path, args.out):
            print(f"drew {made}")
    return int(failed > 0)


def _chosen(names: Any, only: list[str]) -> list[Any]:
    return [name for name in names if str(name) in only] or list(names)


def _run(args: argparse.Namespace, path: Path, names: list[str]) -> int:
    """Run the cells that are missing; give how many failed."""
    found, left, failed = done(path), [], 0
    seeds = [int(word) for word in args.only if word.isdigit()] or SEEDS
    print(f"{'data':<12}{'scenario':<10}{'method':<24}{'seed':>4}  {'minutes on one thread':>21}")
    for seed in seeds:
        for name in _chosen(SETTINGS, args.only):
            if name == "sst2" and args.model is None:
                print("sst2: left out, no --model")
                continue
            data = read(name, args.data, seed, args.model)
            for scenario in [s for s in SETTINGS[name].scenarios if s in _chosen(SCENARIOS, args.only)]:
                made = case(data, scenario, seed)
                for method in _chosen(names, args.only):
                    head = f"{name:<12}{scenario:<10}{method:<24}{seed:>4}"
                    if why := fits(method, made):
                        print(f"{head}  left out: {why}")
                        continue
                    there = (name, scenario, method, seed, identity(method, made)) in found
                    minutes = expected(method, made)
                    print(f"{head}  {'done' if there else f'{minutes:.1f}':>21}")
                    if not there:
                        left.append((made, method, minutes))
    print(f"{len(left)} cells, {sum(minutes for *_, minutes in left):.0f} minutes", flush=True)
    if args.plan:
        return 0
    group: Group | None = None
    for made, method, minutes in left:
        if group is None or group.case is not made:
            group = Group(made, args.work / made.data.name / str(made.seed))
        start = time.perf_counter()
        try:
            row = run(method, group)
        except Exception as error:  # of one method: the others are not to wait for it
            failed += 1
            told = f"{type(error).__name__}: {error}"
            print(f"{made.data.name} {made.scenario} {method} {made.seed}: FAILED: {told}", flush=True)
            continue
        row |= {"data": made.data.name, "scenario": made.scenario, "method": method, "seed": made.seed}
        row |= {"changed": json.dumps(settings_of(method, made)), "settings": identity(method, made)}
        row |= {k: v for k, v in machine.describe("cpu", "bench.approximate").items() if k in COLUMNS}
        row |= {"load": round(os.getloadavg()[0], 2)}
        with (args.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            append(path, [row], COLUMNS)
        took = (time.perf_counter() - start) / 60
        told = " ".join(f"{k} {row[k]:.3f}" for k in ("forget", "retain", "test", "tow", "auc", "oracle_auc"))
        print(
            f"{made.data.name} {made.scenario} {method} {made.seed}: {took:.1f} minutes of {minutes:.1f}, {told}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
