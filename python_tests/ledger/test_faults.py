"""A deletion under a fault, or a kill, at its 1st, 2nd, ... call that changes a file, SQLite's own calls included.

The counts are printed (`pytest -rP`).
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("error", "lasting"),  # a call that is interrupted for ever is repeated for ever
    [
        (errno.EIO, "once"),
        (errno.EIO, "lasting"),
        (errno.ENOSPC, "once"),
        (errno.ENOSPC, "lasting"),
        (errno.EINTR, "once"),
    ],
)
def test_a_fault_at_any_call_acknowledges_nothing_that_is_not_there(library, tmp_path, error, lasting):
    seen = run_faults(library, tmp_path, error, lasting)
    after = set(seen["acknowledged_after_a_fault"])
    if lasting == "lasting":
        assert not after
    elif error != errno.EINTR:  # which is repeated
        # SQLite passes over a failed sync of the folder that it put its log into: the anchor's own makes up for it.
        # From the sync of the commit on: the epoch's open and sync; the anchor's read, open, write, sync, rename; ...
        assert not after & set(range(seen["calls"] - 11, seen["calls"]))
    assert seen["refused"] >= (1 if error == errno.EINTR else 20)


def test_a_kill_at_any_call_loses_nothing(library, tmp_path):
    seen = run_faults(library, tmp_path, 0, "once")
    assert seen["killed"] == seen["calls"] - 1 >= 20


def run_faults(library, folder, error, lasting):
    driver = Path(__file__).with_name("faults.py")
    child = subprocess.run(
        [sys.executable, driver, library, folder, str(error), lasting],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    print(f"{errno.errorcode.get(error, 'kill -9')}, {lasting}: {child.stdout.strip()}")
    return json.loads(child.stdout)
