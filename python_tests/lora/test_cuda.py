"""The CUDA kernels of shrink, expand_ and outer, run by the emulator: every guarantee; in fp32 the bits of the CPU.

What the emulator cannot show: the sums inside a tensor core (it rounds 16 products once) and anything about time.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import cuda_emulator
import guarantees as g
import pytest
import torch
from native_cases import CASES, MIXED, POOLS, TYPES, Case, make, same
from torch import Tensor

from s3t_ext.lora.kernels import native
from s3t_ext.lora.kernels.dropout import Dropout

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no g++ to compile the emulator with")

# Rows and ranks that fill whole tiles of every size and leave remainders; K and O that do and do not allow 16 bytes.
STACK = Case("four slots, tiles of 32 rows", 1104, 136, 16, (70, 0, 33), ((0, 1, -1, 4), (2, 3, 3, 1), (0, 1, 2, 3)))
ROUTING = Case(
    "75 uneven groups, one slot",
    520,
    144,
    8,
    tuple(i * 7 % 23 for i in range(75)),
    tuple((i % 6 - 1,) for i in range(75)),
)
TALL = Case("one slot, tiles of 64 rows; many chunks of rows", 272, 80, 8, (700, 65), ((1,), (3,)))
DEEP = Case("more blocks of the sum than warps", 2600, 40, 4, (9, 3), ((0, 1), (2, -1)))
ALIGNED = replace(MIXED, why="mixed, 16 bytes at a time", K=328, O=72, r=8)
ODD = replace(MIXED, why="mixed, element by element", K=70, O=45, r=9)
LARGE = [STACK, ROUTING, TALL, DEEP]

by_case = pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.why)
by_layout = pytest.mark.parametrize("case", [ALIGNED, ODD], ids=lambda case: case.why)
by_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
dropping = pytest.mark.parametrize("drops", [False, True], ids=["plain", "dropout"])


@pytest.fixture(scope="module")
def module(compiled_once) -> ModuleType:
    return cuda_emulator.build(compiled_once("cuda_emulator"))


def inputs(case: Case, types: tuple[torch.dtype, ...]) -> dict:
    v = make(case, types)
    for name in ("a", "a1"):
        if v[name] is not None:
            v[name] = (v[name] / case.K**0.5).to(v[name].dtype)
    return v


def dropout(case: Case) -> Dropout:
    random = torch.Generator().manual_seed(3)
    keys = [torch.randint(-(2**62), 2**62, (n,), generator=random) for n in (len(case.sizes), sum(case.sizes))]
    return Dropout(0.3, *keys, case.N - 1)


def three_ops(v: dict, drop: Dropout | None = None) -> dict[str, Tensor]:
    """Run shrink, expand_ and outer; the last two on an s that is not the first one's result."""
    table = (v["ids"], v["offsets"])
    adapters = len(v["scales"])
    random = torch.Generator().manual_seed(1)
    shape = (len(v["x"]), v["ids"].shape[1], v["a"].shape[1])
    given = v.get("s", torch.randn(shape, generator=random).to(v["x"].dtype))  # (T, P, r)
    y = v["y"].clone()
    native.expand_(y, given, v["b"], v["b1"], *table, drop)
    return {
        "s": native.shrink(v["x"], v["a"], v["a1"], *table, v["scales"], 1.0, drop),
        "y": y,
        "da": native.outer(given, v["x"], *table, 0, adapters, torch.float32, drop),
        "db": native.outer(given, v["y"], *table, min(1, adapters), max(adapters - 1, 0), v["y"].dtype, drop),
    }


@dropping
@by_case
def test_fp32_has_the_bits_of_the_cpu(module, case, drops) -> None:
    v = inputs(case, (torch.float32,) * 3)
    drop = dropout(case) if drops else None
    want = three_ops(v, drop)
    for seed, capability in enumerate((9, 8)):
        with cuda_emulator.emulated(module, seed, capability):
            same(three_ops(v, drop), want)


HALVES = [types for types in POOLS if types[0] != torch.float32]


@pytest.mark.parametrize("types", HALVES, ids=str)
@by_case
def test_half_types_differ_from_the_cpu_by_rounding(module, case, types) -> None:
    drops = ([*CASES, *LARGE].index(case) + HALVES.index(types)) % 2 == 0  # taking turns with each of both
    v = inputs(case, types)
    drop = dropout(case) if drops else None
    want = three_ops(v, drop)
    with cuda_emulator.emulated(module):
        got = three_ops(v, drop)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        if value.numel():
            exact = value.double()
            slack = torch.finfo(value.dtype).eps * exact.abs() + 1e-5 * exact.abs().max()
            assert ((got[name].double() - exact).abs() <= slack).all(), name


both_ops = pytest.mark.parametrize("base", [False, True], ids=["masked_lora", "masked_lora_linear"])


@by_type
@pytest.mark.parametrize("shape", g.ALL_SHAPES, ids=str)
def test_error_rule(module, dtype, shape) -> None:
    with cuda_emulator.emulated(module):
        g.error_rule("native", dtype, dtype, shape, base=False)


@by_type
@both_ops
@pytest.mark.parametrize("guarantee", [g.dead_is_unread, g.live_elsewhere_stays, g.batch_invariant])
def test_guarantee(module, dtype, base, guarantee) -> None:
    with cuda_emulator.emulated(module):
        guarantee("native", dtype, base)


# --- what depends on the tile, on the layout and on the device --------------------------------------------------------


@by_type
@pytest.mark.parametrize("case", [*LARGE, ODD], ids=lambda case: case.why)
def test_no_bit_follows_the_device(module, dtype, case) -> None:
    drops = ([*LARGE, ODD].index(case) + TYPES.index(dtype)) % 2 == 0  # taking turns with each of both
    v = inputs(case, (dtype,) * 3)
    drop = dropout(case) if drops else None
    with cuda_emulator.emulated(module, 0, 8, 1):
        want = three_ops(v, drop)
    for seed, multiprocessors in enumerate((16, 132, 4000)):  # clusters of 1 to 8 blocks, one warp's strips or eight's
        with cuda_emulator.emulated(module, seed, 9, multiprocessors):
            same(three_ops(v, drop), want)


@by_type
@dropping
@pytest.mark.parametrize("case", [STACK, TALL, ALIGNED], ids=lambda case: case.why)
def test_a_group_alone_has_the_bits_it_has_in_company(module, dtype, case, drops) -> None:
    case = replace(case, M=0, N=sum(len(row) for row in case.ids))  # no adapter is shared
    case = replace(case, ids=tuple(tuple(g * len(row) + p for p in range(len(row))) for g, row in enumerate(case.ids)))
    v = inputs(case, (dtype,) * 3)
    drop = dropout(case) if drops else None
    with cuda_emulator.emulated(module):
        together = three_ops(v, drop)
        for group, size in enumerate(case.sizes):
            first = int(v["offsets"][group])
            for start, count in {(0, size), (size // 2, min(1, size))}:  # the group, and one row of it
                rows = slice(first + start, first + start + count)
                part = {"x": v["x"][rows], "y": v["y"][rows], "ids": v["ids"][group : group + 1]}
                mine = drop and drop._replace(seeds=drop.seeds[group : group + 1], rows=drop.rows[rows])
                offsets = torch.tensor([0, count], dtype=torch.int32)
                alone = three_ops({**v, **part, "offsets": offsets}, mine)
                assert torch.equal(alone["s"], together["s"][rows])
                with_s = _expanded(v, part, offsets, mine, rows)
                assert torch.equal(with_s, _expanded(v, v, v["offsets"], drop, slice(None))[rows])


def _expanded(v: dict, part: dict, offsets: Tensor, drop: Dropout | None, rows: slice) -> Tensor:
    random = torch.Generator().manual_seed(2)
    given = torch.randn(len(v["x"]), v["ids"].shape[1], v["a"].shape[1], generator=random).to(v["x"].dtype)[rows]
    y = part["y"].clone()
    native.expand_(y, given.contiguous(), v["b"], v["b1"], part["ids"], offsets, drop)
    return y


@by_type
@by_layout
def test_chunks_count_from_the_first_row_of_their_group(module, dtype, case) -> None:
    case = replace(case, sizes=(5, 300, 0, 3, 140), ids=((0,), (1,), (2,), (3,), (-1,)))
    v = inputs(case, (dtype,) * 3)
    given = torch.randn(len(v["x"]), 1, case.r).to(dtype)
    with cuda_emulator.emulated(module):
        whole = native.outer(given, v["x"], v["ids"], v["offsets"], 0, 5, torch.float32)
        rows = slice(5, 305)
        alone = native.outer(given[rows], v["x"][rows], v["ids"][1:2], None, 1, 1, torch.float32)
    assert torch.equal(whole[1], alone[0])
    assert not whole[[2, 4]].any()


@by_type
@by_layout
@dropping
def test_poison_stays_where_it_is(module, dtype, case, drops) -> None:
    case = replace(case, ids=((0, -1), (1, 99), (2, 2), (-1, -1), (3, 1)))  # 2 is named by an empty group, 4 by nobody
    v = inputs(case, (dtype,) * 3)
    drop = dropout(case) if drops else None
    starts = [0, *torch.tensor(case.sizes).cumsum(0).tolist()]

    def sick(names: tuple[str, ...], index: object) -> dict:
        found = dict(v)
        for name in names:
            found[name] = v[name].clone()
            found[name][index] = float("nan")
        return found

    with cuda_emulator.emulated(module):
        clean = three_ops(v, drop)
        for names, index in ((("a", "b"), 2), (("a1", "b1"), 1)):  # dead ones
            same(three_ops(sick(names, index), drop), clean)
        got = three_ops(sick(("a", "b"), 0), drop)  # a live one: group 0's alone
        same({k: got[k][5:] for k in ("s", "y")}, {k: clean[k][5:] for k in ("s", "y")})
        assert got["s"][:5].isnan().any()
        assert got["y"][:5].isnan().any()
        got = three_ops(sick(("a1",), 0), drop)  # slot 0 of the last group; slot 1 stays
        same({"s": got["s"][:, 1]}, {"s": clean["s"][:, 1]})
        for group, named in ((0, [0]), (1, [1]), (4, [1, 3])):
            rows = slice(starts[group], starts[group + 1])
            got = three_ops(sick(("x", "y"), rows), drop)
            others = torch.ones(len(v["x"]), dtype=torch.bool)
            others[rows] = False
            same({k: got[k][others] for k in ("s", "y")}, {k: clean[k][others] for k in ("s", "y")})
            healthy = [n for n in range(5) if n not in named]
            assert torch.equal(got["da"][healthy], clean["da"][healthy])
            assert got["da"][named].isnan().any()


@by_type
@by_layout
def test_a_row_without_a_live_slot_is_not_touched(module, dtype, case) -> None:
    v = inputs(case, (dtype,) * 3)
    dead = slice(135, 138)  # the rows of the fourth group: its slots are all dead
    v["y"][dead] = -0.0
    with cuda_emulator.emulated(module):
        y = three_ops(v)["y"]
    assert torch.signbit(y[dead]).all()


@by_type
@by_layout
def test_infinity_does_not_become_nan(module, dtype, case) -> None:
    v = inputs(replace(case, sizes=(5, 130, 0, 3, 35)), (dtype,) * 3)  # 35 rows and 9 ranks leave remainders of a step
    last = (slice(None), -1)
    v["s"] = torch.randn(len(v["x"]), 2, case.r).to(dtype)  # (T, P, r)
    for name, index in (("x", last), ("x", 172), ("b", last), ("b", (slice(None), 0)), ("s", (..., -1)), ("s", 172)):
        sick = {**v, name: v[name].clone()}
        sick[name][index] = torch.inf
        want = three_ops(sick)
        with cuda_emulator.emulated(module):
            got = three_ops(sick)
        for key, value in want.items():
            assert torch.equal(got[key].isnan(), value.isnan()), (name, key)
            assert torch.equal(got[key].isinf(), value.isinf()), (name, key)


@by_type
@dropping
@pytest.mark.parametrize("case", [*CASES, ALIGNED, ODD], ids=lambda case: case.why)
def test_nothing_outside_is_touched_and_all_inside_is_written(module, dtype, case, drops, monkeypatch) -> None:
    v = inputs(replace(case, strided=False), (dtype,) * 3)
    want = three_ops(v, dropout(case) if drops else None)
    near_end = {name: x if x is None else cuda_emulator.guarded(x) for name, x in v.items()}
    drop = dropout(case) if drops else None
    if drop is not None:
        drop = drop._replace(seeds=cuda_emulator.guarded(drop.seeds), rows=cuda_emulator.guarded(drop.rows))

    def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return cuda_emulator.guarded(torch.full(shape, float("nan"), dtype=dtype or like.dtype))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    with cuda_emulator.emulated(module):
        got = three_ops(near_end, drop)
    for name, value in want.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-2, atol=1e-2 * len(v["x"]) ** 0.5), name


def test_a_failed_launch_is_an_error(module) -> None:
    v = inputs(MIXED, (torch.float32,) * 3)
    short = cuda_emulator.guarded(torch.zeros(1, 2, MIXED.r))  # s of one row where y has many
    with cuda_emulator.emulated(module), pytest.raises(RuntimeError, match="outside global memory"):
        native.expand_(v["y"].clone(), short, v["b"], v["b1"], v["ids"], v["offsets"])
