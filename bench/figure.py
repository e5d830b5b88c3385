"""Two figures a device, drawn from rows alone: the layer's time over the plain layer's, against rows and adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases import ADAPTERS, CPU_DEFAULT, GPU_DEFAULT, T_CPU, T_GPU, Case
from bench.goals import speakers
from bench.rows import Measured

LINES = {  # provider, ours with or without "-packed": (label, colour)
    "auto-exact": ("ours, exact", "#b22222"),
    "auto-fast": ("ours, fast", "#f0803c"),
    "peft": ("PEFT", "#222222"),
    "cat": ("PEFT, cat", "#2e8b57"),
    "three_calls": ("three calls", "#8fae1b"),
    "compile": ("compiled loop", "#8b6a14"),
    "compile_cat": ("compiled cat", "#d4a017"),
    "onednn": ("oneDNN, packed", "#7b4fc9"),
    "bare": ("F.linear alone", "#8a8a8a"),
}
THREADS = {"1t": "one thread", "all": "all threads", "graph": "CUDA graph", "eager": "from Python"}
GAP = 0.058  # between two labels, of the height of a panel


def draw(m: Measured, folder: Path) -> list[Path]:
    """Draw what was measured of both sweeps, a panel for each type.

    Returns:
        The files made; none for a sweep of which no two cases were measured.
    """
    base, rows = (GPU_DEFAULT, T_GPU) if m.gpu else (CPU_DEFAULT, T_CPU)
    sweeps: tuple[tuple[str, str, list[Case], Callable[[Case], int], str], ...] = (
        ("rows", "rows T", [replace(base, T=T) for T in rows], lambda c: c.T, f"{base.N} adapters"),
        ("adapters", "live adapters N", [replace(base, P=P) for P in ADAPTERS], lambda c: c.N, f"{base.T} rows"),
    )
    made = []
    for name, axis, cases, at, fixed in sweeps:
        panels = {}
        for dtype in ("fp32", "bf16"):
            lines = _lines(m, [replace(c, dtype=dtype) for c in cases], at)
            if max(map(len, lines.values()), default=0) > 1:
                panels[dtype] = lines
        if panels:
            words = f"{base.K} x {base.O}, {fixed}, rank {base.r}, {THREADS[base.timer]}"
            made.append(folder / f"{m.device}_{name}.png")
            folder.mkdir(parents=True, exist_ok=True)
            _figure(panels, axis, f"{words}; {m.device}, commit {m.commits.get('layers', '-')}", made[-1])
    return made


def _lines(m: Measured, cases: Iterable[Case], at: Callable[[Case], int]) -> dict[str, list[tuple[int, float]]]:
    """Give the points of each provider: time over the plain layer's, where both were measured."""
    found = {}
    for name, ours in zip(LINES, speakers(m) + (None,) * len(LINES)):
        points = [(at(c), m.time(c, ours or name) / m.time(c, "bare")) for c in cases]
        if points := [p for p in points if not math.isnan(p[1])]:
            found[name] = points
    return found


def _figure(panels: dict[str, dict[str, list[tuple[int, float]]]], axis: str, words: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    fig, row = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.7), sharey=True, squeeze=False)
    highest = max(y for lines in panels.values() for points in lines.values() for _, y in points)
    lowest = min(y for lines in panels.values() for points in lines.values() for _, y in points)
    for axes, (dtype, lines) in zip(row[0], panels.items()):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylim(lowest / 1.15, highest * 1.15)
        for provider, points in reversed(lines.items()):  # ours on top
            ours = provider.startswith("auto")
            style = {"lw": 2.2, "ms": 4} if ours else {"lw": 1.2, "ms": 2.5}
            label, colour = LINES[provider]
            dashes = (0, (4, 2)) if provider == "bare" else "-"
            axes.plot(
                *zip(*points), marker="" if provider == "bare" else "o", label=label, color=colour, ls=dashes, **style
            )
        _label(axes, lines)
        for direction in (axes.xaxis, axes.yaxis):
            direction.set_major_formatter(lambda value, _: f"{value:g}")
            direction.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_title(dtype, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel(axis)
    row[0][0].set_ylabel("time / time of F.linear")
    fig.text(0.01, 0.01, words, fontsize=6.5, color="#666666")
    fig.tight_layout(rect=(0, 0.03, 1, 1), w_pad=0.6)
    fig.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(fig)


def _label(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Name each line at its right end, in its colour, no two names upon one another."""
    low, high = (math.log(y) for y in axes.get_ylim())
    ends = sorted((math.log(points[-1][1] / math.exp(low)) / (high - low), name) for name, points in lines.items())
    for (_, name), place in zip(ends, _apart([height for height, _ in ends])):
        label, colour = LINES[name]
        axes.annotate(
            label,
            xy=lines[name][-1],
            xytext=(1.06, place),
            textcoords=axes.transAxes,
            fontsize=7.5,
            va="center",
            color=colour,
            fontweight="bold" if name.startswith("auto") else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
        )


def _apart(heights: list[float]) -> list[float]:
    """Move ascending heights as little as may be until they are a ``GAP`` apart: what is too close spreads evenly."""
    blocks: list[list[float]] = []

    def bottom(block: list[float]) -> float:
        return min(max(sum(block) / len(block) - GAP * (len(block) - 1) / 2, 0.0), 1.0 - GAP * (len(block) - 1))

    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + GAP * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [bottom(block) + GAP * n for block in blocks for n in range(len(block))]
