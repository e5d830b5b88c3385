"""The native kernels: the order of sums bit by bit, and every guarantee that follows from it.

Where bits are promised, bits are compared; a tolerance appears only against fp64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from native_cases import CASES, EDGES, MIXED, POOLS, STRIPS, TYPES, Case, every_op, make, oracle, same
from numerics import assert_error
from torch import Tensor

from s3t_ext.lora.kernels import native, reference

if not native.AVAILABLE:
    pytest.skip(native.WHY_NOT, allow_module_level=True)

BY_WHY = pytest.mark.parametrize("case", [*CASES, *EDGES], ids=lambda case: case.why)
BY_TYPE = pytest.mark.parametrize("types", POOLS, ids=lambda t: "-".join(str(x).removeprefix("torch.") for x in t))


@cache
def contract(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sum as the contract says; of an fp32 pool, which is rounded on reading, what its rounded values give."""
    return oracle(make(case, (dtype,) * 3))


@BY_TYPE
@BY_WHY
def test_bits_are_those_of_the_contract(case: Case, types: tuple[torch.dtype, ...]) -> None:
    same(every_op(make(case, types)), contract(case, types[0]))


def test_the_instruction_set_is_the_one_asked_for() -> None:
    """All of this file runs once more on each of the others (test_instruction_sets)."""
    info = native.build_info()
    assert info["isa"] == (os.environ.get("S3T_CPU") or info["isas"][0])


# Guarantee 1: masked means unread, and nothing crosses. Few rows take another way through the kernels than many.

FEW = replace(MIXED, sizes=(1, 2, 0, 1, 2))
BY_ROWS = pytest.mark.parametrize("case", [MIXED, FEW], ids=["many rows", "few rows"])


def poison(x: Tensor | None, index: object) -> Tensor:
    x = x.clone()
    x[index] = float("nan")
    x.view(-1)[x.view(-1).isnan().nonzero()[::2]] = float("inf")
    return x


@BY_ROWS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dead_adapters_are_not_read(dtype: torch.dtype, case: Case) -> None:
    # Adapter 2 is named by an empty group only, 3 and 4 by nobody.
    case = replace(case, ids=((0, -1), (1, 99), (2, 2), (-1, -1), (0, 1)))
    v = make(case, (dtype,) * 3)
    dead = {name: poison(v[name], 2) for name in "ab"} | {name: poison(v[name], ...) for name in ("a1", "b1")}
    same(every_op({**v, **dead}), every_op(v))


@BY_ROWS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_masked_slot_has_the_bits_of_an_absent_one(dtype: torch.dtype, case: Case) -> None:
    v = make(case, (dtype,) * 3)
    masked = v["ids"].clone()
    masked[:, 0] = -1
    got, want = every_op({**v, "ids": masked}), every_op({**v, "ids": v["ids"][:, 1:]})
    for name in ("s", "ds"):
        assert torch.count_nonzero(got[name][:, 0]) == 0
        assert torch.equal(got[name][:, 1:], want[name])
    same(got, {name: want[name] for name in ("y", "linear", "dx", "da", "db")})


@BY_ROWS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("group", [0, 1, 4])
def test_poison_in_one_group_stays_there(dtype: torch.dtype, case: Case, group: int) -> None:
    v = make(case, (dtype,) * 3)
    rows = slice(int(v["offsets"][group]), int(v["offsets"][group + 1]))
    clean, got = every_op(v), every_op({**v, "x": poison(v["x"], rows), "y": poison(v["y"], rows)})
    named = [n for n in v["ids"][group].tolist() if n >= 0]
    for name, value in got.items():
        touched = torch.zeros(len(value), dtype=torch.bool)
        touched[named if name in ("da", "db") else rows] = True
        assert torch.equal(value[~touched], clean[name][~touched]), name
        assert not torch.isfinite(value[touched].float()).all(), name  # the poison was there


@BY_ROWS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_poison_in_a_live_adapter_stays_with_its_rows(dtype: torch.dtype, case: Case) -> None:
    v = make(case, (dtype,) * 3)
    clean, got = every_op(v), every_op({**v, "a": poison(v["a"], 0), "b": poison(v["b"], 0)})  # group 0's alone
    for name, value in got.items():
        mine = 1 if name in ("da", "db") else case.sizes[0]  # adapter 0, or the rows of group 0
        assert torch.equal(value[mine:], clean[name][mine:]), name
        assert value[:mine].isnan().any(), name


@BY_ROWS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_poison_in_one_slot_leaves_the_other_slots_of_the_row(dtype: torch.dtype, case: Case) -> None:
    v = make(case, (dtype,) * 3)
    clean, got = every_op(v), every_op({**v, "a1": poison(v["a1"], 1)})  # id 4, slot 1 of group 1
    rows = slice(case.sizes[0], sum(case.sizes[:2]))
    assert got["s"][rows, 1].isnan().any()
    assert torch.equal(got["s"][rows, 0], clean["s"][rows, 0])
    assert torch.equal(got["db"][1], clean["db"][1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_infinity_does_not_turn_into_nan(dtype: torch.dtype) -> None:
    """At the end of an odd number of terms, where half a pair is padded."""
    v = make(Case("", 5, 7, 3, (1, 9), ((0, 3), (1, -1))), (dtype,) * 3)
    for name, last in (("x", (-1, -1)), ("y", (0, -1)), ("a", (0, -1, -1)), ("a1", (0, 0, 0)), ("weight", (-1, 0))):
        v[name][last] = float("inf")
    with np.errstate(invalid="ignore"):
        got, want = every_op(v), oracle(v)
    for name in want:
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        assert torch.equal(got[name].nan_to_num(0.5), want[name].nan_to_num(0.5)), name


# Guarantee 2: batch invariance.


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_group_alone_has_the_bits_it_has_in_company(dtype: torch.dtype) -> None:
    case = Case("", 300, 45, 9, (5, 300, 0, 3, 140), ((0, -1), (1, 4), (2, 2), (-1, -1), (3, -1)))  # no adapter shared
    v = make(case, (dtype,) * 3)
    together = every_op(v)
    for g, size in enumerate(case.sizes):
        rows = slice(int(v["offsets"][g]), int(v["offsets"][g]) + size)
        part = {"x": v["x"][rows], "y": v["y"][rows], "ids": v["ids"][g : g + 1]}
        alone = every_op({**v, **part, "offsets": torch.tensor([0, size], dtype=torch.int32)})
        for name in ("s", "ds", "y", "linear", "dx"):
            assert torch.equal(alone[name], together[name][rows]), (g, name)
        for n in {n for n in case.ids[g] if n >= 0 and size}:
            assert torch.equal(alone["da"][n], together["da"][n]), (g, n)
            assert torch.equal(alone["db"][n], together["db"][n]), (g, n)


def test_a_row_has_the_same_bits_at_every_place_in_a_tile() -> None:
    v = make(Case("", 100, 70, 8, (20,), ((0, 1, 3),)))
    whole = every_op(v)
    for t in range(20):
        row = {"x": v["x"][t : t + 1], "y": v["y"][t : t + 1], "offsets": torch.tensor([0, 1], dtype=torch.int32)}
        alone = every_op({**v, **row})
        for name in ("s", "ds", "y", "linear", "dx"):
            assert torch.equal(alone[name][0], whole[name][t]), (t, name)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tiles_of_every_size(dtype: torch.dtype) -> None:
    """Up to two tiles of rows, by every remainder of the panels of a strip: each a corner of one large product."""
    v = make(Case("", 5, 290, 3, (18,), ((0, 4),)), (dtype,) * 3)
    s, want = every_op(v)["s"], oracle(v)["linear"]
    for O in (1, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 80, 96, 97, 112, 128, 129, 160, 256, 290):
        b, b1, weight, bias = v["b"][:, :, :O].contiguous(), v["b1"][:, :, :O].contiguous(), v["weight"][:O], v["bias"]
        for rows in range(1, 19):
            for w in (weight, native.pack(weight)):
                got = native.linear(v["x"][:rows], w, bias, s[:rows], b, b1, v["ids"], None, O, False)
                assert torch.equal(got, want[:rows, :O]), (rows, O, w.dim())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_lies_between_rows_is_left_alone(dtype: torch.dtype) -> None:
    v = make(Case("", 30, 40, 4, (2, 7), ((0, 3), (1, -1))), (dtype,) * 3)
    wide = torch.full((9, 50), 3.0, dtype=dtype)
    wide[:, 3:43] = v["y"]
    s = native.shrink(v["x"], v["a"], v["a1"], v["ids"], v["offsets"], None, 1.0)
    native.expand_(wide[:, 3:43], s, v["b"], v["b1"], v["ids"], v["offsets"])
    native.expand_(v["y"], s, v["b"], v["b1"], v["ids"], v["offsets"])
    assert torch.equal(wide[:, 3:43], v["y"])
    assert (wide[:, :3] == 3).all()
    assert (wide[:, 43:] == 3).all()


def test_a_row_without_a_live_slot_is_not_touched() -> None:
    y = torch.full((3, 40), -0.0)
    ids, offsets = torch.tensor([[-1, 9], [0, -1]], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    native.expand_(y, torch.zeros(3, 2, 4), torch.ones(1, 4, 40), None, ids, offsets)
    assert y[:2].signbit().all()  # -0 + 0 is +0
    assert not y[2].signbit().any()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


LARGE = Case("above the grain: threads take part", 256, 256, 32, (260, 100, 1, 199), ((0, 1), (2, -1), (3, 3), (4, 0)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [LARGE, *STRIPS], ids=lambda case: case.why)
def test_threads_change_no_bit(case: Case, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Below the grain too: rows and panels of a task are chosen by the number of threads."""
    v = make(case, (dtype,) * 3)
    results = []
    for count in (1, 2, 3, 4, 16):
        threads(count)
        results.append(every_op(v))
    for other in results[1:]:
        same(other, results[0])


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch has no OpenMP team to join")
def test_the_team_joined_is_torchs() -> None:
    assert os.path.exists(native.build_info()["threads"])


# The weight, plain, packed and transposed.


PLAIN = [Case(f"{O} x {K}", K, O, 4, (9, 4), ((0, 1), (-1, 3))) for O, K in ((31, 7), (32, 32), (33, 257), (290, 40))]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *EDGES, *PLAIN], ids=lambda case: case.why)
def test_plain_packed_and_transposed_weights_agree(dtype: torch.dtype, case: Case) -> None:
    v = make(case, (dtype,) * 3)
    (O, K), table, drop = v["weight"].shape, (v["ids"], v["offsets"]), v["drop"]
    packed = native.pack(v["weight"])
    assert torch.equal(packed, reference.pack(v["weight"]))
    assert torch.equal(reference.unpack(packed, O, K), v["weight"])

    plain = every_op(v)
    y_args = (v["bias"], plain["s"], v["b"], v["b1"], *table, O, False, drop)
    assert torch.equal(native.linear(v["x"], packed, *y_args), plain["linear"])
    dx_args = (None, plain["ds"], v["a"], v["a1"], *table)
    assert torch.equal(native.linear(v["y"], packed, *dx_args, O, True, drop), plain["dx"])
    turned = v["weight"].T.contiguous()
    assert torch.equal(native.linear(v["y"], turned, *dx_args, K, False, drop), plain["dx"])
    assert torch.equal(native.linear(v["y"], native.pack(turned), *dx_args, K, False, drop), plain["dx"])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *EDGES], ids=lambda case: case.why)
def test_a_layer_has_the_bits_of_its_two_calls(dtype: torch.dtype, case: Case) -> None:
    """Dropout is of the shrink's alone."""
    v = make(case, (dtype,) * 3)
    out, table, scales = len(v["weight"]), (v["ids"], v["offsets"]), (v["scales"], 1.0)
    s = native.shrink(v["x"], v["a"], v["a1"], *table, *scales, v["drop"])
    for weight in (v["weight"], native.pack(v["weight"])):
        base = (v["x"], weight, v["bias"])
        y = native.linear(*base, s, v["b"], v["b1"], *table, out, False)
        got = native.layer(*base, v["a"], v["a1"], v["b"], v["b1"], *table, *scales, out, v["drop"])
        same({"y": got[0], "s": got[1]}, {"y": y, "s": s})


def test_gradients_of_some_adapters_only() -> None:
    v = make(MIXED)
    s = native.shrink(v["x"], v["a"], v["a1"], v["ids"], v["offsets"], None, 1.0)
    whole = native.outer(s, v["y"], v["ids"], v["offsets"], 0, 5, torch.float32)
    assert torch.equal(native.outer(s, v["y"], v["ids"], v["offsets"], 3, 2, torch.float32), whole[3:])
    assert torch.count_nonzero(whole[2]) == 0  # named by an empty group only
    assert torch.equal(native.outer(s, v["y"], v["ids"], v["offsets"], 7, 2, torch.float32), torch.zeros(2, 9, 45))


# Guarantee 6: the error rule, against fp64.


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("K", [64, 4096])
def test_error_against_fp64(dtype: torch.dtype, K: int) -> None:
    v = make(Case("", K, 96, 16, (70,), ((0, 3),)), (dtype,) * 3)
    v["weight"] /= K**0.5
    v["a"], v["a1"] = v["a"] / K**0.5, v["a1"] / K**0.5
    got = every_op({**v, "scales": torch.ones(5)})

    def layer(x: Tensor, w: Tensor, bias: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.linear(x, w, bias) + sum((x @ a.T) @ b for a, b in pairs)

    args = (v["x"], v["weight"], v["bias"], (v["a"][0], v["b"][0]), (v["a1"][0], v["b1"][0]))
    wide = [tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() for x in args]
    exact = layer(*wide)
    terms = sum((wide[0].norm(dim=1).max() * a.norm() * b.norm()).item() for a, b in wide[3:])
    assert_error([got["linear"]], [layer(*args)], [exact], terms)
    exact_s = wide[0] @ wide[3][0].T
    terms = (wide[0].norm(dim=1).max() * wide[3][0].norm()).item()
    assert_error([got["s"][:, 0]], [v["x"] @ v["a"][0].T], [exact_s], terms)


# What it does not do.


def test_unsupported_is_said() -> None:
    v = make(MIXED)
    double = v["x"].double()
    with pytest.raises(NotImplementedError, match="float32, float16 and bfloat16"):
        native.shrink(double, v["a"], None, v["ids"], v["offsets"], None, 1.0)
    with pytest.raises(NotImplementedError, match="not meta"):
        native.pack(v["weight"].to("meta"))


def test_old_cuda_devices_are_refused(monkeypatch) -> None:
    u = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"))
    monkeypatch.setattr(native, "CUDA", True)
    for capability in ((7, 5), (8, 0), (9, 0)):
        native._capability.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            if capability >= (8, 0):
                native._require("shrink", u)
                continue
            with pytest.raises(NotImplementedError, match=r"8\.0 and newer, not 7\.5"):
                native._require("shrink", u)
    native._capability.cache_clear()


def on_cuda(x: Tensor | None) -> Tensor | None:
    """Copy a tensor with the strides that it has: ``cuda()`` alone would close the gaps between its rows."""
    if x is None:
        return None
    behind = x.untyped_storage().nbytes() // x.element_size()
    storage = x.as_strided((behind,), (1,), 0).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and native.CUDA), reason="no CUDA device, or built without CUDA")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_cuda_shrink_has_the_bits_of_the_cpu(case: Case) -> None:
    """In fp32 only: tensor cores add in an order of their own, and the error rule holds halves (test_guarantees)."""
    v = make(case)
    want = native.shrink(v["x"], v["a"], v["a1"], v["ids"], v["offsets"], v["scales"], 1.0)
    on = {name: on_cuda(value) for name, value in v.items()}
    assert on["x"].stride() == v["x"].stride()
    got = native.shrink(on["x"], on["a"], on["a1"], on["ids"], on["offsets"], on["scales"], 1.0)
    assert torch.equal(got.cpu(), want)
