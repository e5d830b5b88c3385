"""The script for a machine with a GPU: its sections, and that the last ones get their time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import ROOT


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
        assert "--skip ^compile" in full
        assert int(full.split("--seconds ")[1].split()[0]) > 300
        assert "--providers compile compile_cat" in compiled
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
