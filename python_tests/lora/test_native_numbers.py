"""Number formats: every half value converted, multiply-adds that are fused, on every instruction set."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest
import torch
from native_cases import TYPES
from torch import Tensor

from s3t_ext.lora.kernels import native

if not native.AVAILABLE:
    pytest.skip(native.WHY_NOT, allow_module_level=True)

HARD = [  # (a, b, c): a * b + c where two roundings, or a flush to zero, would show
    (1 + 2**-12, 1 + 2**-12, 2**-60),  # just above the midpoint of two floats
    (1 + 2**-12, 1 + 2**-12, -(2**-60)),
    (1 + 2**-12, 1 + 2**-12, 0.0),  # the midpoint itself
    (-1 - 2**-12, 1 + 2**-12, 2**-60),
    (3.0, 2**-149, 2**-126),  # at the edge of the subnormals
    (2**-75, 2**-75, 0.0),  # half the smallest float: to even, zero
    (2**-75, 2**-75 * (1 + 2**-23), 0.0),  # a hair more: the smallest float
    (2**-75, -(2**-75), 2**-149),
    (2.0**127, 2.0, -(2.0**127)),  # a product past the range, a sum inside it
    (2.0**127, 2.0, 0.0),
    (float("inf"), 1.0, -1.0),
]


def equal_or_nan(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


def multiplied(values: Tensor) -> Tensor:
    """Give what a product with one makes of values: VDPBF16PS takes subnormal numbers for zero."""
    if native.build_info()["isa"] == "avx512_bf16" and values.dtype == torch.bfloat16:
        return torch.where(values.float().abs() < 2.0**-126, 0, values)
    return values


@pytest.mark.skipif(ctypes.util.find_library("m") is None, reason="no C library with fmaf to compare with")
def test_the_multiply_add_is_fused() -> None:
    """Hold a * b + c against the C library's fmaf: hard cases, all kinds of bits, and sums that cancel."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, (3, 20000), dtype=np.uint32).view(np.float32)
    near = random.standard_normal((2, 20000)).astype(np.float32)
    cancel = np.stack([near[0], near[1], -(near[0] * near[1])])  # leaves only what the product's rounding lost
    abc = np.concatenate([np.array(HARD, np.float32).T, bits, cancel], 1)
    want = torch.tensor([fmaf(*(float(x) for x in column)) for column in abc.T])
    # c * 1 + 0 and then a * b + c: each triple is one adapter of rank one.
    w = torch.from_numpy(np.stack([np.ones_like(abc[0]), abc[1]], 1))[:, None]  # (N, 1, 2)
    u = torch.from_numpy(np.stack([abc[2], abc[0]], 1))  # (T, 2)
    ids = torch.arange(len(u), dtype=torch.int32)[:, None]
    offsets = torch.arange(len(u) + 1, dtype=torch.int32)
    got = native.shrink(u, w, None, ids, offsets, None, 1.0)[:, 0, 0]
    equal_or_nan(got, want)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def floats_around(dtype: torch.dtype) -> Tensor:
    """Every value of a half type as fp32, every midpoint of two neighbours, one fp32 step beside each, and noise."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    half_step = {torch.float16: 2**12, torch.bfloat16: 2**15}[dtype]
    around = [bits + middle + beside for middle in (0, half_step) for beside in (-1, 0, 1)]
    noise = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    quarters = torch.arange(2**13) * 2.0**-26  # of the steps between the subnormals of fp16
    return torch.cat([torch.cat([*around, noise]).view(torch.float32), quarters, -quarters])


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("width", [2**16, 7], ids=["vectors", "remainders"])
def test_all_half_values_are_widened_exactly(dtype: torch.dtype, width: int) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    halves = halves[: len(halves) // width * width].view(-1, width)  # (T, width)
    ids = torch.arange(len(halves), dtype=torch.int32)[:, None]
    offsets = torch.arange(len(halves) + 1, dtype=torch.int32)
    s = ones(len(halves), 1, 1, dtype=dtype)
    got = native.outer(s, halves, ids, offsets, 0, len(halves), torch.float32)[:, 0]
    equal_or_nan(got, multiplied(halves).float())


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("width", [512, 7], ids=["vectors", "remainders"])
def test_floats_are_rounded_to_nearest_even(dtype: torch.dtype, width: int) -> None:
    """Hold fp32 to half against torch: read from a pool in rows of `width`, and written by shrink."""
    values = floats_around(dtype)
    values = values[: len(values) // width * width].view(-1, 1, width)  # (N, 1, width)
    ids = torch.arange(len(values), dtype=torch.int32)[:, None]
    offsets = torch.arange(len(values) + 1, dtype=torch.int32)
    read = torch.zeros(len(values), width, dtype=dtype)
    native.expand_(read, ones(len(values), 1, 1, dtype=dtype), values, None, ids, offsets)
    equal_or_nan(read, multiplied(values[:, 0].to(dtype)))

    # Written: s = 1 * scale, with a scale of its own for each adapter.
    scales = values.flatten()
    P = 16
    scales = scales[: len(scales) // P * P]
    ids = torch.arange(len(scales), dtype=torch.int32).view(-1, P)
    offsets = torch.arange(len(ids) + 1, dtype=torch.int32)
    pool = ones(len(scales), 1, 1, dtype=dtype)
    written = native.shrink(ones(len(ids), 1, dtype=dtype), pool, None, ids, offsets, scales, 1.0)
    equal_or_nan(written.flatten(), scales.to(dtype))
