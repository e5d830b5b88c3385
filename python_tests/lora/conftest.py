"""Where Triton's interpreter stands in for a device, every product in it has a device's order of sums."""

from __future__ import annotations

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
