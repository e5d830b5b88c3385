"""The goals of the project beside what the rows say: met, not met, or not measured."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bench.cases import CPU_DEFAULT, GPU_DEFAULT, ROUTING, SETS, Case, parse, vary
from bench.providers import BASELINES
from bench.roofline import backward, forward

RIVALS = tuple(name for name in BASELINES if name != "bare")
NAN = float("nan")


@dataclass
class Measured:
    """The newest rows of one device: medians in us by (case, provider), ceilings by (timer, name)."""

    device: str
    times: dict[tuple[str, str], float] = field(default_factory=dict)
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)
    predicted: dict[tuple[str, str], float] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    effects: dict[str, float] = field(default_factory=dict)  # us from a table's rewriting to the next answer, by timer

    @property
    def gpu(self) -> bool:
        return any(parse(case).timer in ("graph", "eager") for case, _ in self.times)

    def time(self, case: Case, provider: str) -> float:
        return self.times.get((case.name, provider), NAN)


def read(path: Path) -> Measured:
    """Read a file of rows; of several rows of one case and provider the last stands."""
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = Measured(path.stem)
    for row in rows:
        if row["metric"] == "ceiling":
            found.ceilings[row["timer"], row["provider"]] = float(row["p50"])
            continue
        if row["metric"] == "effect":
            found.effects[row["timer"]] = float(row["p50"])
            continue
        key = row["case"], row["provider"]
        found.times[key] = float(row["p50"])
        found.predicted[key] = float(row["predicted"] or "nan")
        found.commits.add(row["commit"][:10] + ("+" if row["dirty"] not in ("0", "False") else ""))
    return found


class Goal(NamedTuple):
    """Values (figure, where) of the cases that a goal speaks of, NaN where not measured, and what they are held to.

    ``over``: how many values become one: ``max`` and ``min`` are the worst of them, else the geometric mean.
    """

    text: str
    must: float
    ambitious: float
    over: Callable[[list[float]], float]
    values: list[tuple[float, str]]

    def verdict(self) -> tuple[str, str, str]:
        """Give (figure, verdict, where the figure is from)."""
        known = [(value, where) for value, where in self.values if not math.isnan(value)]
        if not known:
            return "-", "not measured", ""
        figure = self.over([value for value, _ in known])
        better = (lambda limit: figure <= limit) if self.over is max else (lambda limit: figure >= limit)
        verdict = "ambitious met" if better(self.ambitious) else "must met" if better(self.must) else "NOT met"
        where = next((w for value, w in known if value == figure), f"{len(known)} cases")
        if len(known) < len(self.values):
            verdict += f" ({len(known)} of {len(self.values)} measured)"
        return f"{figure:.2f}", verdict, where


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def goals(m: Measured, ours: str = "") -> list[Goal]:
    """Hold one device's rows against its goals; ``ours`` names the provider that speaks for us."""
    return list(_gpu(m, ours or "auto-fast") if m.gpu else _cpu(m, ours or "auto-fast-packed"))


def _gpu(m: Measured, ours: str) -> Iterator[Goal]:
    d = GPU_DEFAULT

    def ratio(cases: Iterable[Case], over: str = "bare", by: str = ours) -> list[tuple[float, str]]:
        return [(m.time(c, by) / m.time(c, over), c.name) for c in cases]

    yield Goal("forward, T <= 64, R = 64", 1.20, 1.08, max, ratio(vary(d, T=(1, 2, 4, 8, 16, 32, 64))))
    yield Goal("forward, T = 512, R = 64", 1.25, 1.12, max, ratio(vary(d, T=(512,))))
    yield Goal("forward, T >= 2048, R = 64", 1.20, 1.10, max, ratio(vary(d, T=(2048, 4096, 8192))))
    yield Goal("forward, T >= 2048, R = 128", 1.25, 1.13, max, ratio(vary(d, P=(8,), T=(2048, 8192))))
    yield Goal("routing, r = 16, P = 1", 1.15, 1.06, max, ratio(vary(d, G_P=ROUTING[:3], T=(64, 2048))))
    yield Goal("routing, r = 16, P = 4", 1.20, 1.10, max, ratio(vary(d, G_P=ROUTING[3:], T=(64, 2048))))
    yield Goal("backward, T >= 2048, R = 64", 1.40, 1.22, max, ratio(vary(d, step=("bwd",), T=(2048, 8192))))
    for rival, limits in (
        ("peft-bf16", ((1.2, 1.3), (2.1, 2.5), (3.3, 4.0))),
        ("peft", ((1.7, 2.0), (3.7, 4.2), (6.0, 7.0))),
    ):
        for N, (must, ambitious) in zip((1, 4, 8), limits):
            cases = vary(d, P=(N,), T=(8192,))
            yield Goal(f"{rival} over ours, N = {N}, T = 8192", must, ambitious, min, ratio(cases, ours, rival))
    for timer, must, ambitious in (("graph", 4.0, 5.0), ("eager", 6.0, 10.0)):
        cases = [
            c
            for c in SETS["cuda"]
            if c.timer == timer and c.T <= 64 and replace(c, T=1) == replace(d, T=1, P=8, timer=timer)
        ]
        yield Goal(f"decode, naive over ours, N = 8, {timer}", must, ambitious, min, ratio(cases, ours, "naive"))
    graphed = [c for c in SETS["cuda"] if c.timer == "graph" and c.step == "fwd"]
    yield Goal("exact over fast", 1.35, 1.10, max, ratio(graphed, "auto-fast", "auto-exact"))


def _cpu(m: Measured, ours: str) -> Iterator[Goal]:
    cases = SETS["cpu"]
    forwards = [c for c in cases if c.step == "fwd"]

    def ratio(cases: Iterable[Case], over: str = "bare", by: str = ours) -> list[tuple[float, str]]:
        return [(m.time(c, by) / m.time(c, over), c.name) for c in cases]

    def share(c: Case, moved: bool) -> tuple[float, str]:
        """Give the share of the measured peak: of bytes a second, or of operations a second."""
        kernels = [
            k for run, on in ((forward, c.step != "bwd"), (backward, c.step != "fwd")) if on for k in run(c, "limit")
        ]
        names = ("copy", "read") if moved else (f"product_{c.dtype}", *(("fma_fp32",) if c.dtype == "fp32" else ()))
        peak = max(m.ceilings.get((c.timer, name), NAN) for name in names)
        done = sum(k.bytes if moved else k.ops for k in kernels)
        return done / (m.time(c, ours) * 1e-6) / (peak * 1e9), c.name

    for dtype in ("fp32", "bf16"):
        dense = [c for c in forwards if c.dtype == dtype and c.G == 1 and c.live == 1]
        yield Goal(
            f"share of peak Gop/s, T >= 64, {dtype}", 0.75, 0.9, min, [share(c, False) for c in dense if c.T >= 64]
        )
        wide = [c for c in dense if c.T == 1 and c.K == 4096]  # smaller weights stay in the caches
        yield Goal(f"share of GB/s, T = 1, 4096^2, {dtype}", 0.75, 0.9, min, [share(c, True) for c in wide])
    best = [
        (
            min((t for t in (m.time(c, name) for name in RIVALS) if not math.isnan(t)), default=NAN) / m.time(c, ours),
            c.name,
        )
        for c in cases
    ]
    yield Goal("strongest baseline over ours, worst", 0.95, 0.95, min, best)
    yield Goal("strongest baseline over ours, geometric mean", 1.0, 1.2, geometric_mean, best)
    many = [c for c in forwards if c.dtype == "fp32" and c.R == 128 and c.T >= 64 and c.G == 1]
    yield Goal("over F.linear, fp32, R = 128, T >= 64", 0.85, 0.6, max, ratio(many))
    for dtype, must, ambitious in (("fp32", 1.5, 2.5), ("bf16", 1.4, 2.0)):
        over_t = [c for c in forwards if replace(c, T=64, timer="1t") == replace(CPU_DEFAULT, dtype=dtype)]
        yield Goal(
            f"naive over ours, N = 8, {dtype}, mean over T",
            must,
            ambitious,
            geometric_mean,
            ratio(over_t, ours, "naive"),
        )
    for P in (1, 4):
        routed = [c for c in forwards if c.G == 20 and c.P == P and c.timer == "1t"]
        alike = [(m.time(c, ours) / m.time(replace(c, G=1), ours), c.name) for c in routed]
        yield Goal(f"G = 20 over G = 1, P = {P} (must: below N r's cost)", 1.5, 1.1, max, alike)


def summary(m: Measured, ours: str = "") -> str:
    """Print the goals of one device, and how well the roofline foretold its times."""
    lines = [f"{m.device}  commits {', '.join(sorted(m.commits)) or '-'}  (+: changed files)", ""]
    lines.append(f"{'goal':56} {'must':>5} {'amb.':>5} {'figure':>7}  verdict")
    for goal in goals(m, ours):
        figure, verdict, where = goal.verdict()
        lines.append(
            f"{goal.text:56} {goal.must:5.2f} {goal.ambitious:5.2f} {figure:>7}  {verdict:36} {where}".rstrip()
        )
    told = ", ".join(f"{us:.0f} us ({timer})" for timer, us in m.effects.items()) or "not measured"
    lines.append(
        f"a deletion takes effect in the next launch (tested); table rewritten and the next answer there: {told}"
    )
    lines += ["", "measured over predicted time, by provider (10th percentile, median, 90th):"]
    ratios: dict[str, list[float]] = {}
    for key, expected in m.predicted.items():
        if not math.isnan(expected):
            ratios.setdefault(key[1], []).append(m.times[key] / expected)
    for name, found in ratios.items():
        low, middle, high = (sorted(found)[round(q * (len(found) - 1))] for q in (0.1, 0.5, 0.9))
        lines.append(f"  {name:20} {low:6.2f} {middle:6.2f} {high:6.2f}   {len(found)} cases")
    return "\n".join(lines)
