"""Published behaviour of approximate methods beside ours, each in a compact setting.

    python -m bench.published --data FOLDER [--only METHOD ...] [--seeds 0 1 2]

FOLDER holds ``mnist`` and ``california_housing``. For each method, and each proxy of memorisation, one claim is
measured and a row appended to published.csv; without ``--data`` the table of the newest rows alone is printed.
What counts as reproduced is declared in ``published_cases``. All settings are small and differ from the published ones:
what is reproduced is a behaviour, not a figure. 21 claims and three seeds take a quarter of an hour on one thread.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from bench import machine
from bench.published_cases import CASES, Case, verdict
from bench.published_measures import Found, World
from bench.rows import RESULTS, append

COLUMNS = (
    *("method", "claim", "source", "there", "published", "here", "figure", "mean", "min", "max"),
    *("also", "criterion", "reproduced", "seeds", "seconds"),  # also: means of what else was measured
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)


def row(case: Case, found: Sequence[Found]) -> dict[str, object]:
    """Put a case beside what was measured for each seed."""
    values = [one[case.figure] for one in found]
    means = {name: fmean(one[name] for one in found) for name in found[0] if name != case.figure}
    told = {name: getattr(case, name) for name in ("method", "claim", "source", "there", "published", "here", "figure")}
    numbers = {"mean": fmean(values), "min": min(values), "max": max(values)}
    return {
        **told,
        **{name: f"{value:.4f}" for name, value in numbers.items()},
        "also": "; ".join(f"{name} {value:.3f}" for name, value in means.items()),
        "criterion": "; ".join(map(str, case.checks)),
        "reproduced": verdict(case, found),
    }


def table(path: Path) -> str:
    """Lay out the newest row of each method, in Markdown."""
    with path.open(newline="") as lines:
        newest = {row["method"]: row for row in csv.DictReader(lines)}
    lines = [["method", "claim", "published", "ours", "also", "reproduced"], ["---"] * 6]
    for name in [*(name for name in CASES if name in newest), *(name for name in newest if name not in CASES)]:
        one = newest[name]
        mean, least, most = (f"{float(one[column]):.2f}" for column in ("mean", "min", "max"))
        ours = f"{one['figure']} {mean}" + (f" ({least} to {most})" if least != most else "")
        lines.append([f"`{name}`", one["claim"], one["published"], ours, one["also"], one["reproduced"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, append a row for each method, print the table."""
    p = argparse.ArgumentParser(
        prog="python -m bench.published", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--data", type=Path, help="folder of the data sets; without it the table alone is printed")
    p.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    path = args.out / "published.csv"
    if args.data:
        torch.set_num_threads(args.threads)
        worlds = [World(args.data, seed) for seed in args.seeds]
        for name in args.only:
            start = time.perf_counter()
            found = [CASES[name].measure(world) for world in worlds]
            made = row(CASES[name], found) | {"seeds": " ".join(map(str, args.seeds))}
            made |= {"seconds": f"{time.perf_counter() - start:.1f}", **machine.describe("cpu", "bench.published")}
            append(path, [made], COLUMNS)
            print(f"{name:<28}{made['mean']:>8} {made['seconds']:>6} s  {made['reproduced']}", flush=True)
    if path.exists():
        print(f"\n{table(path)}\n\nWhere no published figure could be read, the claim alone is judged.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
