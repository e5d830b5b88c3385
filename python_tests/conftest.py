"""Shared settings: the suite's helper modules are importable, and every test runs in a folder of its own.

A test's child processes then import the installed package, never a source tree in the current folder. Skips are counted
by pytest's summary (-ra). Without a CUDA device the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # side by side: each, and what it starts, has its share of the cores; read as torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

HERE = Path(__file__).parent
ROOMS = "", "data", "training", "serving", "attacks"  # of the roof, whose tests call each other as leak mutants do
for folder in (HERE, HERE / "lora", HERE / "models", HERE / "approximate", *(HERE / "system" / room for room in ROOMS)):
    sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def warm_processes(monkeypatch) -> None:
    """Fork the product's own fresh processes from one that has imported torch: seconds less for each."""
    import warm

    from s3t_ext.system import scratch

    monkeypatch.setattr(scratch, "subprocess", SimpleNamespace(run=warm.run, PIPE=subprocess.PIPE))


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The fault injector, compiled; its absence is a counted skip, since a wheel is tested where no compiler is."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the fault injector with")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = HERE / "ledger" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    assert ctypes.CDLL(str(library)).faults_made() == 0
    return library
