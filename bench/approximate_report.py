"""The table and the figure of approximate methods beside S3T, from rows alone: means over seeds, 95% t-intervals."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from bench import approximate_cases
from bench.approximate_scores import PARTS, interval
from s3t_ext.approximate import METHODS

FIRST = ("s3t", "retrain", "nothing")  # rows on top
NAMES = {"s3t": "**S3T**", "retrain": "retraining, other seed", "nothing": "the adapter as it is"}
POWER = 0.6  # least AUC of the control from which a row of membership inference says anything
Row = dict[str, str]


def read(path: Path) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Read rows by (data, scenario) and method, in the order of what is declared: of each seed the newest."""
    newest: dict[tuple[str, str, str, str], Row] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            newest[row["data"], row["scenario"], row["method"], row["seed"]] = row
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for (data, scenario, method, _), row in newest.items():
        found.setdefault((data, scenario), {}).setdefault(method, []).append(row)
    methods = [*FIRST, *METHODS]
    names, scenarios = list(approximate_cases.SETTINGS), list(approximate_cases.SCENARIOS)
    return {
        case: {name: found[case][name] for name in sorted(found[case], key=methods.index)}
        for case in sorted(found, key=lambda case: (scenarios.index(case[1]), names.index(case[0])))
    }


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """Give a column's numbers; rows without one have none."""
    return [float(row[column]) for row in rows if row[column] != ""]


def summary(path: Path) -> str:
    """Lay out one table of all methods, in Markdown: of each scenario means over its data sets and seeds.

    A cell has the tug of war, what leaks, and the median of seconds. ``test``: the mean score on test records over that
    of the adapter retrained on the rest, of a regression the error under its.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    retrained: dict[tuple[str, str, str], float] = {}
    for (_, scenario), methods in read(path).items():
        for name, rows in methods.items():
            found.setdefault(name, {}).setdefault(scenario, []).extend(rows)
            if name != "s3t":
                retrained |= {_where(row): float(row["oracle_test"]) for row in rows}
    scenarios = list(dict.fromkeys(scenario for cells in found.values() for scenario in cells))
    lines = [["method", *scenarios, "test", "collapsed"]]
    lines.append(["---"] * len(lines[0]))
    for name in sorted(found, key=[*FIRST, *METHODS].index):
        every = [row for rows in found[name].values() for row in rows]
        cells = [_cell(found[name].get(scenario, [])) for scenario in scenarios]
        ahead = [
            (float(row["test"]) - retrained[_where(row)]) * (-1 if row["unit"] == "mae" else 1)
            for row in every
            if _where(row) in retrained
        ]
        collapsed = f"{sum(row['collapsed'] != '' for row in every)} of {len(every)}"
        lines.append([NAMES.get(name, f"`{name}`"), *cells, f"{fmean(ahead):+.3f}" if ahead else "-", collapsed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    seconds = median(numbers(rows, "seconds"))
    took = f"{seconds:.2g} s" if seconds > 1e-3 else "0 s"
    return f"{fmean(numbers(rows, 'tow')):.2f}, {fmean(map(leak, rows)):.2f}, {took}"


def _where(row: Row) -> tuple[str, str, str]:
    return row["data"], row["scenario"], row["seed"]


def leak(row: Row) -> float:
    """Say how far the attack's AUC is from the oracle's, on either side."""
    return abs(float(row["auc"]) - float(row["oracle_auc"]))


def table(path: Path) -> str:
    """Lay out a table for each data set and scenario, in Markdown."""
    return "\n\n".join(_table(*case, methods) for case, methods in read(path).items())


def _table(data: str, scenario: str, methods: dict[str, list[Row]]) -> str:
    some = next(iter(methods.values()))[0]
    seeds = sorted({int(row["seed"]) for rows in methods.values() for row in rows})
    every = [row for name, rows in methods.items() for row in rows if name != "s3t"] or methods["s3t"]
    control, oracle = (fmean(numbers(every, name)) for name in ("control_auc", "oracle_auc"))
    head = f"**{data}, {scenario}**: {some['forgotten']} records forgotten, {some['kept']} kept; {some['unit']}; seeds "
    head += f"{', '.join(map(str, seeds))}. Retrained oracle: "
    head += " / ".join(_plain(numbers(every, f"oracle_{part}")) for part in PARTS)
    head += f", AUC {oracle:.3f}; before forgetting AUC {control:.3f}"
    head += "" if control >= POWER else " (below 0.6: this attack sees little)"
    head += ". People are of one slice of every shard" if scenario in ("people", "authors") else ""
    more = {"wasserstein": "Wasserstein", "relearn": "relearn", "quality": "forget quality"}
    more = {name: title for name, title in more.items() if any(numbers(rows, name) for rows in methods.values())}
    titles = ["method", "forget / retain / test", "ToW", "AUC", "its oracle", "TPR at 1% FPR", *more.values()]
    lines = []
    for name, rows in methods.items():
        collapsed = sum(row["collapsed"] != "" for row in rows)
        line = [
            NAMES.get(name, f"`{name}`") + f", {collapsed} of {len(rows)} collapsed" * (collapsed > 0),
            " / ".join(_plain(numbers(rows, part)) for part in PARTS),
        ]
        line += [_spread(numbers(rows, "tow")), _spread(numbers(rows, "auc")), _plain(numbers(rows, "oracle_auc"))]
        line += [_plain(numbers(rows, "tpr")), *(_plain(numbers(rows, column)) for column in more)]
        lines.append(
            [*line, f"{fmean(numbers(rows, 'seconds')):.3g}", f"{fmean(numbers(rows, 'megabytes') or [math.nan]):.0f}"]
        )
        lines[-1].append(" / ".join(sorted({row["guarantee"] for row in rows})))
    titles += ["s", "MB", "guarantee"]
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *lines])])


def _plain(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "-"
    mean = fmean(values)
    return f"{mean:.1e}" if 0 < abs(mean) < 10**-digits else f"{mean:.{digits}f}"


def _spread(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


# --- the figure ------------------------------------------------------------------------------------------------------


def draw(path: Path, out: Path) -> list[Path]:
    """Draw what leaks against what is known, a panel for each data set and scenario; large marks took long.

    Up: how far the attack's AUC is from the oracle's, on either side; right: accuracy on test records, or less error.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = read(path)
    names = list(dict.fromkeys(name for methods in found.values() for name in methods))
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.5 * columns, 3 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    look = {name: _look(i, name) for i, name in enumerate(names)}
    for axes, ((data, scenario), methods) in zip(panels, found.items()):
        for name, rows in methods.items():
            size = 25 * (1 + max(0.0, math.log10(max(fmean(numbers(rows, "seconds")), 1e-9) / 0.1)))
            colour, marker = look[name]
            how = {"s": max(150.0, size), "zorder": 3} if name == "s3t" else {"s": size, "alpha": 0.85}
            at = fmean(numbers(rows, "test")), fmean(map(leak, rows))
            axes.scatter(*at, color=colour, marker=marker, lw=0, **how)
        unit = next(iter(methods.values()))[0]["unit"]
        axes.set_title(f"{data}, {scenario}", loc="left", fontsize=10, fontweight="bold")
        axes.set(xlabel=f"test {unit}{', less to the right' * (unit == 'mae')}", ylabel="|AUC - oracle's|")
        axes.set_ylim(bottom=-0.01)
        if unit == "mae":
            axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in panels[len(found) :]:
        axes.axis("off")
    marks = [Line2D([], [], color=colour, marker=marker, ls="", ms=6) for colour, marker in look.values()]
    told = [NAMES.get(name, name).strip("*") for name in look]
    figure.legend(marks, told, loc="outside lower center", fontsize=9, frameon=False, ncols=1 + len(told) // 3)
    made = out / "approximate.png"
    figure.savefig(made, dpi=150, metadata={"Software": None})
    return [made]


def _look(number: int, name: str) -> tuple[str, str]:
    """Give a method's colour and mark: S3T a red star, what the tables begin with in grey, the others in turn."""
    if name == "s3t":
        return "#b22222", "*"
    if name in FIRST:
        return "#555555", "sX"[FIRST.index(name) - 1]
    colours = ("#1f6fb4", "#2e8b57", "#f0803c", "#7b4fc9", "#8fae1b", "#d4a017", "#17a2a2", "#c2549d", "#8b6a14")
    return colours[number % len(colours)], "o^D"[number // len(colours) % 3]
