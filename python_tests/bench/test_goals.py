"""Goals hold the figures that the rows give, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import goals
from bench.cases import BYTES, CPU_DEFAULT, GPU_DEFAULT, SETS
from bench.providers import OURS, PROVIDERS
from bench.rows import Measured

EXACT, FAST = goals.OURS["cpu"]


def figures(m: Measured, ours: str = FAST) -> dict[str, str]:
    return {goal.text: goal.verdict()[0] for goal in goals.goals(m, ours)}


def test_the_strongest_baseline_is_the_fastest() -> None:
    m = Measured("made up")
    for case in SETS["cpu"]:
        m.times |= {(case.name, "naive"): 50.0, (case.name, "cat"): 400.0, (case.name, FAST): 100.0}
        m.times[case.name, "bare"] = 1.0  # no rival: it has no adapters
    m.times[CPU_DEFAULT.name, "onednn"] = 25.0
    found = figures(m)
    assert found["strongest baseline over ours, worst, 1t"] == "0.25"
    assert found["strongest baseline over ours, worst, all"] == "0.50"
    count = sum(c.timer == "1t" for c in SETS["cpu"])
    mean = (0.25 * 0.5 ** (count - 1)) ** (1 / count)
    assert found["strongest baseline over ours, geometric mean, 1t"] == f"{mean:.2f}"


def test_a_share_is_of_the_measured_peak() -> None:
    """Each case at 0.8 of 1e12 operations a second (bf16: twice), or of 1e10 bytes; all threads have twice that."""
    m = Measured("made up")
    for timer, times in (("1t", 1), ("all", 2)):
        m.ceilings |= {(timer, "product_fp32"): 400.0 * times, (timer, "loop_fp32"): 1000.0 * times}
        m.ceilings |= {(timer, "product_bf16"): 900.0 * times, (timer, "loop_bf16"): 2000.0 * times}
        m.ceilings |= {(timer, "copy"): 10.0 * times, (timer, "read"): 5.0 * times}
    for c in SETS["cpu"]:
        operations = 2 * c.T * (c.K * c.O + c.R * (c.K + c.O))
        moved = BYTES[c.dtype] * (c.T * (c.K + c.O) + c.K * c.O + c.R * (c.K + c.O))
        peak = 0.8 * (2 if c.timer == "all" else 1)
        m.times[c.name, FAST] = 1e6 * (
            moved / (peak * 1e10) if c.T == 1 else operations / (peak * {"fp32": 1e12, "bf16": 2e12}[c.dtype])
        )
    shares = {text: figure for text, figure in figures(m).items() if text.startswith("share")}
    assert set(shares.values()) == {"0.80"}
    assert len(shares) == 8


def test_who_is_ahead_of_us_is_listed() -> None:
    """Cases of each timer in which the exact mode is below 0.95 of the strongest, the worst first; fast beside it."""
    m = Measured("made up")
    one, two, three, four = (replace(CPU_DEFAULT, T=T).name for T in (16, 64, 512, 2048))
    half = replace(CPU_DEFAULT, dtype="bf16").name
    every = replace(CPU_DEFAULT, timer="all").name
    m.times |= {(name, "bare"): 1.0 for name in (one, two, three, four, half, every)}
    m.times |= {(one, "naive"): 90.0, (one, "onednn"): 80.0, (one, EXACT): 100.0, (one, FAST): 10.0}
    m.times |= {(two, "cat"): 50.0, (two, EXACT): 40.0, (two, FAST): 100.0}  # behind in fast alone
    m.times |= {(three, "cat"): 95.0, (three, EXACT): 100.0, (three, FAST): 100.0}
    m.times |= {(four, "cat"): 94.0, (four, EXACT): 100.0, (four, FAST): 99.0}
    m.times |= {(half, "cat"): 25.0, (half, EXACT): 50.0}
    m.times |= {(every, "padded"): 100.0, (every, EXACT): 50.0, (every, FAST): 50.0}
    m.tokens |= {("encoder", "peft"): 200.0, ("encoder", "ours"): 500.0}
    said = goals.summary(m).splitlines()
    at = said.index("time of the strongest baseline over ours, geometric means:")
    assert said[at + 1 : at + 18] == [
        f"| timer | type | cases | {EXACT} | {FAST} |",
        "|---|---|---|---|---|",
        f"| 1t | fp32 | 4 | {(0.8 * 1.25 * 0.95 * 0.94) ** 0.25:.2f} | {(8 * 0.5 * 0.95 * 94 / 99) ** 0.25:.2f} |",
        "| 1t | bf16 | 1 | 0.50 | - |",
        "| all | fp32 | 1 | 2.00 | 2.00 |",
        "",
        f"1t: {EXACT} is below 0.95 of the strongest in 3 of 5 cases, the worst 0.50 ({half})",
        f"1t: {FAST} is below 0.95 of the strongest in 2 of 4 cases, the worst 0.50 ({two})",
        f"in 2 of those of {EXACT} {FAST} is better (bold), in 1 at 0.95 or more",
        f"| case | strongest | us | {EXACT} | {FAST} |",
        "|---|---|---|---|---|",
        f"| {half} | cat | 25 | 0.50 | - |",
        f"| {one} | onednn | 80 | 0.80 | **8.00** |",
        f"| {four} | cat | 94 | 0.94 | **0.95** |",
        "",
        f"all: {EXACT} is below 0.95 of the strongest in 0 of 1 cases",
        f"all: {FAST} is below 0.95 of the strongest in 0 of 1 cases",
    ]
    assert "| encoder | 200 (1.00) | 500 (2.50) |" in said
    assert said[-1].startswith("measured over predicted")


def test_both_of_ours_have_a_column() -> None:
    m = fake(False, 0.01)
    m.times = {key: 200.0 if key[1] == EXACT else t for key, t in m.times.items()}
    said = goals.summary(m)
    (line,) = (line for line in said.splitlines() if line.startswith("strongest baseline over ours, worst, all"))
    assert line.split("0.95", 2)[2].split()[:5] == ["0.50", "NOT", "met", "100.00", "ambitious"]
    assert "100.00" not in goals.summary(m, EXACT)
    assert FAST not in goals.summary(m, EXACT)


def fake(gpu: bool, ratio: float) -> Measured:
    """A device on which every provider takes 100 us, and ours ``ratio`` times as long."""
    m = Measured("made up")
    for case in SETS["cuda" if gpu else "cpu"]:
        m.times |= {(case.name, name): 100.0 * (ratio if name in OURS else 1.0) for name in PROVIDERS}
        m.ceilings |= {(case.timer, name): 1e3 for name in ("copy", "product_fp32", "product_bf16")}
    return m


@pytest.mark.parametrize("gpu", [False, True])
def test_goals_are_met_missed_or_not_measured(gpu) -> None:
    ours = goals.OURS["cuda" if gpu else "cpu"][1]
    none = Measured("nothing")
    none.times[(GPU_DEFAULT if gpu else CPU_DEFAULT).name, "nobody"] = 1.0
    assert {goal.verdict()[1] for goal in goals.goals(none, ours)} == {"not measured"}
    fast = {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 0.01), ours)}
    slow = {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 100.0), ours)}
    relative = [text for text in fast if "over fast" not in text and "over G = 1" not in text]
    assert {fast[text][1] for text in relative if "share" not in text} == {"ambitious met"}
    assert {slow[text][1] for text in relative} == {"NOT met"}
    text = "forward, T = 512, R = 64" if gpu else "over F.linear, same, 4096^2, all"
    middle = {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 1.2 if gpu else 0.8), ours)}
    assert middle[text][1] == "must met"
    partial = fake(gpu, 0.01)
    for case in SETS["cuda" if gpu else "cpu"]:
        if case.T >= 2048:
            partial.times = {key: t for key, t in partial.times.items() if key[0] != case.name}
    assert any("/" in goal.verdict()[1] for goal in goals.goals(partial, ours)) or gpu
    assert "made up" in goals.summary(partial)
