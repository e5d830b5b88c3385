"""The Triton kernel of ``linear``: in the interpreter, with the products of ``interpreted``; and compiled.

So the kernel's own order of sums is visible: fp32 has the bits of the CPU kernels, and no tile, batch or neighbour may
change a bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import guarantees as g
import pytest
import torch
from numerics import SHAPES, Case, Shape, assert_error, make
from torch import Tensor

from s3t_ext.lora.kernels import native, reference
from s3t_ext.lora.kernels.dropout import Dropout
from s3t_ext.lora.kernels.triton import AVAILABLE, entry, serves
from s3t_ext.lora.kernels.triton.tiles import TABLE, Tile, tile

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="no Triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDE = Shape((9, 31, 2), 64, 200, 8, 5, ((0, 1), (2, -1), (4, 3)), reason="several column tiles")
DEEP = Shape((2, 3), 72, 40, 20, 14, (tuple(range(12)), tuple(range(13, 1, -1))), reason="12 slots of two blocks")
ALL = (*SHAPES, g.MANY, g.UNEVEN, WIDE, DEEP)

interpreted = [pytest.param("cpu", t, id=f"cpu-{t}") for t in (F32, F16) if serves("cpu", t)]
on_gpu = [pytest.param("cuda", t, id=f"cuda-{t}", marks=g.GPU) for t in (F32, F16, BF16)]
everywhere = pytest.mark.parametrize(("device", "dtype"), interpreted + on_gpu)
in_half = pytest.mark.parametrize(("device", "dtype"), [p for p in interpreted + on_gpu if p.values[1] != F32])
both_ways = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])


@dataclass
class Call:
    """Arguments of ``linear``."""

    x: Tensor  # (T, K)
    weight: Tensor  # (O, K)
    bias: Tensor | None  # (O,)
    s: Tensor  # (T, P, r)
    w: Tensor  # (N, r, O)
    w1: Tensor | None
    ids: Tensor  # (G, P)
    offsets: Tensor | None  # (G + 1,)
    transposed: bool = False
    drop: Dropout | None = None
    outputs: int = 0

    def by(self, impl) -> Tensor:
        outputs = self.outputs or len(self.weight)
        return impl.linear(
            self.x, self.weight, self.bias, self.s, self.w, self.w1, self.ids, self.offsets, outputs, self.transposed,
            self.drop,
        )  # fmt: skip

    def triton(self, device: str = "cpu") -> Tensor:
        return self.on(device).by(entry).cpu()

    def tiled(self, block: Tile, tma: bool, multiprocessors: int = 2, device: str = "cpu") -> Tensor:
        """Run with a given tile; two multiprocessors: each program has several tiles."""
        from s3t_ext.lora.kernels.triton.linear import run

        c = self.on(device)
        y = c.x.new_full((len(c.x), c.weight.shape[1] if c.transposed else len(c.weight)), torch.nan)
        run(
            y, c.x, c.weight, c.bias, c.s, c.w, c.w1, c.ids, c.offsets, c.transposed, c.drop, block, multiprocessors,
            tma,
        )  # fmt: skip
        return y.cpu()

    def on(self, device: str) -> Call:
        if device == "cpu":
            return self
        moved = {k: moved_as_it_lies(v, device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        drop = self.drop and self.drop._replace(seeds=self.drop.seeds.to(device), rows=self.drop.rows.to(device))
        return replace(self, **moved, drop=drop)

    def exact(self) -> Tensor:
        """The result in fp64, from values rounded as the kernels round them."""
        wide = {n: getattr(self, n).double() for n in ("x", "weight", "s")}
        for name in ("bias", "w", "w1"):
            value = getattr(self, name)
            wide[name] = None if value is None else value.to(self.x.dtype).double()
        return replace(self, **wide).by(reference)

    def rows(self, keep: list[int]) -> Call:
        """Give the call for some rows, in ascending order, with the groups that they lie in."""
        of = torch.bucketize(torch.arange(len(self.x)), self.offsets[1:].long(), right=True)
        groups = sorted({int(of[t]) for t in keep})
        sizes = torch.tensor([0, *(sum(int(of[t]) == n for t in keep) for n in groups)])
        drop = self.drop and self.drop._replace(seeds=self.drop.seeds[groups], rows=self.drop.rows[keep])
        offsets = sizes.cumsum(0).to(torch.int32)
        return replace(self, x=self.x[keep], s=self.s[keep], ids=self.ids[groups], offsets=offsets, drop=drop)


def moved_as_it_lies(t: Tensor, device: str) -> Tensor:
    """Move a tensor with what lies between its elements; ``to`` would close the gaps."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def draw(shape: Shape, dtype: torch.dtype, transposed: bool = False, pool: torch.dtype | None = None) -> Call:
    case: Case = make(shape, dtype, pool)
    size = (len(case.x), case.ids.shape[1], shape.rank)
    s = (torch.randn(size, generator=torch.Generator().manual_seed(1)) * shape.rank**-0.5).to(dtype)
    if transposed:
        return Call(case.dy, case.weight, None, s, case.a, None, case.ids, case.offsets, True)
    return Call(case.x, case.weight, case.bias, s, case.b, None, case.ids, case.offsets)


def dropped(call: Call, first: int = 1) -> Call:
    draw = torch.Generator().manual_seed(3)
    seeds, rows = (torch.randint(-(2**62), 2**62, (n,), generator=draw) for n in (len(call.ids), len(call.x)))
    return replace(call, drop=Dropout(0.4, seeds, rows, first))


def close(got: Tensor, call: Call) -> None:
    """Guarantee 6, for one call: torch's error is that of a sum in fp32, rounded once."""
    exact = call.exact()
    terms = call.s.double().abs().sum(2).amax() * call.w.double().abs().amax() if call.s.numel() else 0
    assert_error([got], [exact.float().to(got.dtype)], [exact], float(terms))


@both_ways
@in_half
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_error(device, dtype, shape, transposed) -> None:
    call = draw(shape, dtype, transposed, F32 if len(shape.groups) % 2 else None)
    close(call.triton(device), call)
    if transposed and shape != g.UNEVEN:
        close(dropped(call).triton(device), dropped(call))


@pytest.mark.skipif(not native.AVAILABLE, reason="no compiled module")
@both_ways
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=g.GPU)])
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_fp32_has_the_bits_of_the_cpu_kernels(device, shape, transposed) -> None:
    if device == "cpu" and not serves("cpu", F32):
        pytest.skip("compiled kernels here, no interpreter")
    call = draw(shape, F32, transposed)
    call = dropped(call) if transposed else call
    assert torch.equal(call.triton(device), call.by(native))


BATCH = Shape((18, 0, 65, 1, 46), 40, 72, 8, 5, ((0, 1), (2, -1), (-1, 3), (4, 4), (1, 0)), reason="130 rows")
LINES = sorted({t for (op, _, size), lines in TABLE.items() if op == "linear" and size == 2 for *_, t in lines})


@both_ways
@pytest.mark.parametrize("block", LINES, ids=lambda b: f"{b.block_m}x{b.block_n}x{b.block_k}")
def test_no_tile_and_no_path_changes_a_bit(block, transposed) -> None:
    """The interpreter stands for one instruction that sums upward; on a device the tiles of one capability share it."""
    if not serves("cpu", F16):
        pytest.skip("compiled kernels here, no interpreter")
    call = draw(BATCH, F16, transposed)
    whole = call.tiled(Tile(64, 64, 16, 4, 2), tma=False, multiprocessors=132)
    for tma in (True, False):
        assert torch.equal(whole, call.tiled(block, tma)), tma


@in_half
def test_every_tile_is_written_once(device, dtype) -> None:
    """More row tiles than a band has, the last band not full, and columns that fill no tile."""
    call = draw(replace(WIDE, groups=(70, 61, 20), inputs=16, outputs=40), dtype)
    block = Tile(16, 16, 16, 4, 2)
    assert torch.equal(call.tiled(block, tma=False, device=device), call.tiled(block, False, 1000, device))
    if device == "cpu":
        assert torch.equal(call.tiled(block, tma=False), call.triton())


@both_ways
@everywhere
def test_a_row_has_its_bits_in_every_batch(device, dtype, transposed) -> None:
    call = draw(BATCH, dtype, transposed)
    for case in (call, dropped(call, first=3)) if transposed else (call,):
        whole = case.triton(device)
        for step in (3, 130):
            keep = list(range(step - 1, 130, step))
            assert torch.equal(whole[keep], case.rows(keep).triton(device)), step


@both_ways
@everywhere
def test_poison_stays_where_it_is(device, dtype, transposed) -> None:
    call = draw(replace(BATCH, groups=(5, 0, 9, 1, 7), outputs=40), dtype, transposed)
    for case in (call, dropped(call, first=9)) if transposed else (call,):
        clean = case.triton(device)
        for poison in (torch.nan, torch.inf):
            w = case.w.clone()
            w[2] = poison
            without = replace(case, ids=torch.where(case.ids == 2, -1, case.ids))
            dead = replace(case, ids=torch.where(case.ids == 2, 77, case.ids), w=w)
            assert torch.equal(without.triton(device), dead.triton(device)), "dead"
            w = case.w.clone()
            w[1, :, ::3] = poison
            sick = replace(case, w=w).triton(device)
            mine = torch.zeros(clean.shape, dtype=torch.bool)
            for n, (begin, end) in enumerate(zip(case.offsets[:-1], case.offsets[1:])):
                mine[begin:end, ::3] = bool((case.ids[n] == 1).any())
            assert torch.equal(clean[~mine], sick[~mine]), "live, another group's or another column's"
            assert not sick[mine].isfinite().any()
            for name in ("x", "s"):
                value = getattr(case, name).clone()
                value[2] = poison
                sick = replace(case, **{name: value}).triton(device)
                others = torch.arange(len(value)) != 2
                assert torch.equal(clean[others], sick[others]), name
                assert not sick[2].isfinite().any()


@everywhere
def test_masked_is_absent(device, dtype) -> None:
    call = draw(BATCH, dtype)
    masked = torch.full((len(call.ids), 7), -1, dtype=torch.int32)
    masked[:, [1, 5]] = call.ids
    s = torch.full((len(call.x), 7, call.s.shape[2]), torch.nan, dtype=dtype)
    s[:, [1, 5]] = call.s
    assert torch.equal(call.triton(device), replace(call, ids=masked, s=s).triton(device))


@both_ways
@everywhere
def test_how_the_operands_lie_changes_no_bit(device, dtype, transposed) -> None:
    call = draw(replace(BATCH, groups=(18, 0, 5, 1, 9), outputs=40), dtype, transposed)
    expected = call.triton(device)

    def shifted(t: Tensor, by: int) -> Tensor:
        return torch.zeros(t.shape[0], t.shape[1] + by, dtype=t.dtype)[:, by - 1 : -1].copy_(t)

    for by in (1, 2, 8):
        aside = replace(call, x=shifted(call.x, by))
        for place in (device, "meta"):
            there = aside.on(place).x
            assert (there.stride(0), there.storage_offset()) == (call.x.shape[1] + by, by - 1)
        assert torch.equal(expected, aside.triton(device)), by
    panels = replace(call, weight=reference.pack(call.weight), outputs=len(call.weight))
    assert torch.equal(expected, panels.triton(device)), "panels"
    table = call.ids.repeat_interleave(2, 1).repeat_interleave(3, 0)[::3, ::2]
    assert torch.equal(expected, replace(call, ids=table).triton(device)), "strided table"
    for split, pool in ((2, dtype), (4, F32), (0, F32)):
        parts = replace(call, w=call.w[:split].clone(), w1=call.w[split:].to(pool))
        assert torch.equal(expected, parts.triton(device)), "two pools"
    one = replace(call, ids=call.ids[:1], offsets=torch.tensor([0, len(call.x)], dtype=torch.int32))
    assert torch.equal(one.triton(device), replace(one, offsets=None).triton(device)), "one group"


@everywhere
def test_nothing_to_add(device, dtype) -> None:
    call = replace(draw(WIDE, dtype), bias=None)
    base = replace(call, ids=torch.full_like(call.ids, -1)).triton(device)
    assert torch.equal(base, replace(call, w=call.w[:0]).triton(device)), "no pool"
    no_slots = replace(call, ids=call.ids[:, :0], s=call.s[:, :0])
    assert torch.equal(base, no_slots.triton(device)), "no slots"
    nobody = replace(call, x=call.x[:0], s=call.s[:0], offsets=torch.zeros(4, dtype=torch.int32))
    assert nobody.triton(device).shape == (0, 200)


@everywhere
def test_dropout_selects(device, dtype) -> None:
    call = dropped(draw(WIDE, dtype, transposed=True), first=1)
    base = replace(call, ids=torch.full_like(call.ids, -1)).triton(device)
    plain = replace(call, ids=torch.full_like(call.ids, -1)).by(reference)
    got, expected = call.triton(device) == base, call.by(reference) == plain
    assert (got != expected).float().mean() < 0.01, "but for parts that rounding hides"
    assert 0.05 < got.float().mean() < 0.5
    gone = replace(call, w=torch.full_like(call.w, torch.nan), drop=call.drop._replace(p=1.0, first=0))
    assert torch.equal(gone.triton(device), base), "what is dropped may be anything"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_ways
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_one_row_or_thousands(dtype, transposed) -> None:
    """Mode exact on a device: each line of the table gives a row the bits that it has alone."""
    sizes = (*range(1, 127), 191)
    shape = Shape(sizes, 1096, 520, 16, 9, tuple((n % 9, -1, (n + 4) % 9) for n in range(127)), reason="8192 rows")
    call = draw(shape, dtype, transposed)
    assert len(call.x) == 8192
    whole = call.triton("cuda")
    for rows in (1, 2, 16, 64, 65, 128, 129, 256, 257, 512, 513, 2048):
        keep = sorted(range(0, 8192, 8192 // rows))[:rows]
        assert torch.equal(whole[keep], call.rows(keep).triton("cuda")), rows
    for t in (0, 5000, 8191):
        assert torch.equal(whole[t : t + 1], call.rows([t]).triton("cuda")), t


def test_table() -> None:
    lines = [(op, capability, size, t) for (op, capability, size), ls in TABLE.items() for *_, t in ls]
    assert len(lines) <= 40
    for op, capability, size, t in lines:
        if not op.startswith("linear"):
            continue
        assert not (capability == 90 and size == 2) or (t.block_m >= 64 and t.warps % 4 == 0), "wgmma throughout"
        assert size == 2 or 256 % t.block_k == 0, "a chain of 256 terms is whole steps"
        staged = t.stages * (t.block_m + t.block_n) * t.block_k * size
        assert staged * t.per_sm <= (227 << 10 if capability == 90 else 163 << 10)
        assert staged <= 99 << 10 or capability == 90, "8.6 and 8.9 take the lines of 8.0"
    assert tile("linear", 120, 2, 9000, 4096) == tile("linear", 90, 2, 9000, 4096)
    assert tile("linear", 89, 4, 1) == tile("linear", 80, 4, 1)


COMPILED = """
import itertools, re, sys, torch, triton
from ahead import Call, different, record, source_of

def some(capability, *calls):
    return different(l for l in record(capability, torch.bfloat16, calls) if l.kernel == "linear_kernel")

# As many programs for all T of one line of the table as for one T.
assert len(some(90, *(Call(t, 5) for t in (513, 600, 1024, 4097)))) == len(some(90, Call(777, 5))) == 2
for capability in (80, 90):
    for launch in some(capability, Call(2048, 75, slots=4)):
        source, target, options = source_of(launch)
        built = triton.compile(source, target=target, options=options).asm
        ptx = built["ptx"]
        fetch, multiply, pending = {
            80: ("cp.async.c", "mma.sync", r"cp\\.async\\.wait_group\\s+[1-9]"),
            90: ("cp.async.bulk.tensor", "wgmma.mma", r"wgmma\\.wait_group\\S*\\s+[1-9]"),
        }[capability]
        loops = []  # from a label to the branch back to it, without another loop inside
        for label in re.finditer(r"^(\\$L__BB\\d+_\\d+):", ptx, re.M):
            back = re.compile(rf"bra\\S*\\s+{re.escape(label[1])};").search(ptx, label.end())
            loops += [ptx[label.start() : back.end()]] if back else []
        loops = [b for b in loops if multiply in b and not any(o != b and o in b for o in loops)]
        base, adapters, again, careful = loops  # the latter two for tiles whose sum is not finite
        assert all(fetch in b and re.search(pending, b) for b in (base, again)), "the base product fetches ahead"
        assert "cp.async.c" in adapters, "and so do the adapters"
        waits = triton.__version__ < "3.9" or capability == 80  # 3.6 has a step's product end in the step
        assert waits or re.search(pending, adapters), "a step does not wait for the last one's product"
        assert adapters.count("shfl") <= 1 and adapters.count("bar.sync") <= 3, "nor for a flag of other warps"
        # Kernels whose left operand was cast in registers gave NaN on 9.0 (vLLM issue 48590): here both lie in memory.
        products = re.findall(r"ttng.warp_group_dot .* : (.*) ->", built["ttgir"])
        assert capability == 80 or "mma.sync" not in ptx and len(products) == 4
        assert all(types.count("!ttg.memdesc") == 2 for types in products), products
"""


def test_compiled_once_and_pipelined() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
