"""Torch's own operators on one thread, the package's kernels on all: for blocks whose bits are promised."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s3t_ext.lora.kernels import native

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def pinned() -> Iterator[None]:
    """Run torch's operators on one thread inside the block; one block at a time in a process.

    Attention (``scaled_dot_product_attention``) on several threads gives bits that depend on their number and on the
    batch for some head sizes (seen in torch 2.13: 17 tokens, head size 8); on one thread it depends on neither. The
    native kernels are invariant and keep the number of threads that torch had outside.
    """
    with _ONE_AT_A_TIME:
        outside, team = torch.get_num_threads(), native.team
        native.team = team or outside
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(outside)
            native.team = team
