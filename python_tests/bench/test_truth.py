"""The rule that a result must pass before it is timed is neither too wide nor blind in one norm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cases import CPU_DEFAULT, Case
from bench.truth import TYPES, make, plain, wrong

CASE = Case(T=9, K=20, O=24, r=2, G=3, P=2, live=2, timer="all")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_left_out_is_seen(dtype) -> None:
    """At the sizes of the benchmark the rule must not be so wide that one slot of one group falls through."""
    case = replace(CPU_DEFAULT, G=20, P=4, dtype=dtype)
    i = make(case, "cpu")
    same, truth = plain(i, TYPES[dtype]), plain(i, torch.float64)
    assert wrong(same, same, truth, i) == ""
    less = make(case, "cpu")
    less.a[7 * case.P + 2] = 0
    assert "error" in wrong(plain(less, TYPES[dtype]), same, truth, i)
    one = make(case, "cpu")
    one.a[7 * case.P + 2, 3] = 0  # one of 16 ranks
    assert "error" in wrong(plain(one, TYPES[dtype]), same, truth, i)


@pytest.mark.parametrize(("norm", "one", "all_"), [("rms", 0.0, 1.5), ("maximum", 3.0, 0.1)])
def test_each_norm_is_held(norm, one, all_) -> None:
    """A small error everywhere is seen by the one, a large one at one place by the other."""
    i = make(CASE, "cpu")
    truth = plain(i, torch.float64)["y"]
    same, got = truth.clone(), truth + all_
    same[-1, -1] += 1.0
    got[-1, -1] = truth[-1, -1] + (one or all_)
    assert wrong({"y": got}, {"y": same}, {"y": truth}, i).startswith(f"y: {norm} error")
