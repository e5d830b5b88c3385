"""Triton's interpreter with the order of sums of a device: what a kernel's own order is can then be seen bit by bit.

The interpreter's ``tl.dot`` is NumPy's matrix product, in which the bits of a row depend on the shape of the tile. A
device has a fixed order for each element. Here it is that of Triton's fp32 products on a device, and the simplest one
for fp16: one chain of fused multiply-adds, k ascending, from the accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def chain(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Add a (M, K) @ b (K, N) to a total (M, N): fp64 holds a product of fp32 values exactly."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[1]):
        total = (a[:, k, None] * b[k] + total).astype(np.float32)  # (M, N)
    return total


@contextmanager
def chained() -> Iterator[None]:
    """Let every product in the interpreter be a chain, and leave its (slow) checks of integer overflow out."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(chain(a.data, b.data, d.data), d.dtype.scalar)

    builder, options = interpreter.InterpreterBuilder, interpreter.interpreter_builder.options
    before = builder.create_dot, options.sanitize_overflow
    builder.create_dot = create_dot
    object.__setattr__(options, "sanitize_overflow", False)
    try:
        yield
    finally:
        builder.create_dot = before[0]
        object.__setattr__(options, "sanitize_overflow", before[1])
