"""The ordinary call in one step (csrc/direct.cpp): the bits of the long way, and the long way for all else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from native_cases import CASES, EDGES, POOLS, TYPES, Case, make
from torch import Tensor, nn

from s3t_ext import masked_lora_linear, pack
from s3t_ext.lora import ops
from s3t_ext.lora.kernels import native
from s3t_ext.lora.nn import MaskedLoRALinear
from s3t_ext.lora.routing import Routing

NAMES = ("x", "weight", "bias", "a", "b", "adapter_ids", "offsets", "scale", "train")
SMALL = Case("small", 24, 40, 4, (3, 2), ((0, -1), (2, 1)), M=0)


@pytest.fixture
def took(monkeypatch) -> list[bool]:
    """List, call by call, whether the direct way did it."""
    seen: list[bool] = []
    inner = native.direct

    def count(*args):
        y = inner(*args)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(native, "direct", count)
    return seen


def outcome(function: Callable[[], Tensor]) -> Tensor | tuple[type, str]:
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def both(function: Callable[[], Tensor], took: list[bool], wanted: bool = True) -> None:
    """Hold a call against the same call with the direct way closed."""
    took.clear()
    got = outcome(function)
    assert any(took) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "direct", lambda *_: None)
        want = outcome(function)
    if not isinstance(want, Tensor):
        assert got == want
        return
    assert isinstance(got, Tensor), got
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert torch.equal(got, want)
    assert got.is_inference() == want.is_inference()
    assert got.requires_grad == want.requires_grad


def arguments(case: Case, types: tuple[torch.dtype, ...] = (torch.float32,) * 3, packed: bool = False) -> dict:
    v = make(case, types)
    ids = v["ids"]
    ids[ids >= case.N + case.M] = -1  # an error on the CPU
    ids[ids < -1] = -1
    return {
        "x": v["x"],
        "weight": pack(v["weight"]) if packed else v["weight"],
        "bias": v["bias"],
        "a": v["a"],
        "b": v["b"],
        "adapter_ids": ids,
        "offsets": v["offsets"],
        "scale": v["scales"],
        "train": (v["a1"], v["b1"]) if case.M else None,
        "mode": "exact",
    }


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("types", POOLS, ids=str)
@pytest.mark.parametrize("case", [*CASES, *EDGES], ids=lambda case: case.why)
def test_the_bits_of_the_long_way(took, case, types, packed) -> None:
    v = arguments(case, types, packed)
    both(lambda: masked_lora_linear(**v), took)
    both(lambda: masked_lora_linear(**{**v, "scale": 0.7, "bias": None}), took)
    fast = packed or types[0] != torch.bfloat16 or len(v["x"]) <= 64
    both(lambda: masked_lora_linear(**{**v, "mode": "fast"}), took, wanted=fast)
    with torch.inference_mode():
        both(lambda: masked_lora_linear(**v), took)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_what_is_masked_is_not_read(took, dtype, packed) -> None:
    v = arguments(SMALL, (dtype,) * 3, packed)
    v["adapter_ids"] = torch.tensor([[0, -1], [2, 0]], dtype=torch.int32)
    want = masked_lora_linear(**v)
    v["a"][1] = v["b"][1] = float("nan")
    assert torch.equal(masked_lora_linear(**v), want)
    assert took == [True, True]


# --- declined --------------------------------------------------------------------------------------------------------


class Wrapped(Tensor):
    """A subclass in its plainest form."""


def gap(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


# What is done to one tensor of a good call, where it goes the long way, to an answer or to an error.
ODD: dict[str, Callable[[Tensor], object]] = {
    "a subclass": lambda t: t.as_subclass(Wrapped),
    "no tensor": lambda t: t.numpy(),
    "another device": lambda t: t.to("meta"),
    "another type": lambda t: t.double(),
    "one row less": lambda t: t[:-1],
    "one dimension more": lambda t: t[None],
    "none": lambda _: None,
    "sparse": lambda t: t.to_sparse(),
    "a lazy negative": torch._neg_view,
}


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tensor_goes_the_long_way(took, name, odd) -> None:
    v = arguments(SMALL)
    v[name] = ODD[odd](v[name])
    both(lambda: masked_lora_linear(**v), took, wanted=(name, odd) == ("bias", "none"))


@pytest.mark.parametrize("name", ["x", "weight", "a", "b", "scale"])
def test_zeros_without_memory_are_not_read(name) -> None:
    v = arguments(SMALL)
    v[name] = torch._efficientzerotensor(v[name].shape)
    assert ops.direct(*map(v.get, NAMES), "exact") is None


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("adapter_ids", "train")])
def test_gaps_are_found(took, name) -> None:
    v = arguments(SMALL)
    v[name] = gap(v[name])
    assert not v[name].is_contiguous()
    both(lambda: masked_lora_linear(**v), took, wanted=False)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "a", "b", "scale", "train"])
def test_gradients_go_the_long_way(took, name) -> None:
    v = arguments(Case("pools", 24, 40, 4, (3, 2), ((0, -1), (2, 1))) if name == "train" else SMALL)
    v[name] = tuple(t.requires_grad_() for t in v[name]) if name == "train" else v[name].requires_grad_()
    both(lambda: masked_lora_linear(**v), took, wanted=False)
    with torch.no_grad():
        both(lambda: masked_lora_linear(**v), took)


@pytest.mark.parametrize("part", ["panels", "turned"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_spoiled_panels(took, dtype, part) -> None:
    v = arguments(SMALL, (dtype,) * 3)
    good = pack(v["weight"], backward=True)
    v["weight"] = good
    both(lambda: masked_lora_linear(**v), took)
    for spoil in (lambda t: t[..., :-1], lambda t: t[:-1], gap, lambda t: t.double(), torch.neg):
        panels = good._replace(**{part: spoil(getattr(good, part))})
        both(lambda panels=panels: masked_lora_linear(**{**v, "weight": panels}), took, wanted=spoil is torch.neg)
    for sizes in ({"in_features": 23}, {"out_features": 64}, {"out_features": 10**30}, {"out_features": "forty"}):
        panels = good._replace(**sizes)
        both(lambda panels=panels: masked_lora_linear(**{**v, "weight": panels}), took, wanted=False)


@pytest.mark.parametrize(
    "change",
    [
        {"adapter_ids": torch.tensor([[0, 3], [0, 1]], dtype=torch.int32)},
        {"adapter_ids": torch.tensor([[0, -2], [0, 1]], dtype=torch.int32)},
        {"adapter_ids": torch.zeros(2, 2, dtype=torch.int64)},
        {"offsets": None},
        {"offsets": torch.tensor([0, 6, 5], dtype=torch.int32)},
        {"offsets": torch.tensor([0, 2, 4], dtype=torch.int32)},
        {"offsets": torch.tensor([1, 2, 5], dtype=torch.int32)},
        {"scale": True},
        {"scale": np.float64(2.0)},
        {"scale": 10**400},
        {"scale": "2"},
        {"train": (None, None)},
        {"train": 3},
        {"mode": "split"},
        {"mode": "fused"},
        {"mode": "quick"},
        {"mode": []},
        {"backend": "reference"},
        {"backend": "mine"},
        {"dropout": (0.5, torch.zeros(2, dtype=torch.int64), torch.arange(5))},
    ],
    ids=str,
)
def test_an_odd_call_goes_the_long_way(took, change) -> None:
    both(lambda: masked_lora_linear(**{**arguments(SMALL), **change}), took, wanted=False)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("odd", [o for o in ODD if o != "no tensor"])
def test_an_odd_pool_goes_the_long_way(took, part, odd) -> None:
    v = arguments(Case("pools", 24, 40, 4, (3, 2), ((0, -1), (2, 3))))
    both(lambda: masked_lora_linear(**v), took)
    v["train"] = tuple(ODD[odd](t) if i == part else t for i, t in enumerate(v["train"]))
    both(lambda: masked_lora_linear(**v), took, wanted=False)


@pytest.mark.parametrize("transform", [torch.vmap, partial(torch.func.jacrev), partial(torch.func.functionalize)])
def test_a_transform_sees_the_op(took, transform) -> None:
    v = arguments(SMALL)
    want, found = masked_lora_linear(**v), []
    transform(lambda t: (found.append(ops.direct(*map(v.get, NAMES), "exact")), t.sum())[1])(torch.ones(2, 3))
    assert found == [None]
    assert torch.equal(masked_lora_linear(**v), want)


def test_a_torch_that_publishes_nothing_declines() -> None:
    script = """
import ctypes, torch
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
if KIND == "none":
    del torch.Tensor.__dlpack_c_exchange_api__
elif KIND == "version":
    table = (ctypes.c_uint32 * 40)(2, 0, *[1] * 38)
    torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(table), b"dlpack_exchange_api", None)
elif KIND == "name":
    torch.Tensor.__dlpack_c_exchange_api__ = new(1, b"another", None)
from s3t_ext import masked_lora_linear
from s3t_ext.lora import ops
x, w, a, b = torch.randn(2, 8), torch.randn(4, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 4)
ids = torch.zeros(1, 1, dtype=torch.int32)
y = ops.direct(x, w, None, a, b, ids, None, 1.0, None, "exact")
print(KIND, y is not None, masked_lora_linear(x, w, None, a, b, ids, mode="exact").shape == (2, 4))
"""
    for kind in ("all", "none", "version", "name"):
        command = [sys.executable, "-c", f"KIND = {kind!r}{script}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.split() == [kind, str(kind == "all"), "True"], done.stderr


# --- what a module adds ----------------------------------------------------------------------------------------------


def layer(packed: bool, dtype: torch.dtype = torch.float32) -> MaskedLoRALinear:
    made = MaskedLoRALinear(nn.Linear(24, 40).to(dtype), Routing(1, 3), slice(0, 2), 4, 2.0)
    made.a, made.b = torch.randn(5, 4, 24), torch.randn(5, 4, 40)  # (N, r, K), (N, r, O)
    made._routing[0].table.copy_(torch.tensor([[3, 1, 0]]))
    return made.pack() if packed else made


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (1, 1, 24), (2, 3, 24), (0, 3, 24), (2, 1, 2, 1, 24)])
def test_a_module_takes_any_leading_dimensions(took, shape, dtype, packed) -> None:
    made, x = layer(packed, dtype), torch.randn(shape).to(dtype)
    both(lambda: made(x), took)
    assert took == [True] if len(shape) > 1 else [False, True]
    both(lambda: made(x.transpose(0, -1).contiguous().transpose(0, -1)), took)  # laid out by the long way
    both(lambda: made(x.clone().requires_grad_()), took, wanted=False)
    if len(shape) == 3 and shape[0] == 2:
        with made._routing[0].batch([2], made._routing[0].table):
            both(lambda: made(x), took)


def test_a_module_drops_out_without_gradient_too(took) -> None:
    made, x = layer(packed=True), torch.randn(3, 24)
    made.train_pool = torch.randn(2, 4, 24), torch.randn(2, 4, 40)  # (M, r, K), (M, r, O)
    drop = 0.5, torch.zeros(1, 1, dtype=torch.int64), torch.arange(3)
    with made._routing[0].batch([3], dropout=drop):
        both(lambda: made(x), took, wanted=False)
    with made._routing[0].batch([3]):
        both(lambda: made(x), took)


def test_an_op_takes_a_matrix_only(took) -> None:
    v = arguments(Case("one group", 24, 40, 4, (6,), ((0, 2),), M=0, offsets=False))
    both(lambda: masked_lora_linear(**v), took)
    v["x"] = v["x"].view(2, 3, 24)
    both(lambda: masked_lora_linear(**v), took, wanted=False)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_result_owns_its_memory(took) -> None:
    v = arguments(SMALL, packed=True)
    y = masked_lora_linear(**v)
    want = y.clone()
    del v
    for _ in range(20):
        torch.full((5, 40), float("nan"))
    assert torch.equal(y, want)
    assert y._base is None
    y.resize_(100, 100)  # as what torch allocates
    assert took == [True]
