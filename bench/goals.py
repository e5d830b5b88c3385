"""The goals of the project beside what the rows say: met, not met, or not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from bench.cases import CPU_DEFAULT, GPU_DEFAULT, ROUTING, SETS, TIMERS, Case, parse, vary
from bench.providers import BASELINES
from bench.roofline import forward
from bench.rows import NAN, Measured

# Who speaks for us: on a CPU the packed layer, as a model is served there.
OURS = {"cpu": ("auto-exact-packed", "auto-fast-packed"), "cuda": ("auto-exact", "auto-fast")}
RIVALS = tuple(name for name in BASELINES if name != "bare")
LEAST = 0.95  # of the strongest baseline


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
            verdict += f" ({len(known)}/{len(self.values)})"
        return f"{figure:.2f}", verdict, where


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def speakers(m: Measured, ours: str = "") -> tuple[str, ...]:
    """Name the providers that speak for us on a device, or the one that is asked for."""
    return (ours,) if ours else OURS["cuda" if m.gpu else "cpu"]


def goals(m: Measured, ours: str) -> list[Goal]:
    """Hold one device's rows against its goals; ``ours`` names the provider that speaks for us."""
    return list(_gpu(m, ours) if m.gpu else _cpu(m, ours))


def rivals(m: Measured, case: str) -> tuple[float, str]:
    """Give the time in us and the name of the strongest baseline of a case."""
    known = [(m.times[case, name], name) for name in RIVALS if (case, name) in m.times]
    return min(known, default=(NAN, ""))


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
    for timer in TIMERS["cpu"]:
        yield from (goal._replace(text=f"{goal.text}, {timer}") for goal in _of_threads(m, ours, timer))


def _share(m: Measured, case: Case, ours: str, moved: bool) -> tuple[float, str]:
    """Give the share of the peak measured in the same run: of bytes a second, or of operations a second."""
    kernels = list(forward(case, "limit"))
    names = ("copy", "read") if moved else (f"product_{case.dtype}", f"loop_{case.dtype}")
    peak = max((m.ceilings[case.timer, name] for name in names if (case.timer, name) in m.ceilings), default=NAN)
    done = sum(k.bytes if moved else k.ops for k in kernels)
    return done / (m.time(case, ours) * 1e-6) / (peak * 1e9), case.name


def _of_threads(m: Measured, ours: str, timer: str) -> Iterator[Goal]:
    cases = [c for c in SETS["cpu"] if c.timer == timer]
    forwards = [c for c in cases if c.step == "fwd"]
    dense = [c for c in forwards if c.G == 1 and c.live == 1]

    def ratio(cases: Iterable[Case], over: str = "bare", by: str = ours) -> list[tuple[float, str]]:
        return [(m.time(c, by) / m.time(c, over), c.name) for c in cases]

    for dtype in ("fp32", "bf16"):
        many = [_share(m, c, ours, False) for c in dense if c.dtype == dtype and c.T >= 64]
        yield Goal(f"share of peak Gop/s, T >= 64, {dtype}", 0.75, 0.9, min, many)
        # Smaller weights stay in the caches.
        one = [_share(m, c, ours, True) for c in dense if c.dtype == dtype and c.T == 1 and c.K == 4096]
        yield Goal(f"share of peak GB/s, T = 1, 4096^2, {dtype}", 0.75, 0.9, min, one)
    best = [(rivals(m, c.name)[0] / m.time(c, ours), c.name) for c in cases]
    yield Goal("strongest baseline over ours, worst", 0.95, 0.95, min, best)
    yield Goal("strongest baseline over ours, geometric mean", 1.0, 1.2, geometric_mean, best)
    full = [c for c in dense if c.dtype == "fp32" and c.R == 128 and c.T >= 64]
    yield Goal("over F.linear, fp32, R = 128, T >= 64", 0.85, 0.85, max, ratio(full))
    yield Goal("over F.linear, same, 4096^2", 0.85, 0.6, max, ratio(c for c in full if c.K == 4096))
    for dtype, must, ambitious in (("fp32", 1.5, 2.5), ("bf16", 1.4, 2.0)):
        over_t = [c for c in forwards if replace(c, T=64, timer="1t") == replace(CPU_DEFAULT, dtype=dtype)]
        mean = ratio(over_t, ours, "naive")
        yield Goal(f"naive over ours, N = 8, {dtype}, mean over T", must, ambitious, geometric_mean, mean)
    single = [replace(CPU_DEFAULT, T=1, dtype="bf16", timer=timer)]
    yield Goal("naive over ours, N = 8, bf16, T = 1", 1.4, 6.0, min, ratio(single, ours, "naive"))
    for P in (1, 4):
        routed = [c for c in forwards if c.G == 20 and c.P == P]
        alike = [(m.time(c, ours) / m.time(replace(c, G=1), ours), c.name) for c in routed]
        yield Goal(f"G = 20 over G = 1, P = {P} (must: below N r's cost)", 1.5, 1.1, max, alike)


def summary(m: Measured, ours: str = "") -> str:
    """Print the goals of one device, who is ahead of us and where, tokens, and how well the roofline foretold."""
    names = speakers(m, ours)
    commits = ", ".join(f"{commit} ({part})" for part, commit in m.commits.items()) or "-"
    older = f"; {m.older} rows of other commits left out" if m.older else ""
    lines = [f"{m.device}  commits {commits}  (+: changed files){older}", ""]
    lines.append(f"{'goal':56} {'must':>5} {'amb.':>5}" + "".join(f"  {name:>27}" for name in names))
    for same in zip(*(goals(m, name) for name in names)):
        said = [goal.verdict() for goal in same]
        cells = "".join(f"  {figure:>6} {verdict:19}" for figure, verdict, _ in said)
        lines.append(f"{same[0].text:56} {same[0].must:5.2f} {same[0].ambitious:5.2f}{cells}  {said[-1][2]}".rstrip())
    told = ", ".join(f"{us:.0f} us ({timer})" for timer, us in m.effects.items()) or "not measured"
    lines.append(
        f"a deletion takes effect in the next launch (tested); table rewritten and the next answer there: {told}"
    )
    return "\n".join([*lines, *_against(m, names), *_tokens(m), *_foretold(m)])


def _against(m: Measured, names: tuple[str, ...]) -> list[str]:
    """Hold ours against the strongest baseline: geometric means by timer and type, then who is ahead of the first."""
    ratios: dict[str, tuple[float, ...]] = {}
    for case in dict.fromkeys(case for case, _ in m.times):
        mine = tuple(rivals(m, case)[0] / m.times.get((case, name), NAN) for name in names)
        if not all(math.isnan(value) for value in mine):
            ratios[case] = mine
    lines = ["", "time of the strongest baseline over ours, geometric means:", _cells("timer", "type", "cases", *names)]
    lines.append("|---" * (3 + len(names)) + "|")
    alike: dict[tuple[str, str], list[str]] = {}
    for case in ratios:
        alike.setdefault((parse(case).timer, parse(case).dtype), []).append(case)
    for (timer, dtype), cases in alike.items():
        known = [[r for r in column if not math.isnan(r)] for column in zip(*(ratios[case] for case in cases))]
        means = (f"{geometric_mean(column):.2f}" if column else "-" for column in known)
        lines.append(_cells(timer, dtype, str(len(cases)), *means))
    for timer in dict.fromkeys(timer for timer, _ in alike):
        lines += _behind(m, names, {case: mine for case, mine in ratios.items() if parse(case).timer == timer}, timer)
    return lines


def _behind(m: Measured, names: tuple[str, ...], ratios: dict[str, tuple[float, ...]], timer: str) -> list[str]:
    """List the cases of a timer in which the first of ours is below 0.95 of the strongest baseline, the worst first.

    What the other of ours does better there is in bold; its own cases below 0.95 are counted.
    """
    lines = [""]
    for at, name in enumerate(names):
        known = [(mine[at], case) for case, mine in ratios.items() if not math.isnan(mine[at])]
        behind = sorted(found for found in known if found[0] < LEAST)
        worst = f", the worst {behind[0][0]:.2f} ({behind[0][1]})" if behind else ""
        lines.append(f"{timer}: {name} is below {LEAST} of the strongest in {len(behind)} of {len(known)} cases{worst}")
    listed = sorted((mine, case) for case, mine in ratios.items() if mine[0] < LEAST)
    better = [mine for (first, *rest), _ in listed for mine in rest if _better(mine, first)]
    if listed and names[1:]:
        enough = sum(value >= LEAST for value in better)
        lines.append(
            f"in {len(better)} of those of {names[0]} {names[1]} is better (bold), in {enough} at {LEAST} or more"
        )
    if listed:
        lines += [_cells("case", "strongest", "us", *names), "|---" * (3 + len(names)) + "|"]
    for (first, *rest), case in listed:
        least, rival = rivals(m, case)
        bold = (
            f"**{value:.2f}**" if _better(value, first) else "-" if math.isnan(value) else f"{value:.2f}"
            for value in rest
        )
        lines.append(_cells(case, rival, f"{least:.0f}", f"{first:.2f}", *bold))
    return lines


def _better(one: float, other: float) -> bool:
    return round(one, 2) > round(other, 2)  # as they are printed


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _tokens(m: Measured) -> list[str]:
    """List the tokens a second of whole models, and in brackets over PEFT's."""
    names = list(dict.fromkeys(name for _, name in m.tokens))
    if not names:
        return ["", "whole models: not measured (python -m bench.end_to_end)"]
    lines = ["", "tokens a second (over PEFT's):", "| model | " + " | ".join(names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for case in dict.fromkeys(case for case, _ in m.tokens):
        peft = m.tokens.get((case, "peft"), NAN)
        found = [m.tokens.get((case, name)) for name in names]
        lines.append(f"| {case} | " + " | ".join(f"{t:.0f} ({t / peft:.2f})" if t else "-" for t in found) + " |")
    return lines


def _foretold(m: Measured) -> list[str]:
    lines = ["", "measured over predicted time, by provider (10th percentile, median, 90th):"]
    ratios: dict[str, list[float]] = {}
    for key, expected in m.predicted.items():
        if not math.isnan(expected):
            ratios.setdefault(key[1], []).append(m.times[key] / expected)
    for name, found in ratios.items():
        low, middle, high = (sorted(found)[round(q * (len(found) - 1))] for q in (0.1, 0.5, 0.9))
        lines.append(f"  {name:20} {low:6.2f} {middle:6.2f} {high:6.2f}   {len(found)} cases")
    return lines
