"""Triton's interpreter with the order of sums of a device: what a kernel's own order is can then be seen bit by bit.

The interpreter's ``tl.dot`` is NumPy's matrix product, in which the bits of a row depend on the shape of the tile. A
device has a fixed order for each element. Here it is that of Triton's fp32 products on a device, and the simplest one
for fp16: one chain of fused multiply-adds, k ascending, from the accumulator.
"""

from __future__ import annotations

import functools
import inspect
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
    """Let every product in the interpreter be a chain, and leave out what is slow in it.

    That is its checks of integer overflow, and that for every program and every function that a kernel calls it looks
    through all names of ``triton.language`` for those to patch.
    """
    from triton.language import core
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(chain(a.data, b.data, d.data), d.dtype.scalar)

    @functools.cache
    def names(of: object) -> list[str]:
        return [name for name, _ in inspect.getmembers(of, callable)]

    def patch_builtin(of, *rest):
        for name in names(of):
            if core.is_builtin(member := getattr(of, name)):
                interpreter._patch_attr(of, name, member, *rest)

    builder, options = interpreter.InterpreterBuilder, interpreter.interpreter_builder.options
    before = builder.create_dot, options.sanitize_overflow, interpreter._patch_builtin
    builder.create_dot, interpreter._patch_builtin = create_dot, patch_builtin
    object.__setattr__(options, "sanitize_overflow", False)
    try:
        yield
    finally:
        builder.create_dot, interpreter._patch_builtin = before[0], before[2]
        object.__setattr__(options, "sanitize_overflow", before[1])
