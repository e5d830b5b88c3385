"""kill -9 at random instants: nothing acknowledged is lost, nothing dead is served or left, training ends in its bits.

The counts are printed (`pytest -rP`). S3T_LONG=1: 2,000 kills of commands, 200 of training, ten minutes. All long
counts of the suite at once: `S3T_LONG=1 pytest -rP -n 2 $(git grep -l S3T_LONG python_tests)`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = bool(os.environ.get("S3T_LONG"))
OPERATIONS = ("delete", "command", "erase", "sweep", "rotate", "heal", "grow")
SEED = 6


def run(driver, *arguments):
    """Run a driver of this folder, which prints its counts; one thread, so that it can fork."""
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name(driver), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_loses_nothing_and_brings_nothing_back(tmp_path, operation):
    kills = -(-(2000 if LONG else 210) // len(OPERATIONS))
    seen = run("kills.py", tmp_path, kills, SEED, operation)[operation]
    print(f"kill -9 of {operation}: {seen}")
    assert seen["kills"] == kills


@pytest.mark.parametrize(("what", "kills"), [("training", 30), ("healing", 12)])
def test_killed_work_goes_on_to_the_same_bits(tmp_path, what, kills):
    kills = 200 if LONG else kills
    seen = run("kills_training.py", tmp_path, kills, SEED, what)
    print(f"kill -9 of {what}: {seen}")
    assert seen["kills"] >= kills
    assert seen["with nodes missing"] > kills // 5
