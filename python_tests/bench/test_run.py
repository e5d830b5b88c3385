"""The runner: wrong results are not timed, rows append and parse, goals say what was not measured."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import ROOT, machine, measure, providers, run, timing
from bench.cases import COMPILED, CPU_DEFAULT, SETS, Case
from bench.measure import Log
from bench.providers import PROVIDERS, Provider
from bench.roofline import H100
from bench.rows import COLUMNS, append, read
from bench.truth import make, plain

CASE = Case(T=9, K=20, O=24, r=2, G=3, P=2, live=2, timer="all")


def names(case: Case, only: list[str], log: Log, seconds: float = 0.01) -> list[str]:
    rows = measure.measure(case, "cpu", [PROVIDERS[n] for n in only], H100, seconds, log)
    return [str(row["provider"]) for row in rows]


def spoilt(by) -> Provider:
    """Three calls, with something wrong in the result."""

    def build(i):
        built = PROVIDERS["three_calls"].build(i)
        return built._replace(forward=lambda: by(built.forward()))

    return Provider("spoilt", "three", build)


def poke(y, value):
    y = y.clone()
    y[-1, -1] = value
    return y


@pytest.mark.parametrize(
    "by",
    [
        lambda y: y * 1.001,
        lambda y: poke(y, torch.nan),
        lambda y: poke(y, 1e4),
        lambda y: y[:-1],
        lambda y: torch.zeros_like(y),
        lambda y: 1 / 0,
    ],
    ids=["a thousandth", "one NaN", "one element", "a row short", "zeros", "an exception"],
)
def test_a_wrong_provider_is_not_timed(by, monkeypatch, tmp_path, capsys) -> None:
    provider = spoilt(by)
    log = Log()
    assert measure.measure(CASE, "cpu", [provider], H100, 0.01, log) == []
    assert len(log.failures) == 1
    assert "spoilt on " + CASE.name in log.failures[0]
    monkeypatch.setitem(PROVIDERS, "spoilt", provider)
    quick(monkeypatch)
    arguments = ["--device", "cpu", "--set", "tiny", "--only", "G3", "--case-seconds", "0.01", "--out", str(tmp_path)]
    assert run.main([*arguments, "--providers", "bare", "spoilt"]) == 1
    assert {row["provider"] for row in rows(tmp_path) if row["metric"] == "time"} == {"bare"}
    assert "NOT TIMED: spoilt" in capsys.readouterr().out


def test_the_truth_is_of_fp64() -> None:
    """Right by the rule, further than that from plain torch's own rounding: only a truth of fp64 lets it pass."""
    case = replace(CPU_DEFAULT, G=20, P=4, dtype="bf16")
    i = make(case, "cpu")
    same, truth = plain(i, torch.bfloat16)["y"].double(), plain(i, torch.float64)["y"]
    log = Log()
    with torch.no_grad():
        assert list(measure.ready(case, "cpu", [spoilt(lambda _: truth - 1.9 * (same - truth))], log))
        assert not list(measure.ready(case, "cpu", [spoilt(lambda _: truth - 9 * (same - truth))], log))
    assert len(log.failures) == 1


def test_each_case_compiles_afresh(monkeypatch) -> None:
    """What was compiled for other cases goes: a call would walk its guards, and nine of one code are an error."""
    import torch._dynamo

    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for T, expected in ((1, 1), (16, 1), (512, 2)):
        assert (replace(CPU_DEFAULT, T=T) in COMPILED) == (T != 16)
        assert not list(measure.ready(replace(CPU_DEFAULT, T=T), "cpu", [], Log()))
        assert len(resets) == expected


def quick(monkeypatch) -> None:
    """Replace the calibration, which takes seconds."""
    ceilings = {
        "copy": 1e10,
        "read": 1e10,
        "product_fp32": 1e11,
        "product_bf16": 1e11,
        "loop_fp32": 1e11,
        "launch": 1e-6,
    }
    monkeypatch.setattr(timing, "calibrate_cpu", lambda threads: dict(ceilings))


def rows(folder) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_rows_are_appended_and_the_last_stands(monkeypatch, tmp_path) -> None:
    quick(monkeypatch)
    arguments = ["--device", "cpu", "--set", "tiny", "--case-seconds", "0.01", "--out", str(tmp_path)]
    assert run.main([*arguments, "--providers", "bare", "auto-exact"]) == 0
    first = rows(tmp_path)
    assert run.main([*arguments, "--providers", "bare", "auto-exact"]) == 0
    both = rows(tmp_path)
    assert both[: len(first)] == first
    assert len(both) == 2 * len(first)
    assert list(first[0]) == list(COLUMNS)
    for row in both:
        assert row["device"]
        assert row["utc"]
        assert row["command"].startswith("python -m bench.run")
        assert float(row["p50"]) > 0
        if row["metric"] == "time":
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
            assert int(row["repeats"]) >= timing.ROUNDS
            assert float(row["predicted"]) > 0
    (path,) = tmp_path.glob("*.csv")
    last = [row for row in both if row["metric"] == "time"][-1]
    assert read(path).times[last["case"], last["provider"]] == float(last["p50"])
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="move the file away"):
        append(path, first)


def test_a_first_look_writes_only_where_it_is_told(monkeypatch, tmp_path, capsys) -> None:
    """Its rows would be the newest of a file that the tree holds."""
    quick(monkeypatch)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    arguments = ["--device", "cpu", "--set", "tiny", "--case-seconds", "0.01", "--providers", "bare"]
    assert run.main([*arguments, "--quick"]) == 0
    assert run.NO_ROWS in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run.main([*arguments, "--quick", "--out", str(tmp_path / "asked")]) == 0
    assert rows(tmp_path / "asked")
    assert run.main(arguments) == 0
    assert rows(tmp_path / "results")


def test_a_run_begins_and_ends_where_it_is_told(monkeypatch, tmp_path, capsys) -> None:
    quick(monkeypatch)
    first, second = SETS["tiny"]
    arguments = ["--device", "cpu", "--set", "tiny", "--case-seconds", "0.01", "--providers", "bare"]
    assert run.main([*arguments, "--start", second.name, "--out", str(tmp_path / "start")]) == 0
    assert {row["case"] for row in rows(tmp_path / "start") if row["metric"] == "time"} == {second.name}
    assert run.main([*arguments, "--seconds", "0", "--out", str(tmp_path / "end")]) == 0
    assert not [row for row in rows(tmp_path / "end") if row["metric"] == "time"]
    assert f"out of time: 2 of 2 cases not measured, from {first.name}" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "bench.run", "--predict"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # long before torch is imported
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_first_look_in_a_process_of_its_own(tmp_path) -> None:
    command = [sys.executable, "-m", "bench.run", "--device", "cpu", "--set", "tiny", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checked 2 cases" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_broken_package_leaves_the_baselines(monkeypatch) -> None:
    monkeypatch.setattr(providers, "BROKEN", "ImportError: no such kernel")
    log = Log()
    assert names(CASE, ["bare", "auto-exact", "naive"], log) == ["bare", "naive"]
    monkeypatch.setattr(run, "BROKEN", "ImportError: no such kernel")
    assert run.main(["--device", "cpu", "--set", "tiny", "--check", "--providers", "naive"]) == 1


def test_wrong_arguments(capsys) -> None:
    for arguments, message in (
        (["--providers", "nothing"], "expected ours, baselines or some of"),
        (["--device", "cpu", "--only", "nothing"], "no case of the set"),
        (["--device", "cpu", "--start", "nothing"], "--start: expected a case of the set 'cpu' on cpu, got 'nothing'"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_rows_command_names_no_folder_of_the_machine(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", "/somebody/s/folder/", "--only", "0"])
    assert machine.describe("cpu")["command"] == "python -m bench.run --out folder --only 0"
