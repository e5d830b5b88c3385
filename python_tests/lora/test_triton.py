"""The Triton kernels shrink, expand_ and outer: their order of sums bit by bit, their routing, their masks.

Without a GPU they run in Triton's interpreter, with the products of ``interpreted``. The guarantees of every backend
are in ``test_guarantees``, the base product with its adapters in ``test_triton_linear``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import native_cases
import pytest
import torch
from guarantees import GPU
from native_cases import CASES, every_op, make, oracle, same
from torch import Tensor

from s3t_ext.lora.kernels import dropout, native, serves
from s3t_ext.lora.kernels.triton import entry

triton = pytest.importorskip("triton", reason=entry.WHY_NOT)
launching, shrinking, expanding, outering, routing, tiles = (
    importlib.import_module(f"s3t_ext.lora.kernels.triton.{name}")
    for name in ("launch", "shrink", "expand", "outer", "routing", "tiles")
)
tl = triton.language
PLACES = [
    pytest.param(device, dtype, id=f"{device}-{dtype}", marks=GPU if device == "cuda" else ())
    for device in ("cpu", "cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if serves("triton", "shrink", device, dtype)
]
everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)
on_cpu = pytest.mark.skipif(
    not serves("triton", "shrink", "cpu", torch.float32), reason="the kernels run on a device here, not interpreted"
)


# The order of the sums.


@on_cpu
@pytest.mark.parametrize(
    ("case", "dtype", "pools"),
    [(case, torch.float32, "same") for case in CASES]
    + [(case, torch.float16, ("same", "mixed")[n % 2]) for n, case in enumerate(CASES)],
    ids=lambda value: getattr(value, "why", str(value)),
)
def test_bits_are_those_of_the_contract(case, dtype, pools, monkeypatch) -> None:
    ours = SimpleNamespace(shrink=entry.shrink, expand_=entry.expand_, outer=entry.outer, linear=native.linear)
    monkeypatch.setattr(native_cases, "native", ours)
    monkeypatch.setattr(native_cases, "BLOCK", launching.CHUNK[dtype.itemsize])
    v = make(case, (dtype, torch.float32 if pools == "mixed" else dtype, dtype))
    got, want = every_op(v), oracle(v)
    same(got, {name: want[name] for name in ("s", "ds", "y", "da", "db")})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_fp32_has_the_bits_of_the_cpu_on_a_device(case, monkeypatch) -> None:
    v = make(case)
    want = every_op(v)
    monkeypatch.setattr(native_cases, "native", entry)
    got = every_op({name: None if t is None else t.cuda() for name, t in v.items()})
    same({name: t.cpu() for name, t in got.items()}, want)


LONG = native_cases.Case("long", 300, 40, 9, (40, 150, 0, 3), ((0, -1), (1, 4), (2, 2), (3, 1)))


def ops(v: dict, drop: dropout.Dropout | None = None) -> dict[str, Tensor]:
    """Run shrink, expand_ and outer once."""
    table = (v["ids"], v["offsets"])
    s = entry.shrink(v["x"], v["a"], v["a1"], *table, v["scales"], 1.0, drop)
    y = v["y"].clone()
    entry.expand_(y, s, v["b"], v["b1"], *table, drop)
    return {"s": s, "y": y, "da": entry.outer(s, v["x"], *table, 0, 5, torch.float32, drop)}


def on(device: str, v: dict) -> dict:
    return {name: None if t is None else t.to(device) for name, t in v.items()}


def few_multiprocessors(monkeypatch, count: int) -> list[str]:
    """Pretend to a number of multiprocessors, and note which kernels run."""
    ran: list[str] = []

    def launch(kernel, grid, *args, **settings):
        ran.append(kernel.__name__)
        launching.launch(kernel, grid, *args, **settings)

    for file in (shrinking, outering):
        monkeypatch.setattr(file, "chip", lambda device: launching.chip(device)._replace(multiprocessors=count))
        monkeypatch.setattr(file, "launch", launch)
    return ran


@everywhere
def test_sharing_a_sum_changes_no_bit(device, dtype, monkeypatch) -> None:
    v = on(device, make(LONG, (dtype,) * 3))
    monkeypatch.setitem(launching.CHUNK, dtype.itemsize, 128)
    ran = few_multiprocessors(monkeypatch, 1 << 20)
    many = ops(v)
    assert ran == ["shrink_kernel", "finish_kernel", "outer_chunk_kernel", "outer_kernel"]
    ran = few_multiprocessors(monkeypatch, 1)
    same(ops(v), many)
    assert ran == ["shrink_kernel", "outer_kernel"]


@everywhere
def test_tiles_change_no_bit(device, dtype, monkeypatch) -> None:
    case = replace(native_cases.MIXED, sizes=(5, 66, 0, 3, 20))  # past every tile of rows
    v = on(device, make(case, (dtype,) * 3))
    drop = dropout.Dropout(0.2, *keys(v), 1)
    for masks in (None, drop._replace(seeds=drop.seeds.to(device), rows=drop.rows.to(device))):
        first = None
        lines = {op: [] for op in ("shrink", "expand_", "outer")}
        for (op, _, size), table in tiles.TABLE.items():
            if op in lines and size == dtype.itemsize:
                lines[op] += [line for _, _, line in table if line not in lines[op]]
        for i in range(max(map(len, lines.values()))):
            for file, op in ((shrinking, "shrink"), (expanding, "expand_"), (outering, "outer")):
                line = lines[op][i % len(lines[op])]
                monkeypatch.setattr(file, "tile", lambda *_, line=line: line)
            got = ops(v, masks)
            first = first or got
            same(got, first)


@pytest.mark.parametrize(("rows", "groups", "count"), [(9, 1, 70000), (70000, 70000, 1)], ids=["adapters", "groups"])
def test_what_may_be_large_lies_along_x(rows, groups, count, monkeypatch) -> None:
    """The other two edges of a grid end at 65535."""
    grids = []
    monkeypatch.setattr(outering, "launch", lambda kernel, grid, *args, **settings: grids.append(grid))
    monkeypatch.setattr(outering, "chip", lambda device: launching.Chip(90, 132))
    with torch.device("meta"):
        s, u = torch.empty(rows, 1, 8), torch.empty(rows, 20)
        ids, offsets = torch.empty(groups, 1, dtype=torch.int32), torch.empty(groups + 1, dtype=torch.int32)
    entry.outer(s, u, ids, offsets, 0, count, torch.float32)
    assert len(grids) == 1 + (count == 1)
    assert max(grids[0]) >= 70000
    assert all(edge <= 65535 for grid in grids for edge in grid[1:])


# Routing.


@triton.jit
def find_tiles(offsets, groups, rows, found, SIZE: tl.constexpr):
    tile = tl.program_id(0)
    group, start, end = routing.tile_in_group(offsets, groups, rows, tile, SIZE)
    tl.store(found + 3 * tile, group)
    tl.store(found + 3 * tile + 1, start)
    tl.store(found + 3 * tile + 2, end)


@triton.jit
def find_groups(offsets, groups, found):
    tl.store(found + tl.program_id(0), routing.group_of(offsets, groups, tl.program_id(0)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("groups", [1, 2, 75, 257, 600])
def test_tiles_cover_each_row_once_in_its_group(groups, device) -> None:
    if not serves("triton", "shrink", device, torch.float32):
        pytest.skip("the kernels run on a device here")
    random = torch.Generator().manual_seed(groups)
    sizes = torch.randint(0, 40, (groups,), generator=random) * (torch.rand(groups, generator=random) * groups < 12)
    sizes[groups // 2] = 33
    edges = [0, *sizes.cumsum(0).tolist()]
    rows, offsets = edges[-1], torch.tensor(edges, dtype=torch.int32, device=device)
    owners = [g for g in range(groups) for _ in range(edges[g], edges[g + 1])]
    found = torch.zeros(launching.row_tiles(rows, groups, offsets, 16), 3, dtype=torch.int32, device=device)
    find_tiles[(len(found),)](offsets, groups, rows, found, 16)
    covered = sorted((t, g) for g, start, end in found.tolist() for t in range(start, end))
    assert covered == list(enumerate(owners))
    assert max(end - start for _, start, end in found.tolist()) <= 16
    own = torch.zeros(rows, dtype=torch.int32, device=device)
    find_groups[(rows,)](offsets, groups, own)
    assert own.tolist() == owners


# Dropout.


def keys(v: dict) -> tuple[Tensor, Tensor]:
    """Seeds and row keys of all 64 bits."""
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randint(-(2**63), 2**63 - 1, (n,), generator=draw) for n in (len(v["ids"]), len(v["x"])))


@everywhere
@pytest.mark.parametrize("columns", [36, 150])
def test_masks_are_those_of_the_definition(device, dtype, columns) -> None:
    """Unit adapters, and unit rows of s, show the mask itself."""
    rows, slots, adapters = 23, 3, 4
    ids = torch.tensor([[0, 3, 2], [1, 1, 1], [3, 1, -1]], dtype=torch.int32)
    offsets = torch.tensor([0, 20, 20, 23], dtype=torch.int32)
    by_row = ids[torch.tensor([0] * 20 + [2] * 3)]  # (T, P)
    group = torch.tensor([0] * 20 + [2] * 3)  # (T,)
    x = torch.ones(rows, columns)
    drop = dropout.Dropout(0.6, *keys({"ids": ids, "x": x}), 1)
    keep = dropout.keep(drop, by_row, group, columns) & (by_row >= 0)[..., None]  # (T, P, D)
    assert 0.3 < keep[:20, 1].float().mean() < 0.5
    assert keep[:20, 0].all()  # adapter 0 is frozen
    unit = torch.eye(columns).expand(adapters, -1, -1).contiguous()  # (N, D, D)
    x, unit, ids, offsets = x.to(device, dtype), unit.to(device, dtype), ids.to(device), offsets.to(device)
    drop = drop._replace(seeds=drop.seeds.to(device), rows=drop.rows.to(device))
    s = entry.shrink(x, unit, None, ids, offsets, None, 1.0, drop)  # (T, P, D)
    assert torch.equal(s.cpu().bool(), keep)
    y = x.new_zeros(rows, columns)
    entry.expand_(y, x.new_ones(rows, slots, columns), unit, None, ids, offsets, drop)
    assert torch.equal(y.cpu().long(), keep.sum(1))
    s = x.new_zeros(rows, slots, rows)  # s[t,p] = unit vector t
    s[torch.arange(rows), :, torch.arange(rows)] = 1
    dw = entry.outer(s, x, ids, offsets, 0, adapters, torch.float32, drop)  # (N, T, D)
    want = torch.stack([(keep & (by_row == n)[..., None]).sum(1) for n in range(adapters)])  # (N, T, D)
    assert torch.equal(dw.cpu().long(), want)


# The rest.


@everywhere
def test_nothing_is_read_for_a_dead_slot(device, dtype) -> None:
    """Neither the first nor the last adapter, where a careless clamp of an id would end up."""
    v = make(
        native_cases.Case("dead", 30, 20, 5, (4, 0, 3, 2), ((-1, 2), (0, 4), (2, -7), (5, 2**31 - 1))), (dtype,) * 3
    )
    clean, sick = ops(on(device, v)), dict(v)
    for name, dead in (("a", [0, 1]), ("b", [0, 1]), ("a1", [0, 1]), ("b1", [0, 1])):
        sick[name] = v[name].clone()
        sick[name][dead] = torch.nan
    same(ops(on(device, sick)), clean)
    assert not clean["da"][[0, 1, 3, 4]].any()


@everywhere
def test_rows_without_a_live_slot_are_left_alone(device, dtype) -> None:
    y = torch.full((5, 8), -0.0, dtype=dtype, device=device)  # adding zero would make it +0
    ids = torch.tensor([[-1, 7], [0, -1]], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 4, 5], dtype=torch.int32, device=device)
    entry.expand_(y, y.new_zeros(5, 2, 3), y.new_ones(1, 3, 8), None, ids, offsets)
    assert y.signbit().all(1).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("capabilities", "served"), [([(7, 5)], False), ([(8, 0)], True), ([(9, 0), (7, 0)], False), ([], True)], ids=str
)
def test_devices_below_capability_8_are_not_served(capabilities, served, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    entry._modern.cache_clear()
    try:
        assert entry.serves("cuda", torch.float16) == served
    finally:
        entry._modern.cache_clear()


def test_importing_the_table_of_backends_imports_no_triton() -> None:
    code = "import sys, s3t_ext.lora.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
