"""Where Triton's interpreter stands in for a device, every product in it has a device's order of sums."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interpreted import chained

from s3t_ext.lora.kernels import serves


@pytest.fixture(autouse=True)
def ordered():
    if not serves("triton", "shrink", "cpu", torch.float32):
        yield
        return
    with chained():
        yield


@pytest.fixture(scope="session")
def compiled_once(request, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that gives a folder for what is compiled, which all workers share, and later runs if it can."""
    cache = getattr(request.config, "cache", None)  # none under -p no:cacheprovider
    beside = tmp_path_factory.getbasetemp()
    beside = beside.parent if "PYTEST_XDIST_WORKER" in os.environ else beside

    def folder(name: str) -> Path:
        path = cache.mkdir(name) if cache else beside / name
        path.mkdir(exist_ok=True)
        return path

    return folder
