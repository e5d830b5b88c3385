"""Tables and figures of the evaluation, from rows alone: means over seeds, of the newest run of each cell."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

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

# What was published, where, and ours: by a key of `published`, or why there is none.
PUBLISHED = (
    (
        "requests to the last dead shard over SISA's, m = 5, L = 4, B = 4",
        "1.6 to 3, in all its settings",
        "S3T (arXiv 2406.16257)",
        "last",
    ),
    ("the same for each slice-pass trained", "not given", "", "per pass"),
    (
        "accuracy of ViT on CIFAR, RoBERTa on GLUE, Llama on instructions",
        "its tables were not at hand",
        "S3T",
        "not comparable: its bases are pretrained on ImageNet-21k or the web, ours here on thousands of records",
    ),
    (
        "cost of a request over retraining all",
        "1/4.63 (Purchase), 1/2.45 (SVHN)",
        "SISA (arXiv 1912.03817), abstract",
        "at once",
    ),
    (
        "forget quality and utility on TOFU, Llama 2 7B and Phi 1.5",
        "many",
        "TOFU (arXiv 2401.06121)",
        "not comparable: our decoder is small and made here",
    ),
)

PARTS, WHEN = ("deleted", "kept", "test"), ("before", "after")
Found = dict[tuple[str, str, str, str], dict[int, float]]  # (data, method, metric, x) to seed to value


def read(path: Path) -> tuple[Found, dict[str, str]]:
    """Read rows: the last of each cell and metric stands; and the unit of each data set's score."""
    found: Found = {}
    units: dict[str, str] = {}
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    newest = {(r["data"], r["method"], r["seed"]): (r["settings"], r["utc"]) for r in rows}
    for row in rows:
        if newest[row["data"], row["method"], row["seed"]] != (row["settings"], row["utc"]):
            continue
        key = (row["data"], row["method"], row["metric"], row["x"])
        found.setdefault(key, {})[int(row["seed"])] = float(row["value"])
        if row["metric"].startswith("score"):
            units[row["data"]] = row["unit"]
    return found, units


def table(path: Path) -> str:
    """Lay all data sets out in Markdown, a line a method; then the three experiments, and what was published."""
    found, units = read(path)
    parts = []
    for data in dict.fromkeys(key[0] for key in found if key[0] != RATES):
        methods = [m for m in NAMES if any(key[:2] == (data, m) for key in found)]
        parts += [f"**{data}** ({units.get(data, '')}; mean over seeds)", _main(found, data, methods)]
        parts += [
            _wide(
                found, data, methods, {f"all maximal nodes, after {n}": ("maximal after", str(n)) for n in (0, *AFTER)}
            ),
            _wide(
                found, data, methods, {f"{part}, {when}": (f"score {when}", part) for part in PARTS for when in WHEN}
            ),
            _similarity(found, data, methods),
        ]
    return "\n\n".join(filter(None, [*parts, rates(found), published(found)]))


def _cell(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    if not values:
        return ""
    digits = 0 if fmean(values) > 100 else digits
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    width = [any(line[i] for line in lines) for i in range(len(head))]  # no column without a figure
    kept = [[text for text, there in zip(line, width) if there] for line in [head, ["---"] * len(head), *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in kept)


def _main(found: Found, data: str, methods: list[str]) -> str:
    depths = sorted({int(key[3]) for key in found if key[0] == data and key[2] == "score at depth" and int(key[3])})
    head = ["method", "whole", *(f"depth {d}" for d in depths[:-1]), *(f"after {n}" for n in AFTER)]
    head += ["first dead", "half", "last", "training, s", "a request, ms", "retrained at once, s", "MB"]
    lines = []
    for method in methods:
        at = {key[2:]: values for key, values in found.items() if key[:2] == (data, method)}
        own = max((int(x) for metric, x in at if metric == "score at depth"), default=0)
        whole = at.get(("score at depth", str(own))) or at.get(("score before", "test"), {})
        line = [NAMES[method], _cell(whole.values())]
        line += [_cell(at.get(("score at depth", str(d)), {}).values()) if d < own else "" for d in depths[:-1]]
        line += [_cell(_after(at, n)) for n in AFTER]
        line += [_cell(at.get(("served", stop), {}).values(), 1) for stop in ("first", "half", "last")]
        line += [_cell(at.get(("training", ""), {}).values(), 0)]
        request = at.get(("acknowledged", "p50"), {})
        line += [f"{fmean(request.values()):.1f}" if request else ""]
        healed = [value for (metric, _), values in at.items() if metric == "healed" for value in values.values()]
        healed += [value / 1e3 for value in at.get(("retrained", ""), {}).values()]
        line += [f"{fmean(healed):.3g}" if healed else ""]
        stored = at.get(("stored", "nodes"), {})
        line += [f"{fmean(stored.values()) / 1e6:.1f}" if stored else ""]
        lines.append(line)
    return _markdown(head, lines)


def _after(at: dict[tuple[str, str], dict[int, float]], count: int) -> list[float]:
    """Give the score after so many requests of each seed that serves then: the last one measured before."""
    values = []
    for seed, end in at.get(("served", "last"), {}).items():
        before = [int(x) for metric, x in at if metric == "score after" and x.isdigit() and int(x) <= count]
        measured = [at["score after", str(x)][seed] for x in sorted(before) if seed in at["score after", str(x)]]
        if measured and count < end:
            values.append(measured[-1])
    return values or list(at.get(("score after", str(count)), {}).values())


def _wide(found: Found, data: str, methods: list[str], columns: dict[str, tuple[str, str]]) -> str:
    """Lay out metrics, a line for each method that has some."""
    lines = []
    for method in methods:
        values = [found.get((data, method, *at), {}) for at in columns.values()]
        if any(values):
            lines.append([NAMES[method], *(_cell(v.values()) for v in values)])
    return _markdown(["method", *columns], lines) if lines else ""


def _similarity(found: Found, data: str, methods: list[str]) -> str:
    lines = [
        [NAMES[method], key[3], _cell(values.values())]
        for method in methods
        for key, values in sorted(found.items())
        if key[:3] == (data, method, "similarity")
    ]
    return _markdown(["method", "adapters compared", "cosine"], lines) if lines else ""


# --- deletion rate and retraining frequency --------------------------------------------------------------------------


def rates(found: Found) -> str:
    """Lay out what uniform requests cost each plan; counted figures in brackets."""
    metrics = {
        "cost": "slice-passes, trained once",
        "first": "requests to the first dead shard",
        "last": "to the last",
        "retrainings": "retrainings a request",
        "passes": "slice-passes a request",
    }
    lines = []
    for plan in dict.fromkeys(key[1] for key in found if key[0] == RATES):
        line = [plan]
        for metric in metrics:
            exact, counted = (found.get((RATES, plan, metric, x), {}).values() for x in ("exact", "counted"))
            both = [f"{fmean(exact):.3g}"] if exact else []
            both += [f"({fmean(counted):.3g})" if exact else f"{fmean(counted):g}"] if counted else []
            line.append(" ".join(both))
        lines.append(line)
    return _markdown(["plan", *metrics.values()], lines) if lines else ""


def published(found: Found) -> str:
    """Set each published figure beside ours."""

    def exact(plan: str, metric: str) -> float:
        return fmean(found.get((RATES, plan, metric, "exact"), {0: NAN}).values())

    def cost(plan: str) -> float:
        return fmean(found.get((RATES, plan, "cost", "counted"), {0: NAN}).values())

    last = exact("rotation", "last") / exact("sisa", "last")
    ours = {
        "last": f"{last:.2f} in closed form{_measured(found)}",
        "per pass": f"{last * cost('sisa') / cost('rotation'):.2f}",
        "at once": f"1/{exact('all at once', 'passes') / exact('sisa at once', 'passes'):.2f} in slice-passes",
    }
    lines = [[figure, said, where, ours.get(key, key)] for figure, said, where, key in PUBLISHED]
    return _markdown(["figure", "published", "where", "ours"], lines)


def _measured(found: Found) -> str:
    ratios = [
        value / found[data, "sisa-stack", "served", "last"][seed]
        for (data, method, metric, x), values in found.items()
        if (method, metric, x) == ("rotation-stack", "served", "last")
        for seed, value in values.items()
        if seed in found.get((data, "sisa-stack", "served", "last"), {})
    ]
    return f", {_cell(ratios, 2)} over {len(ratios)} measured streams" if ratios else ""


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(path: Path, out: Path) -> list[Path]:
    """Draw the score against requests, a figure for each data set: mean over seeds, and each seed's own line."""
    from matplotlib.figure import Figure

    found, units = read(path)
    made = []
    for data, unit in units.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for method, colour in COLOURS.items():
            at = {key[2:]: values for key, values in found.items() if key[:2] == (data, method)}
            ends = at.get(("served", "last"))
            if not ends:
                continue
            counts = range(int(max(ends.values())))
            means = [(n, fmean(v)) for n in counts if (v := _after(at, n)) and len(v) == len(ends)]
            axes.plot(*zip(*means), color=colour, label=NAMES[method].replace("`", ""), drawstyle="steps-post")
        for method, style in (("full", "--"), ("heads", ":")):
            level = found.get((data, method, "score before", "test")) or found.get(
                (data, method, "score at depth", "0")
            )
            if level:
                axes.axhline(fmean(level.values()), color="grey", linestyle=style, label=NAMES[method])
        if not axes.has_data():
            continue
        axes.set(xlabel="people forgotten", ylabel=f"test {unit}", title=f"{data}, while every seed serves")
        axes.legend(fontsize=7)
        made.append(out / f"unlearning_{data}.png")
        figure.savefig(made[-1], dpi=150)
    return made
