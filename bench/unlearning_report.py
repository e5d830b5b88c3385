"""Tables and figures of the evaluation, from rows alone: means over seeds, of the newest run of each cell."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from bench.rows import NAN
from bench.unlearning_stores import AFTER

RATES = "requests"  # rows of plans, of no data set
NAMES = {
    "base": "base alone",
    "heads": "linear heads on the base",
    "full": "full fine-tuning, cannot forget",
    "retrain": "full fine-tuning, retrained at each request",
    "unsharded": "one LoRA on all data",
    "one-slice": "one-slice shards, no stages",
    "sisa-stack": "SISA, `stack`",
    "rotation-stack": "S3T `rotation`, `stack`",
    "subsets-stack": "S3T `subsets`, `stack`",
    "sisa-layers": "SISA, `layers`",
    "rotation-layers": "S3T `rotation`, `layers`",
    "subsets-layers": "S3T `subsets`, `layers`",
}
COLOURS = {
    "one-slice": "#222222", "sisa-stack": "#8a8a8a", "rotation-stack": "#2e8b57", "subsets-stack": "#b22222",
    "rotation-layers": "#8fae1b", "subsets-layers": "#f0803c",
}  # fmt: skip

PARTS, WHEN = ("deleted", "kept", "test"), ("before", "after")
BETTER = {"accuracy": "higher", "rmse": "lower", "nats": "lower"}
Found = dict[tuple[str, str, str, str], dict[int, float]]  # (data, method, metric, x) to seed to value


def read(path: Path) -> tuple[Found, dict[str, str], list[float]]:
    """Read rows: the last of each cell and metric stands; the unit of each data set's score; and the loads told."""
    found: Found = {}
    units: dict[str, str] = {}
    loads: list[float] = []
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    newest = {(r["data"], r["method"], r["seed"]): (r["settings"], r["utc"]) for r in rows}
    for row in rows:
        if newest[row["data"], row["method"], row["seed"]] != (row["settings"], row["utc"]):
            continue
        key = (row["data"], row["method"], row["metric"], row["x"])
        found.setdefault(key, {})[int(row["seed"])] = float(row["value"])
        loads += [float(row["load"])] if row.get("load") else []
        if row["metric"].startswith("score"):
            units[row["data"]] = row["unit"]
    return found, units, loads


def table(path: Path) -> str:
    """Lay out in Markdown: scores; costs; deleted and kept records; adapters' likeness; plans; what was published."""
    found, units, loads = read(path)
    parts = [costs(found, loads), memory(found), likeness(found), rates(found), published(found)]
    return "\n\n".join(filter(None, [*scores(found, units), *parts]))


def _number(values: Iterable[float], digits: int = 3) -> str:
    """Give a mean, in three digits or so; nothing where there is none."""
    if not (values := list(values)):
        return ""
    mean = fmean(values)
    return f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.{digits}f}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    width = [any(line[i] for line in lines) for i in range(len(head))]  # no column without a figure
    kept = [[text for text, there in zip(line, width) if there] for line in [head, ["---"] * len(head), *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in kept)


def _data(found: Found) -> list[str]:
    return [data for data in dict.fromkeys(key[0] for key in found) if data != RATES]


def _methods(found: Found) -> list[str]:
    return [method for method in NAMES if any(key[1] == method for key in found)]


def scores(found: Found, units: dict[str, str]) -> Iterator[str]:
    """Lay out a data set's scores: every shard at one depth, and after requests; and requests until shards are dead."""
    for data in _data(found):
        seeds = sorted({seed for key, values in found.items() if key[0] == data for seed in values})
        depths = sorted({int(x) for d, _, metric, x in found if (d, metric) == (data, "score at depth") if x != "0"})
        lines, spread = [], [0.0]
        for method in _methods(found):
            at = {key[2:]: values for key, values in found.items() if key[:2] == (data, method)}
            if not at:
                continue
            own = max((int(x) for metric, x in at if metric == "score at depth"), default=0)
            whole = at.get(("score at depth", str(own))) or at.get(("score before", "test"), {})
            by_depth = [at.get(("score at depth", str(d)), {}) if d < own else {} for d in depths[:-1]]
            columns = [whole.values(), *(v.values() for v in by_depth), *(_after(at, n) for n in AFTER)]
            spread += [stdev(values) for values in map(list, columns) if len(values) > 1]
            dead = [_number(at.get(("served", stop), {}).values(), 0) for stop in ("first", "last")]
            there = f" (of {len(whole)} seeds)" if 0 < len(whole) < len(seeds) else ""
            lines.append([NAMES[method] + there, *map(_number, columns), *dead])
        head = ["method", "whole", *(f"depth {d}" for d in depths[:-1]), *(f"after {n}" for n in AFTER)]
        unit = units.get(data, "")
        told = f"**{data}**: {unit}, {BETTER.get(unit, '')} is better; mean of the seeds "
        told += f"{', '.join(map(str, seeds))} that serve"
        told += f", whose standard deviation is at most {_number([max(spread)])}" if len(spread) > 1 else ""
        yield told + "\n\n" + _markdown([*head, "requests to the first dead shard", "to the last"], lines)


def costs(found: Found, loads: Sequence[float]) -> str:
    """Lay out seconds of training, seconds to retrain at once what a request cost, and MB of weights, by data set."""
    lines = []
    for method in _methods(found):
        line = [NAMES[method]]
        for data in _data(found):
            at = {key[2:]: values for key, values in found.items() if key[:2] == (data, method)}
            again = [v for (metric, _), values in at.items() if metric == "healed" for v in values.values()]
            again += [v / 1e3 for (metric, _), values in at.items() if metric == "retrained" for v in values.values()]
            stored = [v / 1e6 for v in at.get(("stored", "nodes"), {}).values()]
            cells = [_number(at.get(("training", ""), {}).values(), 0), _number(again, 1), _number(stored, 1)]
            line.append(" / ".join(cell or "-" for cell in cells) if any(cells) else "")
        lines.append(line)
    asked = [v for key, values in found.items() if key[2:] == ("acknowledged", "p50") for v in values.values()]
    told = "Seconds of one core for training / to retrain at once what a request cost / MB of weights"
    if asked:
        told += f". A request is acknowledged in {median(asked):.1f} ms (median over stores), whatever the method"
    if loads:
        told += f". Load of the machine: {min(loads):.1f} to {max(loads):.1f}; where it is high, seconds are longer"
    return told + "\n\n" + _markdown(["method", *_data(found)], lines) if any(any(line[1:]) for line in lines) else ""


def memory(found: Found) -> str:
    """Lay out scores on deleted, kept and test records, before and after people are deleted together."""
    columns = {"full": "before", "retrain": "after", "subsets-stack": "", "subsets-layers": ""}
    asked = [(method, when) for method, only in columns.items() for when in WHEN if not only or when == only]
    lines = []
    for data in _data(found):
        line = [data]
        for method, when in asked:
            cells = [_number(found.get((data, method, f"score {when}", part), {}).values()) for part in PARTS]
            line.append(" / ".join(cells) if all(cells) else "")
        lines.append(line)
    head = ["data", *(f"{NAMES[method].split(',')[0]}{_placement(method)}, {when}" for method, when in asked)]
    told = "Scores on deleted / kept / test records, before and after 40 people are deleted together"
    return told + "\n\n" + _markdown(head, lines) if any(any(line[1:]) for line in lines) else ""


def _placement(method: str) -> str:
    return f", `{method.partition('-')[2]}`" if "-" in method else ""


def likeness(found: Found) -> str:
    """Lay out how alike adapters are, by what two of them have in common."""
    last = {data: max((int(x) for d, _, m, x in found if (d, m) == (data, "score at depth")), default=0)
            for data in _data(found)}  # fmt: skip
    pairs: dict[str, Callable[[str, str], bool]] = {
        "first stages of two shards": lambda x, _: x == "depth 1, other shard, same path",
        "first stages of one shard, on two slices": lambda x, _: x == "depth 1, 0 slices in common",
        "last stages of two shards": lambda x, data: x == f"depth {last[data]}, other shard, same path",
        "two stages of one sequence": lambda x, _: x.startswith("stages "),
    }
    lines = []
    for name, fits in pairs.items():
        line = [name]
        for data in _data(found):
            cells = []
            for method in ("subsets-stack", "subsets-layers"):
                at = [v for (d, m, k, x), values in found.items() if (d, m, k) == (data, method, "similarity")
                      and fits(x, data) for v in values.values()]  # fmt: skip
                cells.append(_number(at, 2) or "-")
            line.append(" / ".join(cells) if cells != ["-", "-"] else "")
        lines.append(line)
    told = "Cosine of what two adapters add to a weight, `stack` / `layers`, mean over layers and pairs"
    return told + "\n\n" + _markdown(["adapters", *_data(found)], lines) if any(any(line[1:]) for line in lines) else ""


def _after(at: dict[tuple[str, str], dict[int, float]], count: int) -> list[float]:
    """Give the score after so many requests of each seed that serves then: the last one measured before."""
    values = []
    for seed, end in at.get(("served", "last"), {}).items():
        before = [int(x) for metric, x in at if metric == "score after" and x.isdigit() and int(x) <= count]
        measured = [at["score after", str(x)][seed] for x in sorted(before) if seed in at["score after", str(x)]]
        if measured and count < end:
            values.append(measured[-1])
    return values or list(at.get(("score after", str(count)), {}).values())


# --- deletion rate and retraining frequency --------------------------------------------------------------------------


def rates(found: Found) -> str:
    """Lay out what uniform requests cost each plan, in closed form; and how far counting them is from it."""
    metrics = {
        "cost": "slice-passes, trained once",
        "first": "requests to the first dead shard",
        "last": "to the last",
        "retrainings": "retrainings a request",
        "passes": "slice-passes a request",
    }
    lines, off = [], [0.0]
    for plan in dict.fromkeys(key[1] for key in found if key[0] == RATES):
        line = [plan]
        for metric in metrics:
            exact, counted = (list(found.get((RATES, plan, metric, x), {}).values()) for x in ("exact", "counted"))
            line.append(f"{fmean(exact or counted):.3g}" if exact or counted else "")
            off += [abs(fmean(counted) / fmean(exact) - 1)] if exact and counted else []
        lines.append(line)
    told = (
        f"Five shards of four slices, uniform requests, in closed form; counted one by one at most {max(off):.1%} off"
    )
    return told + "\n\n" + _markdown(["plan", *metrics.values()], lines) if lines else ""


def published(found: Found) -> str:
    """Set published figures beside ours, where the setting allows."""

    def exact(plan: str, metric: str) -> float:
        return fmean(found.get((RATES, plan, metric, "exact"), {0: NAN}).values())

    lasted = exact("rotation", "last") / exact("sisa", "last")
    quicker = exact("all at once", "passes") / exact("sisa at once", "passes")
    lines = [
        [
            "SISA, retraining of a shard over that of all data: times faster (arXiv 1912.03817, abstract)",
            "4.63 (Purchase), 2.45 (SVHN), 1.36 (ImageNet)",
            f"{quicker:.2f} in slice-passes",
        ],
        [
            "S3T over SISA, requests to the last dead shard, m = 5, L = 4, B = 4 (arXiv 2406.16257, its theorem)",
            f"log(mB) / log(m) = {math.log(20) / math.log(5):.2f} to leading order",
            f"{lasted:.2f} in closed form{_measured(found)}",
        ],
    ]
    return "Published figures\n\n" + _markdown(["figure", "published", "ours"], lines)


def _measured(found: Found) -> str:
    """Give the ratio of each data set, each with a stream and, some of them, a plan of its own: no mean means much."""
    ratios = {
        data: fmean(value / found[data, "sisa-stack", "served", "last"][seed] for seed, value in values.items())
        for (data, method, metric, x), values in found.items()
        if (method, metric, x) == ("rotation-stack", "served", "last")
        if values.keys() <= found.get((data, "sisa-stack", "served", "last"), {}).keys()
    }
    return "".join(f", {data} {ratio:.2f}" for data, ratio in ratios.items())


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(path: Path, out: Path) -> list[Path]:
    """Draw scores against requests, a panel for each data set: means over seeds, while every seed serves."""
    from matplotlib.figure import Figure

    found, units, _ = read(path)
    shown = [data for data in units if any(key[::2] == (data, "served") for key in found)]
    if not shown:
        return []
    columns = min(3, len(shown) + 1)
    figure = Figure(figsize=(3.4 * columns, 2.9 * -(-(len(shown) + 1) // columns)), layout="constrained")
    panels = figure.subplots(-(-(len(shown) + 1) // columns), columns, squeeze=False).flatten()
    lines: dict[str, Any] = {}
    for axes, data in zip(panels, shown):
        for method, colour in COLOURS.items():
            at = {key[2:]: values for key, values in found.items() if key[:2] == (data, method)}
            if not (ends := at.get(("served", "last"))):
                continue
            means = [(n, fmean(v)) for n in range(int(max(ends.values()))) if len(v := _after(at, n)) == len(ends)]
            style = "--" if method.endswith("layers") else "-"
            (lines[method],) = axes.plot(*zip(*means), color=colour, ls=style, lw=1.8, drawstyle="steps-post")
        for method, style in (("full", (0, (6, 2))), ("heads", ":")):
            level = found.get((data, method, "score before", "test")) or found.get(
                (data, method, "score at depth", "0")
            )
            if level:
                lines[method] = axes.axhline(fmean(level.values()), color="grey", ls=style, lw=1)
        axes.set(xlabel="people forgotten", ylabel=f"{units[data]}, {BETTER.get(units[data], '')} is better")
        axes.set_title(data, loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    labels = [NAMES[method].replace("`", "") for method in lines]
    panels[len(shown)].legend(lines.values(), labels, loc="center left", fontsize=9, frameon=False)
    made = out / "unlearning.png"
    figure.savefig(made, dpi=150, metadata={"Software": None})
    return [made]
