"""The runner: wrong results are not timed, rows append and parse, goals say what was not measured."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ROOT, goals, measure, providers, report, run, timing
from bench.cases import CPU_DEFAULT, GPU_DEFAULT, SETS, Case
from bench.measure import Log
from bench.providers import BASELINES, OURS, PROVIDERS, Provider
from bench.roofline import H100
from bench.truth import TYPES, make, plain, wrong
from s3t_ext.lora.kernels import IMPLS

CASE = Case(T=9, K=20, O=24, r=2, G=3, P=2, live=2, timer="all")


def names(case: Case, only: list[str], log: Log, seconds: float = 0.01) -> list[str]:
    rows = measure.measure(case, "cpu", [PROVIDERS[n] for n in only], H100, seconds, log)
    return [str(row["provider"]) for row in rows]


@pytest.mark.parametrize("step", ["fwd", "bwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_provider_is_right_or_declines(step, dtype, groups) -> None:
    case = replace(CASE, step=step, dtype=dtype, G=groups)
    log = Log()
    with torch.set_grad_enabled(step != "fwd"):
        found = [provider.name for provider, _ in measure.ready(case, "cpu", PROVIDERS.values(), log)]
    assert not log.failures
    assert {"bare", "auto-exact", "auto-fast", "native-fused", "native-split", "naive", "addmm", "three_calls"} <= {
        *found
    }
    assert {*found} | {name for name, _ in log.declined} == {*PROVIDERS}
    assert ("cat" in found) == (groups == 1 and step == "fwd")  # PEFT concatenates for a whole batch, and not to train
    assert ("onednn" in found) == (step == "fwd")


def test_every_backend_is_a_provider() -> None:
    for backend in IMPLS["shrink"]:
        assert any(name.startswith(f"{backend}-") for name in OURS), backend
    assert {"auto-exact", "auto-fast", "auto-exact-packed", "auto-fast-packed"} <= {*OURS}
    assert {"peft", "peft-bf16", "naive", "cat", "three_calls", "addmm", "compile", "onednn", "bare"} == {*BASELINES}


def test_the_interpreter_is_never_timed(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    log = Log()
    triton = [name for name in PROVIDERS if name.startswith("triton-")]
    assert names(CASE, triton, log) == []
    assert not log.failures


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_left_out_is_seen(dtype) -> None:
    """At the sizes of the benchmark the rule must not be so wide that one slot of one group falls through."""
    case = replace(CPU_DEFAULT, G=20, P=4, dtype=dtype)
    i = make(case, "cpu")
    same, truth = plain(i, TYPES[dtype]), plain(i, torch.float64)
    assert wrong(same, same, truth, i) == ""
    less = make(case, "cpu")
    less.a[7 * case.P + 2] = 0
    assert "error" in wrong(plain(less, TYPES[dtype]), same, truth, i)
    one = make(case, "cpu")
    one.a[7 * case.P + 2, 3] = 0  # one of 16 ranks
    assert "error" in wrong(plain(one, TYPES[dtype]), same, truth, i)


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


@pytest.mark.parametrize(("norm", "one", "all_"), [("rms", 0.0, 1.5), ("maximum", 3.0, 0.1)])
def test_each_norm_is_held(norm, one, all_) -> None:
    """A small error everywhere is seen by the one, a large one at one place by the other."""
    i = make(CASE, "cpu")
    truth = plain(i, torch.float64)["y"]
    same = poke(truth, float(truth[-1, -1]) + 1.0)
    got = poke(truth + all_, float(truth[-1, -1]) + (one or all_))
    assert wrong({"y": got}, {"y": same}, {"y": truth}, i).startswith(f"y: {norm} error")


def quick(monkeypatch) -> None:
    """Replace the calibration, which takes seconds."""
    ceilings = {
        "copy": 1e10,
        "read": 1e10,
        "product_fp32": 1e11,
        "product_bf16": 1e11,
        "fma_fp32": 1e11,
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
    assert list(first[0]) == list(run.COLUMNS)
    for row in both:
        assert row["device"]
        assert row["utc"]
        assert row["command"].startswith("python -m bench.run")
        assert float(row["p50"]) > 0
        if row["metric"] == "time":
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
            assert int(row["repeats"]) >= 5
            assert float(row["predicted"]) > 0
    (path,) = tmp_path.glob("*.csv")
    last = [row for row in both if row["metric"] == "time"][-1]
    assert goals.read(path).times[last["case"], last["provider"]] == float(last["p50"])
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="move the file away"):
        run.append(path, first)


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
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    spreads = timing.take(calls, "all", 0.0)
    assert {s.repeats for s in spreads.values()} == {5}
    runs = "".join(n for at, n in enumerate(order) if at == 0 or order[at - 1] != n)
    assert len(runs) > 10  # never all samples of one after all of another
    assert {"ab", "ba", "ac", "ca", "bc", "cb"} == {runs[at : at + 2] for at in range(len(runs) - 1)}  # nor one order
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.0, 4.0, 6)


def test_a_time_is_that_of_one_call(monkeypatch) -> None:
    """As many calls as fill 0.2 ms make one sample, and it is divided by them."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = []

    def call() -> None:
        calls.append(1)
        now[0] += 2.0**-16  # 15 us, exactly

    (spread,) = timing.take({"one": call}, "1t", 0.0).values()
    assert spread == (2.0**-16, 2.0**-16, 2.0**-16, 5)
    assert len(calls) == 3 + 5 * 14


def test_a_flush_leaves_no_dirty_lines(monkeypatch) -> None:
    """Before every step the buffer is read, never written, outside the events."""
    order: list[str] = []

    class Event:
        def __init__(self, **_: bool) -> None:
            pass

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, _: object) -> float:
            return 3.0

    class Buffer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            order.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flush = torch.zeros(4).as_subclass(Buffer)
    order.clear()
    spreads = timing.take({"one": lambda: order.append("step")}, "graph", 0.0, flush)
    assert order == ["sum", "event", "step", "event"] * 5
    assert spreads["one"] == (3e-3, 3e-3, 3e-3, 4)  # the first round is left out


def fake(gpu: bool, ratio: float) -> goals.Measured:
    """A device on which every provider takes 100 us, and ours ``ratio`` times as long."""
    m = goals.Measured("made up")
    for case in SETS["cuda" if gpu else "cpu"]:
        m.times |= {(case.name, name): 100.0 * (ratio if name in OURS else 1.0) for name in PROVIDERS}
        m.ceilings |= {(case.timer, name): 1e3 for name in ("copy", "product_fp32", "product_bf16")}
    return m


@pytest.mark.parametrize("gpu", [False, True])
def test_goals_are_met_missed_or_not_measured(gpu) -> None:
    none = goals.Measured("nothing")
    none.times[(GPU_DEFAULT if gpu else CPU_DEFAULT).name, "nobody"] = 1.0
    assert {goal.verdict()[1] for goal in goals.goals(none)} == {"not measured"}
    fast = {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 0.01))}
    slow = {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 100.0))}
    relative = [text for text in fast if "over fast" not in text and "over G = 1" not in text]
    assert {fast[text][1] for text in relative if "share" not in text} == {"ambitious met"}
    assert {slow[text][1] for text in relative} == {"NOT met"}
    text = "forward, T = 512, R = 64" if gpu else "over F.linear, fp32, R = 128, T >= 64"
    assert {goal.text: goal.verdict() for goal in goals.goals(fake(gpu, 1.2 if gpu else 0.8))}[text][1] == "must met"
    partial = fake(gpu, 0.01)
    for case in SETS["cuda" if gpu else "cpu"]:
        if case.T >= 2048:
            partial.times = {key: t for key, t in partial.times.items() if key[0] != case.name}
    assert any("measured)" in goal.verdict()[1] for goal in goals.goals(partial)) or gpu
    assert "made up" in goals.summary(partial)


def test_the_suite_knows_its_sections(tmp_path) -> None:
    script = ROOT / "bench" / "gpu_suite.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path), "S3T_BENCH_BUDGET": "3", "PYTHON": sys.executable}
    wrong_name = subprocess.run(["bash", str(script), "nothing"], env=environment, capture_output=True, check=False)
    assert wrong_name.returncode == 2
    late = subprocess.run(
        ["bash", str(script), "calibrate", "summary"], env=environment, capture_output=True, text=True, check=False
    )
    assert late.returncode == 1
    assert "calibrate: no time left" in late.stdout
    assert "failed: calibrate;" in late.stdout
    assert "not measured" in late.stdout


CLOCK = """
timeout() { # limit and command go to a file; the clock goes on by what the command takes: its --seconds, or the limit
  while [[ $1 == -* ]]; do shift 2; done
  echo "$@" >>"$CALLS"
  local took=$1
  while (($# > 1)); do
    shift
    [[ $1 != --seconds ]] || took=$2
  done
  SECONDS=$((SECONDS + (took > 0 ? took : 0)))
}
compute-sanitizer() { :; }
"""


@pytest.mark.parametrize("wanted", [(), ("bench", "sanitize", "summary"), ("sanitize", "summary")])
def test_the_suite_leaves_time_for_its_last_sections(wanted, tmp_path) -> None:
    """Every command takes all the time it is given, by a clock that only they move."""
    (tmp_path / "clock.sh").write_text(CLOCK)
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path), "BASH_ENV": str(tmp_path / "clock.sh")}
    environment |= {"PYTHON": "stub", "CALLS": str(tmp_path / "calls")}
    command = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), *wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    calls = [line.split(maxsplit=1) for line in (tmp_path / "calls").read_text().splitlines()]
    sanitize = [int(limit) for limit, call in calls if call.startswith("compute-sanitizer")]
    assert len(sanitize) == 2
    assert sum(sanitize) >= 80
    assert "bench.plot" in calls[-1][1]
    assert int(calls[-1][0]) >= 20
    # All but the summary; two seconds of the real clock are for bash itself.
    assert sum(int(limit) for limit, _ in calls[:-1]) - 15 * sum("--seconds" in call for _, call in calls) <= 552
    assert ("no time left" in done.stdout) == (not wanted)  # all sections at their worst leave none to the bench
    if wanted[:1] == ("bench",):
        full, compiled = (call for _, call in calls if "bench.run" in call and "--seconds" in call)
        assert "--skip ^compile$" in full
        assert int(full.split("--seconds ")[1].split()[0]) > 300
        assert "--providers compile" in compiled
        assert [int(limit) for limit, call in calls if call.endswith(compiled)] == [60]  # not what the others left over


def test_the_suite_tests_what_matters_first(tmp_path) -> None:
    """One file is not named twice, none is left out, and eight processes run them where pytest can."""
    (tmp_path / "clock.sh").write_text(CLOCK)
    environment = {"OUT": str(tmp_path), "BASH_ENV": str(tmp_path / "clock.sh"), "CALLS": str(tmp_path / "calls")}
    for python, parallel in (("true", True), ("false", False)):
        (tmp_path / "calls").unlink(missing_ok=True)
        command = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), "test"]
        subprocess.run(command, env=environment | {"PATH": "/usr/bin:/bin", "PYTHON": python}, capture_output=True)
        words = (tmp_path / "calls").read_text().split()
        assert ("-n" in words) == parallel
        files = [word for word in words if word.startswith("python_tests")]
        assert [file.rpartition("/")[2] for file in files[:2]] == ["test_guarantees.py", "test_graphs.py"]
        assert sorted(files) == sorted(str(f.relative_to(ROOT)) for f in (ROOT / "python_tests").rglob("test_*.py"))


def test_a_busy_machine_is_told() -> None:
    calm = {"case": CASE.name, "provider": "bare", "p20": "1.0", "p50": "1.1", "p80": "1.2"}
    assert "NOISY" not in report.ratios([calm] * 10)
    assert "NOISY: in 3 of 10 rows" in report.ratios([calm] * 7 + [calm | {"p80": "1.6"}] * 3)


# A private op, which a build of torch may lack: without the guard no test of the project would be collected there.
ONEDNN_BF16 = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not ONEDNN_BF16, reason="oneDNN has no bf16 on this processor")
def test_compile_is_frozen_and_right() -> None:
    """The compiled baseline must be the strongest form: weights prepacked, which inductor does only when it freezes."""
    case = replace(CPU_DEFAULT, dtype="bf16")
    i = make(case, "cpu")
    with torch.no_grad():
        built = PROVIDERS["compile"].build(i)
        assert not wrong({"y": built.forward()}, plain(i, TYPES["bf16"]), plain(i, torch.float64), i)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            built.forward()
    assert any("mkldnn" in event.key for event in profile.key_averages())
