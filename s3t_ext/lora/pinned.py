"""Torch's own operators on one thread, the package's kernels on a chosen number: for blocks whose bits are promised."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s3t_ext.lora.kernels import native

_lock = threading.Lock()
_inside = 0  # blocks that any thread is in
_outside = 1  # torch's threads before the first of them


@contextmanager
def pinned(team: int | None = None) -> Iterator[None]:
    """Run torch's operators on one thread inside the block; any number of threads may be in such a block at a time.

    Attention (``scaled_dot_product_attention``) on several threads gives bits that depend on their number and on the
    batch for some head sizes (seen in torch 2.13: 17 tokens, head size 8); on one thread it depends on neither. The
    native kernels are invariant and run on ``team`` threads: by default as many as torch had outside.

    Notes:
        Torch's number is of the thread that sets it, and what a new thread begins with: threads that begin while a
        block is open, in other parts of a program, may begin with one.
    """
    global _inside, _outside
    before = native.team.threads
    with _lock:
        own = torch.get_num_threads()
        if before is None and own == 1 and _inside:
            own = _outside  # of a thread that began while a block was open
        elif not _inside:
            _outside = own
        _inside += 1
        torch.set_num_threads(1)
    native.team.threads = team or before or own
    try:
        yield
    finally:
        native.team.threads = before
        with _lock:
            _inside -= 1
            torch.set_num_threads(own)
