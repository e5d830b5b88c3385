"""Every test of the native kernels on every instruction set that runs here, each set in a process of its own.

A set that another one would be chosen over is reached by force alone (S3T_CPU). What the kernels may not touch lies on
pages that end a process (native_memory), so the set that is chosen anyway runs those here too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from native_cases import CASES, EDGES, POOLS

from s3t_ext.lora.kernels import native

if not native.AVAILABLE:
    pytest.skip(native.WHY_NOT, allow_module_level=True)

FILES = ("test_native.py", "test_native_numbers.py", "native_memory.py")
ISAS = native.build_info()["isas"]


def forced(isa: str, code: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, on one instruction set, in a folder that holds no package."""
    env = {**os.environ, "S3T_CPU": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *code]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=folder, env=env, text=True, timeout=600, **both)


@pytest.mark.parametrize("isa", ISAS)
def test_every_test_passes_on(isa: str, tmp_path: Path) -> None:
    chosen = isa == native.build_info()["isa"]  # on which the suite itself runs all but native_memory
    files = [str(Path(__file__).with_name(name)) for name in (FILES[-1:] if chosen else FILES)]
    options = ("-q", "--tb=short", "-m", "not gpu", "-p", "no:cacheprovider")
    run = forced(isa, ("-m", "pytest", *options, *files), tmp_path)
    end = "\n".join(run.stdout.splitlines()[-40:])  # the failures' names; of a crash, where it was
    assert run.returncode == 0, f"S3T_CPU={isa}: status {run.returncode}\n{end}"
    (passed,) = re.findall(r"^(\d+) passed(?:, \d+ deselected)? in ", run.stdout, re.MULTILINE)  # and none skipped
    # Of bits, and of pages before and behind.
    assert int(passed) > (1 if chosen else 2) * len([*CASES, *EDGES]) * len(POOLS), end


def test_the_portable_set_runs_everywhere() -> None:
    assert ISAS[-1] == "portable"


def test_a_bad_instruction_set_is_named(tmp_path) -> None:
    call = "native.shrink(torch.ones(1, 1), torch.ones(1, 1, 1), None, torch.zeros(1, 1).int(), None, None, 1.0)"
    run = forced("sse9", ("-c", f"import torch; from s3t_ext.lora.kernels import native; {call}"), tmp_path)
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith("ValueError: S3T_CPU must name an instruction set of this processor")
    assert "sse9" in last
    assert "portable" in last
