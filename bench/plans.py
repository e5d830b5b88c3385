"""Plans: deletion rates simulated beside the exact ones, every strategy at equal budgets, the gain over SISA, healing.

    python -m bench.plans [--study deletion_rate strategies gain healing] [--repeats 20000] [--out FOLDER]

Rows are appended to plans.csv, from which alone the tables and the figure are made.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import machine
from bench.rows import RESULTS, append
from s3t_ext.plan import StageTree, build, death, expected_depth, objective, subsets
from s3t_ext.plan.compare import beside
from s3t_ext.plan.cost import memory
from s3t_ext.plan.healing import simulate_healing
from s3t_ext.plan.simulate import simulate

COLUMNS = (
    *("study", "shards", "slices", "strategy", "budget", "metric", "mean", "se", "exact", "repeats", "seed"),
    *("versions", "commit", "dirty", "utc", "command"),
)
SEED = 0
HEALED = 100  # repetitions of a system that heals
HITS = range(1, 9)  # on one shard


def deletion_rate(repeats: int) -> Iterator[dict[str, Any]]:
    """Requests to the first and the last death by budget: S3T's Figure 7 (L = 32) and Table 3 (L = 6), and L = 4."""
    for shards, slices, budgets in (
        (5, 32, (1, 2, 4, 8, 16, 32)),
        (10, 32, (1, 2, 4, 8, 16, 32)),
        (5, 6, range(1, 7)),
        (5, 4, range(1, 5)),
    ):
        for budget in budgets:
            tree = build("rotation", slices, budget)
            found = simulate(tree, shards, repeats=repeats, seed=SEED).summary()
            for rule, j in (("first", 1), ("last", shards)):
                exact = death(tree, shards, j)
                at = _at(shards, slices, "rotation", budget, repeats)
                yield {**at, "metric": rule, "mean": found[rule]["mean"], "se": found[rule]["se"], "exact": exact.mean}
                yield {**at, "metric": f"{rule}_sd", "exact": exact.sd}


def strategies(repeats: int) -> Iterator[dict[str, Any]]:
    """Cost, memory and expected depth of every strategy by budget; greedy at the slice-passes of each."""
    for slices in (4, 6, 8):
        trees: dict[tuple[str, int], StageTree] = {}
        for budget in sorted({2, slices // 2, slices, 2 * slices}):
            base = build("rotation", slices, budget)
            trees |= {(name, len(t.sequences)): t for name, t in beside(base, budget).items() if name != "greedy"}
        for name, count in list(trees):
            passes = trees[name, count].slice_passes
            trees["greedy", passes] = build("greedy", slices, passes)
        for (name, budget), tree in trees.items():
            at = _at(1, slices, name, budget, 0)
            yield {**at, "metric": "stages", "exact": tree.stages}
            yield {**at, "metric": "slice_passes", "exact": tree.slice_passes}
            yield {**at, "metric": "layer_passes", "exact": tree.layer_passes}
            yield {**at, "shards": 5, "metric": "resident", "exact": resident(tree)}
            yield {**at, "metric": "objective", "exact": objective(tree)}
            for hits in HITS:
                yield {**at, "metric": f"depth_{hits}", "exact": expected_depth(tree, hits).mean}


def resident(tree: StageTree) -> float:
    """Bytes of all nodes of 5 shards over those of the frozen layers: a stack of rank 16 under 4096 x 4096."""
    held = memory(tree, 5, rank=16, layers=1, widths=[(4096, 4096)])
    return held.stored / held.base


def gain(repeats: int) -> Iterator[dict[str, Any]]:
    """Requests until a system stops, over SISA's, under four stopping rules (S3T claims 1.6 to 3 times)."""
    shards = 5
    for slices in (4, 6, 32):
        floor = slices / 2
        rules = {"first": 1, "half": (shards + 1) // 2, "last": shards}
        base = build("sisa", slices)
        plans = {"rotation": build("rotation", slices)} | ({"subsets": subsets(slices)} if slices <= 8 else {})
        runs = {name: simulate(t, shards, repeats=repeats, seed=SEED, floor=floor) for name, t in plans.items()}
        before = simulate(base, shards, repeats=repeats, seed=SEED, floor=floor).summary()["floor"]
        for name, tree in plans.items():
            at = _at(shards, slices, name, len(tree.sequences), repeats)
            for rule, j in rules.items():
                yield {**at, "metric": rule, "exact": death(tree, shards, j).mean / death(base, shards, j).mean}
            after = runs[name].summary()["floor"]
            ratio = after["mean"] / before["mean"]
            error = ratio * math.hypot(after["se"] / after["mean"], before["se"] / before["mean"])
            yield {**at, "metric": "depth<L/2", "mean": ratio, "se": error}


def healing(repeats: int) -> Iterator[dict[str, Any]]:
    """Depth and availability in the long run, by the slice-passes retrained for each request."""
    shards = 5
    for slices in (4, 6):
        for name in ("sisa", "rotation", "subsets"):
            tree = build(name, slices)
            for rate in (0.5, 1, 2, 4, 8, 16):
                found = simulate_healing(tree, shards, rate, repeats=HEALED, seed=SEED).summary()
                at = _at(shards, slices, name, rate, HEALED)
                for metric, value in found.items():
                    yield {**at, "metric": metric, "mean": value["mean"], "se": value["se"]}


def _at(shards: int, slices: int, strategy: str, budget: float, repeats: int) -> dict[str, Any]:
    return {
        "shards": shards, "slices": slices, "strategy": strategy, "budget": budget, "repeats": repeats, "seed": SEED,
    }  # fmt: skip


STUDIES: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "deletion_rate": deletion_rate, "strategies": strategies, "gain": gain, "healing": healing,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run studies: append rows, print tables, draw; 1 if a simulated mean is far from the exact one."""
    p = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__)
    p.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    p.add_argument("--repeats", type=int, default=20_000)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    shared = {k: v for k, v in machine.describe("cpu", "bench.plans").items() if k in COLUMNS}
    path, wrong = args.out / "plans.csv", 0
    for study in args.study:
        rows = [{"study": study, **row, **shared} for row in STUDIES[study](args.repeats)]
        append(path, rows, COLUMNS)
        wrong += sum(far(row) for row in rows)
        print(f"{study}: {STUDIES[study].__doc__}\n{table(study, rows)}\n")
    if "deletion_rate" in args.study:
        print(f"drew {draw(path, args.out / 'plans_deletion_rate.png')}")
    print(f"{wrong} simulated means are more than 4 standard errors from the exact ones")
    return int(wrong > 0)


def far(row: dict[str, Any]) -> bool:
    """Tell whether a simulated mean is more than 4 standard errors from the exact one."""
    both = all(isinstance(row.get(name), float) for name in ("mean", "se", "exact"))
    return both and abs(row["mean"] - row["exact"]) > 4 * row["se"]


def table(study: str, rows: list[dict[str, Any]]) -> str:
    """Lay rows out, a line for each plan, a column for each metric: `mean+-se/exact`, or what there is of it."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["shards"], row["slices"], row["strategy"], row["budget"]), {})[row["metric"]] = _cell(row)
    width = 1 + max(len(text) for line in cells.values() for text in [*metrics, *line.values()])
    lines = [f"{'m':>3}{'L':>4} {'strategy':<12}{'budget':>7}" + "".join(f"{metric:>{width}}" for metric in metrics)]
    for (shards, slices, name, budget), found in cells.items():
        line = f"{shards:>3}{slices:>4} {name:<12}{budget:>7}"
        lines.append(line + "".join(f"{found.get(metric, ''):>{width}}" for metric in metrics))
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    mean, se, exact = (row.get(name) for name in ("mean", "se", "exact"))
    exact = None if exact is None else f"{exact:.4g}"
    if mean is None:
        return exact or ""
    simulated = f"{mean:.4g}" + (f"+-{se:.2g}" if se is not None else "")
    return simulated if exact is None else f"{simulated}/{exact}"


def draw(path: Path, to: Path) -> Path:
    """Draw requests to the last death against the budget, simulated points on exact lines, from the newest rows."""
    from matplotlib.figure import Figure

    points: dict[tuple[str, int], tuple[float, float]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if (row["study"], row["slices"], row["metric"]) == ("deletion_rate", "32", "last"):
                points[row["shards"], int(row["budget"])] = float(row["mean"]), float(row["exact"])
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for shards in sorted({shards for shards, _ in points}, key=int):
        budgets = sorted(budget for m, budget in points if m == shards)
        (line,) = axes.plot(budgets, [points[shards, b][1] for b in budgets], label=f"m = {shards}, exact")
        axes.plot(budgets, [points[shards, b][0] for b in budgets], "o", color=line.get_color(), label="simulated")
    axes.set(xlabel="budget B, sequences of a shard", ylabel="requests to the last death", title="rotation, L = 32")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, None)
    axes.legend()
    figure.savefig(to, dpi=150)
    return to


if __name__ == "__main__":
    sys.exit(main())
