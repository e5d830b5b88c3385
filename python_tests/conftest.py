"""Shared settings: the suite's helper modules are importable, and every test runs in a folder of its own.

A test's child processes then import the installed package, never a source tree in the current folder. Skips are counted
by pytest's summary (-ra). Without a CUDA device the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

HERE = Path(__file__).parent
for folder in (HERE, HERE / "lora", HERE / "system"):
    sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
