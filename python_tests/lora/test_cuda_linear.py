"""The CUDA kernels of ``linear`` and ``layer`` (csrc/cuda/linear*), run by the emulator: every tile, one set of bits.

Which kernel runs follows from type, rows, alignment and compute capability; ``ROWS`` reaches each of them. The tensor
core of the emulator adds 16 products exactly; fp32 has the bits of the CPU kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import cuda_emulator
import guarantees as g
import pytest
import torch
from numerics import SHAPES, TYPES, Shape, assert_error, make
from torch import Tensor

from s3t_ext.lora.kernels import native, reference
from s3t_ext.lora.kernels.dropout import Dropout

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no g++ to build the emulator with")

ROWS = (1, 8, 16, 32, 64, 130)  # the last row of each tile, and three tiles
HALVES = (torch.float16, torch.bfloat16)
LONG = Shape((3, 0, 9), 2600, 40, 16, 5, ((0, 1), (2, -1), (-1, 4)), reason="more chunks than the ring holds")
WIDE = Shape((9, 31, 2), 64, 200, 8, 5, ((0, 1), (2, -1), (4, 3)), reason="42 rows, seven tiles of outputs")
DEEP = Shape((2, 3), 72, 40, 140, 14, (tuple(range(12)), tuple(range(13, 1, -1))), reason="12 slots of two pieces")
ALL = (*SHAPES, g.MANY, g.UNEVEN, LONG, WIDE, DEEP)

both_ways = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(scope="module")
def module(compiled_once) -> ModuleType:
    return cuda_emulator.build(compiled_once("cuda_emulator"))


@dataclass
class Call:
    """Arguments of ``linear``; every input ends at a page that must not be touched."""

    x: Tensor  # (T, K)
    weight: Tensor  # (O, K), transposed (K, O)
    bias: Tensor | None  # (O,)
    s: Tensor  # (T, P, r)
    w: Tensor  # (N, r, O)
    w1: Tensor | None
    ids: Tensor  # (G, P)
    offsets: Tensor | None  # (G + 1,)
    transposed: bool = False
    drop: Dropout | None = None

    def __post_init__(self) -> None:
        for name in ("x", "weight", "bias", "s", "w", "w1", "ids", "offsets"):
            value = getattr(self, name)
            if value is not None and value.is_contiguous():
                setattr(self, name, cuda_emulator.guarded(value))

    def cpu(self, impl=native) -> Tensor:
        width = self.weight.shape[0]
        return impl.linear(
            self.x, self.weight, self.bias, self.s, self.w, self.w1, self.ids, self.offsets, width, self.transposed,
            self.drop,
        )  # fmt: skip

    def cuda(self, module: ModuleType, **device: int) -> Tensor:
        with cuda_emulator.emulated(module, **device):
            return self.cpu()

    def exact(self) -> Tensor:
        pools = {n: getattr(self, n) for n in ("w", "w1") if getattr(self, n) is not None}
        rounded = {n: t.to(self.x.dtype).double() for n, t in pools.items()}
        wide = {n: getattr(self, n).double() for n in ("x", "weight", "s")}
        bias = None if self.bias is None else self.bias.double()
        return replace(self, **wide, **rounded, bias=bias).cpu(reference)

    def rows(self, keep: list[int], groups: list[int] | None = None) -> tuple[Call, list[int]]:
        """Give the call for some rows, by the groups that they lie in or by `groups`, and their order in it."""
        of = torch.bucketize(torch.arange(len(self.x)), self.offsets[1:].long(), right=True)
        groups = sorted({int(of[t]) for t in keep}) if groups is None else groups
        order = [t for n in groups for t in keep if of[t] == n]
        sizes = torch.tensor([0, *(sum(of[t] == n for t in keep) for n in groups)])
        drop = self.drop and self.drop._replace(seeds=self.drop.seeds[groups], rows=self.drop.rows[order])
        offsets = sizes.cumsum(0).to(torch.int32)
        return replace(self, x=self.x[order], s=self.s[order], ids=self.ids[groups], offsets=offsets, drop=drop), order


def draw(shape: Shape, dtype: torch.dtype, transposed: bool = False, pool: torch.dtype | None = None) -> Call:
    if transposed:  # the sum runs over shape.inputs either way
        shape = replace(shape, inputs=shape.outputs, outputs=shape.inputs)
    case = make(shape, dtype, pool)
    scale = shape.rank**-0.5
    s = torch.randn(len(case.x), case.ids.shape[1], shape.rank, generator=torch.Generator().manual_seed(1)) * scale
    if transposed:
        return Call(case.dy, case.weight, None, s.to(dtype), case.a, None, case.ids, case.offsets, True)
    return Call(case.x, case.weight, case.bias, s.to(dtype), case.b, None, case.ids, case.offsets)


def dropped(call: Call, first: int = 1) -> Call:
    draw = torch.Generator().manual_seed(3)
    seeds, rows = (torch.randint(-(2**62), 2**62, (n,), generator=draw) for n in (len(call.ids), len(call.x)))
    return replace(call, drop=Dropout(0.4, seeds, rows, first))


def shape_of(rows: int, inputs: int = 584, outputs: int = 72) -> Shape:
    """Five groups of which one is empty and one is a single row, in two slots of rank 8."""
    cuts = sorted({0, rows // 7, rows // 2, rows})
    sizes = (*(b - a for a, b in pairwise(cuts)), 0)
    table = ((0, 1), (2, -1), (-1, 3), (4, 4))[: len(sizes)]
    return Shape(sizes, inputs, outputs, 8, 5, table, reason=f"{rows} rows")


def close(got: Tensor, call: Call) -> None:
    """Guarantee 6, for one call: torch's error is that of a sum in fp32, rounded once."""
    exact = call.exact()
    terms = call.s.double().abs().sum(2).amax() * call.w.double().abs().amax() if call.s.numel() else 0
    assert_error([got], [exact.float().to(got.dtype)], [exact], float(terms))


@both_ways
@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_fp32_has_the_bits_of_the_cpu(module, shape, transposed, drop) -> None:
    call = draw(shape, torch.float32, transposed)
    call = dropped(call) if drop else call
    assert torch.equal(call.cuda(module), call.cpu())


@both_ways
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_error(module, shape, dtype, transposed) -> None:
    for case in (draw(shape, dtype, transposed, torch.float32), dropped(draw(shape, dtype, transposed))):
        close(case.cuda(module), case)


@both_ways
@every_type
def test_a_row_has_its_bits_in_every_batch(module, dtype, transposed) -> None:
    call = dropped(draw(shape_of(130), dtype, transposed), first=3)
    whole = call.cuda(module)
    assert torch.equal(whole, call.cuda(module, seed=5, capability=8)), "without clusters, in another order of blocks"
    for rows in ROWS:
        step = 130 // rows
        part, order = call.rows(list(range(0, step * rows, step)))
        assert torch.equal(whole[order], part.cuda(module)), rows
    moved, order = call.rows(list(range(130)), groups=[3, 1, 2, 0])
    assert torch.equal(whole[order], moved.cuda(module)), "groups in another order"


@both_ways
@every_type
@pytest.mark.parametrize("rows", [5, 16, 40])
def test_alignment_changes_no_bit(module, dtype, transposed, rows) -> None:
    call = draw(shape_of(rows), dtype, transposed)
    expected = call.cuda(module)

    def shifted(t: Tensor, stride: int) -> Tensor:
        return torch.zeros(t.shape[0], t.shape[1] + stride, dtype=t.dtype)[:, stride - 1 : -1].copy_(t)

    for stride in (1, 2, 16):
        assert torch.equal(expected, replace(call, x=shifted(call.x, stride)).cuda(module)), stride
    weight = torch.zeros(call.weight.numel() + 1, dtype=dtype)[1:].view_as(call.weight).copy_(call.weight)
    odd = replace(call, x=shifted(call.x, 1))
    odd.weight = weight
    assert torch.equal(expected, odd.cuda(module))


@both_ways
@every_type
@pytest.mark.parametrize("rows", [7, 16, 32, 50])
def test_poison_stays_where_it_is(module, dtype, transposed, rows) -> None:
    call = draw(shape_of(rows), dtype, transposed)
    clean = call.cuda(module)
    w = call.w.clone()
    w[2] = torch.nan
    dead = replace(call, ids=torch.where(call.ids == 2, 77, call.ids), w=w)
    absent = replace(call, ids=torch.where(call.ids == 2, -1, call.ids))
    assert torch.equal(absent.cuda(module), dead.cuda(module)), "dead"
    sick = replace(call, w=w).cuda(module)
    mine = torch.zeros(rows, dtype=torch.bool)
    for n, (begin, end) in enumerate(pairwise(call.offsets.tolist())):
        mine[begin:end] = bool((call.ids[n] == 2).any())
    assert torch.equal(clean[~mine], sick[~mine]), "live, another group's"
    assert not sick[mine].isfinite().any()
    others = torch.arange(rows) != rows // 2
    for name in ("x", "s"):
        value = getattr(call, name).clone()
        value[rows // 2] = torch.nan
        sick = replace(call, **{name: value}).cuda(module)
        assert torch.equal(clean[others], sick[others]), name
        assert not sick[rows // 2].isfinite().any()


@every_type
def test_two_pools_and_no_offsets(module, dtype) -> None:
    call = draw(replace(WIDE, groups=(42,), table=((0, 3, -1, 4),)), dtype)
    whole = call.cuda(module)
    for split, pool in ((2, dtype), (4, torch.float32)):
        parts = replace(call, w=call.w[:split].clone(), w1=call.w[split:].to(pool), offsets=None)
        assert torch.equal(whole, parts.cuda(module))
        close(whole, parts)


@both_ways
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dropout_selects(module, dtype, transposed) -> None:
    call = dropped(draw(WIDE, dtype, transposed), first=1)
    got, base = call.cuda(module), replace(call, ids=torch.full_like(call.ids, -1), drop=None).cuda(module)
    assert torch.equal(got == base, call.cpu() == replace(call, ids=torch.full_like(call.ids, -1), drop=None).cpu())
    assert 0 < (got == base).float().mean() < 0.5
    all_gone = replace(call, w=torch.full_like(call.w, torch.nan), drop=call.drop._replace(p=1.0, first=0))
    assert torch.equal(all_gone.cuda(module), base), "what is dropped may be anything"


@every_type
@pytest.mark.parametrize("rows", [1, 24, 70])
def test_layer_is_shrink_and_linear(module, dtype, rows) -> None:
    case = make(shape_of(rows), dtype)
    common = (case.ids, case.offsets, case.scales, 1.0)
    with cuda_emulator.emulated(module):
        y, s = native.layer(case.x, case.weight, case.bias, case.a, None, case.b, None, *common, len(case.weight))
        assert torch.equal(s, native.shrink(case.x, case.a, None, *common))
        routed = (s, case.b, None, case.ids, case.offsets, len(case.weight), False)
        assert torch.equal(y, native.linear(case.x, case.weight, case.bias, *routed))


def test_errors_come_back(module) -> None:
    call = draw(shape_of(8), torch.float16)
    call.weight = native.pack(call.weight)
    with pytest.raises(RuntimeError):
        replace(call).cuda(module)
