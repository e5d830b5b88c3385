"""Read rows, print the goals and draw two figures a device: ``python -m bench.plot [FILES] [--out DIR]``.

Without rows the goals are printed as not measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from bench.cases import CPU_DEFAULT, GPU_DEFAULT, T_CPU, T_GPU, Case
from bench.goals import summary
from bench.rows import COLUMNS, NAN, RESULTS, Measured, header, read

LINES = {  # provider: (label, colour); ours first
    "auto-fast-packed": ("ours, fast, packed", "#b22222"),
    "auto-exact-packed": ("ours, exact, packed", "#e08060"),
    "auto-fast": ("ours, fast", "#1f4e9c"),
    "auto-exact": ("ours, exact", "#6a9be0"),
    "peft": ("PEFT", "#222222"),
    "naive": ("PEFT's loop", "#777777"),
    "cat": ("cat", "#2e8b57"),
    "three_calls": ("three calls", "#9acd32"),
    "compile": ("torch.compile", "#b8860b"),
    "onednn": ("oneDNN, prepacked", "#8a2be2"),
    "bare": ("F.linear alone", "#bbbbbb"),
}


def figure(
    m: Measured, cases: list[Case], at: Callable[[Case], int], over_bare: bool, words: tuple[str, str, str], path: Path
) -> bool:
    """Draw one line a provider over the cases that were measured; tell whether there were any."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for provider, (label, colour) in LINES.items():
        points = [(at(c), m.time(c, provider) / (m.time(c, "bare") if over_bare else 1.0)) for c in cases]
        points = [p for p in points if not math.isnan(p[1])]
        if points:
            axes.plot(*zip(*points), marker="o", ms=3, label=label, color=colour, lw=2 if "ours" in label else 1)
    if not axes.lines:
        plt.close(fig)
        return False
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    title, x, y = words
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(f"{title}\n{m.device}, commit {', '.join(sorted(m.commits))}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    fig.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(fig)
    return True


def draw(m: Measured, folder: Path) -> list[Path]:
    """Draw ratio to the bare product against T, and time against the number of adapters."""
    base, rows = (GPU_DEFAULT, T_GPU) if m.gpu else (CPU_DEFAULT, T_CPU)
    sweeps = {
        "rows": ([replace(base, T=T) for T in rows], lambda c: c.T, True, "rows T", "time / time of F.linear"),
        "adapters": (
            [replace(base, P=P) for P in (1, 4, 8, 16)],
            lambda c: c.N,
            False,
            "live adapters N",
            "microseconds",
        ),
    }
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (cases, at, over_bare, x, y) in sweeps.items():
        first = cases[0]
        fixed = f"N = {first.N}" if name == "rows" else f"T = {first.T}"
        title = f"{first.K} x {first.O}, r = {first.r}, {fixed}, {first.dtype}, {first.timer}"
        path = folder / f"{m.device}_{name}.png"
        if figure(m, cases, at, over_bare, (title, x, y), path):
            made.append(path)
    return made


def main(argv: Iterable[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    p.add_argument("files", nargs="*", type=Path, help="rows; default: all of --out")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="rows and figures; default: bench/results")
    p.add_argument("--ours", default="", help="the provider that speaks for us; default auto-fast, packed on a CPU")
    p.add_argument("--no-figures", action="store_true")
    args = p.parse_args(None if argv is None else list(argv))
    for path in args.files:
        if header(path) != list(COLUMNS):
            p.error(f"{path}: expected rows of python -m bench.run, with the columns {', '.join(COLUMNS)}")
    # Other tables lie beside the rows: a roofline, occupancies.
    files = args.files or sorted(f for f in args.out.glob("*.csv") if header(f) == list(COLUMNS))
    if not files:
        for device, case in (("a CPU", CPU_DEFAULT), ("a GPU", GPU_DEFAULT)):
            print(summary(Measured(device, {(case.name, "bare"): NAN}), args.ours), end="\n\n")
        print(
            f"No rows in {args.out}. Measure them: python -m bench.run, or bench/gpu_suite.sh for all that needs a GPU."
        )
    for path in files:
        m = read(path)
        print(summary(m, args.ours), end="\n\n")
        for made in [] if args.no_figures else draw(m, args.out):
            print(f"drew {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
