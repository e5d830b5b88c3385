"""The cases that are promised, and the roofline against the printed numbers of the design."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace

import pytest

from bench import ROOT, run
from bench.cases import COMPILED, CPU_DEFAULT, GPU_DEFAULT, SETS, STEPS, TIMERS, Case, parse
from bench.roofline import H100, KINDS, Machine, floor, predict


def test_names_round_trip() -> None:
    for cases in SETS.values():
        assert len({c.name for c in cases}) == len(cases)
        for case in cases:
            assert parse(case.name) == case
    for bad in ("", "bare", CPU_DEFAULT.name + "-", CPU_DEFAULT.name.replace("live", "dead")):
        with pytest.raises(ValueError, match="case: expected a name such as"):
            parse(bad)


def test_the_stars_have_their_axes() -> None:
    gpu, cpu = SETS["cuda"], SETS["cpu"]
    assert 100 <= len(gpu) <= 130
    assert 60 <= len(cpu) <= 76
    for shape in ((4096, 4096), (4096, 14336), (14336, 4096)):
        rows = {c.T for c in gpu if shape == (c.K, c.O) and replace(c, T=2048, K=4096, O=4096) == GPU_DEFAULT}
        assert {2**n for n in range(14)} == rows
    assert {1, 4, 8, 16} <= {c.N for c in gpu if c.G == 1}
    for cases in (gpu, cpu):
        assert {1, 2, 8} == {c.live for c in cases}
        assert {(g, p) for g in (5, 20, 75) for p in (1, 4)} <= {(c.G, c.P) for c in cases if c.step == "fwd"}
        assert {"fwd", "fwdbwd"} <= {c.step for c in cases} <= set(STEPS)
    assert {c.timer for c in gpu} == set(TIMERS["cuda"])
    assert {c.timer for c in cpu} == set(TIMERS["cpu"])
    for dtype in ("fp32", "bf16"):
        mine = [c for c in cpu if c.dtype == dtype]
        assert {c.T for c in mine} == {1, 16, 64, 512, 2048}
        assert {(c.K, c.O) for c in mine} == {(384, 384), (768, 768), (768, 3072), (4096, 4096)}
        assert {1, 2, 4, 8, 16, 32} <= {c.N for c in mine if c.G == 1}
        for timer in TIMERS["cpu"]:  # what the goals speak of
            alike = {c for c in mine if c.timer == timer and c.step == "fwd"}
            assert {(20, 1), (20, 4), (1, 1), (1, 4)} <= {(c.G, c.P) for c in alike}
            assert {1, 64} <= {c.T for c in alike if c.K == 4096}
    assert sum(c in COMPILED for c in gpu) == 4
    assert {*COMPILED} <= {*gpu, *cpu}


def test_groups_are_uneven_and_slots_die_in_between() -> None:
    case = Case(T=64, K=8, O=8, G=75, P=4, live=2)
    sizes = [hi - lo for lo, hi in zip(case.edges, case.edges[1:])]
    assert case.edges[0] == 0
    assert case.edges[-1] == 64
    assert len(sizes) == 75
    assert {0, 1} < set(sizes)
    assert case.busy == sum(s > 0 for s in sizes)
    assert case.table[1] == [4, -1, 6, -1]
    assert (case.N, case.slots, case.R) == (300, 2, 32)
    assert Case(T=64, K=8, O=8, P=8, live=8).table == [[0, *[-1] * 7]]


@pytest.mark.parametrize(
    ("outputs", "floors"), [(4096, (1.008, 1.031, 1.063, 1.125)), (14336, (1.005, 1.020, 1.040, 1.080))]
)
def test_floors(outputs, floors) -> None:
    for rank, printed in zip((16, 64, 128, 256), floors):
        case = replace(GPU_DEFAULT, P=1, r=rank, O=outputs)
        assert abs(floor(case) - printed) < 1e-3
        assert abs(floor(replace(case, step="bwd")) - 1 - 2 * (printed - 1)) < 2e-3


def test_the_model_gives_the_designs_table() -> None:
    printed = {
        16: (3.5, 4.0, 1.49, 1.18, 1.03),
        512: (4.0, 6.2, 1.45, 1.17, 1.03),
        2048: (3.1, 5.3, 1.26, 1.10, 1.03),
        8192: (2.9, 5.1, 1.21, 1.09, 1.03),
    }
    for rows, ratios in printed.items():
        case = replace(GPU_DEFAULT, T=rows)
        for kind, ratio in zip(("naive", "peft", "three", "two", "limit"), ratios):
            assert predict(case, kind, H100) / predict(case, "bare", H100) == pytest.approx(ratio, rel=0.015)
    case = replace(GPU_DEFAULT, T=8192, step="bwd")
    for kind, ratio in zip(("naive", "three", "two", "limit"), (3.4, 1.36, 1.23, 1.06)):
        assert predict(case, kind, H100) / predict(case, "bare", H100) == pytest.approx(ratio, rel=0.015)


def test_no_way_is_below_the_limit() -> None:
    ample = Machine("no launch cost", 3e12, H100.rate, 0.0)
    for case in SETS["cuda"]:
        limit = predict(case, "limit", ample)
        assert predict(case, "bare", ample) <= limit
        for kind in KINDS[2:]:
            assert not predict(case, kind, ample) < limit * 0.999  # NaN where a kind has no backward


def test_the_committed_prediction_is_what_the_model_says() -> None:
    with redirect_stdout(io.StringIO()) as printed:
        assert run.main(["--predict"]) == 0
    path = ROOT / "bench" / "results" / "roofline_h100.csv"
    assert printed.getvalue() == path.read_text(), "make it again: python -m bench.run --predict > " + str(path)
    assert printed.getvalue().startswith("# prediction, not measurement")
