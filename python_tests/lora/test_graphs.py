"""CUDA graphs, streams, compilers and autocast: the table steers a captured forward, backward and training step.

``capture`` gives a function that replays a captured graph; on the CPU it calls the function again: there only
what is said of deletions and neighbours can fail, and what is said of a graph holds of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import guarantees as g
import pytest
import torch
from numerics import make
from torch import Tensor, nn
from torch.library import opcheck

from s3t_ext import masked_lora_linear
from s3t_ext.lora import nn as layers
from s3t_ext.lora.kernels import serves
from s3t_ext.lora.optim import AdamW

MODES = ("exact", "fast", "fused", "split")
every_place = g.every_place()
every_mode = pytest.mark.parametrize("mode", MODES)
on_gpu = pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [p for p in g.places() if p.values[1] == "cuda"] or [pytest.param("", "", "", marks=g.GPU)],
)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=g.GPU)])


def capture(run: Callable[[], object], device: str, warmups: int = 3) -> Callable[[], object]:
    """Capture a function after warming it up on a side stream; the same tensors come back from every replay."""
    if device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmups):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


def layer(case, backend: str, mode: str, **changes) -> Tensor:
    case = replace(case, **changes)
    return masked_lora_linear(
        *(case.x, case.weight, case.bias, case.a, case.b, case.ids, case.offsets),
        scale=case.scales,
        mode=mode,
        backend=backend,
    )


@every_place
@every_mode
def test_deletion_between_replays(backend, device, dtype, mode) -> None:
    """The replay after a deletion has the bits of a fresh capture; rows of other groups keep theirs."""
    case = make(g.MANY, dtype).to(device)
    replay = capture(lambda: layer(case, backend, mode), device)
    before = replay().clone()
    address = case.ids.data_ptr()
    case.ids[2] = torch.tensor([-1, -1], dtype=torch.int32)  # dead at once
    dead = replay().clone()
    assert torch.equal(dead, capture(lambda: layer(case, backend, mode), device)())
    lo, hi = int(case.offsets[2]), int(case.offsets[3])
    others = [t for t in range(len(case.x)) if not lo <= t < hi]
    assert torch.equal(before[others], dead[others])
    assert not torch.equal(before[lo:hi], dead[lo:hi])
    case.ids[2] = torch.tensor([0, -1], dtype=torch.int32)  # then the best live path
    assert torch.equal(replay(), capture(lambda: layer(case, backend, mode), device)())
    assert case.ids.data_ptr() == address


@every_place
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_backward_in_a_graph(backend, device, dtype, mode) -> None:
    case = make(g.MANY, dtype, torch.float32).to(device)
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.a, case.b)]

    def run() -> tuple[Tensor, ...]:
        y = layer(case, backend, mode, x=leaves[0], a=leaves[1], b=leaves[2])
        return torch.autograd.grad(y, leaves, case.dy)

    replay = capture(run, device)
    for table in (case.ids.clone(), torch.where(case.ids == 3, -1, case.ids)):
        case.ids.copy_(table)
        eager, replayed = run(), replay()
        for want, got in zip(eager, replayed):
            assert torch.equal(want, got)
    assert not replayed[1][3].any(), "the dead adapter's gradient is zero in the replay"


@every_place
def test_training_step_in_a_graph(backend, device, dtype) -> None:
    """Forward, backward and AdamW in one graph walk bit for bit the way of the eager loop, dropout and deletion too."""

    def train(captured: bool) -> Tensor:
        case = make(g.MANY, dtype, torch.float32).to(device)
        pools = [t[3:].clone().requires_grad_() for t in (case.a, case.b)]
        optimizer = AdamW(pools, weight_decay=0.01)
        seeds, rows = (torch.arange(n, device=device) for n in (len(case.ids), len(case.x)))

        def step() -> None:
            y = masked_lora_linear(
                *(case.x, case.weight, case.bias, case.a[:3], case.b[:3], case.ids, case.offsets),
                scale=case.scales,
                train=(pools[0], pools[1]),
                dropout=(0.2, seeds, rows),
                mode="exact",
                backend=backend,
            )
            y.backward(case.dy)
            optimizer.apply()

        if captured:  # warming up and capturing must leave no trace
            start = [t.clone() for t in (optimizer.flat, optimizer.m, optimizer.v)]
            optimizer.prepare(0.0)
            replay = capture(step, device) if device == "cuda" else step
            optimizer.steps = 0
            for tensor, value in zip((optimizer.flat, optimizer.m, optimizer.v), start):
                tensor.copy_(value)
        else:
            replay = step
        for number in range(5):
            optimizer.prepare(1e-2 / (number + 1))
            seeds.fill_(number)
            if number == 3:
                case.ids[3] = -1
            replay()
        return optimizer.flat.clone()

    assert torch.equal(train(False), train(True))


@every_device
def test_model_in_a_graph(device) -> None:
    """A model's forward reads the routing table at every replay, through ``Routing.batch``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
    routing = layers.adapt(model, stages=3, groups=2, rank=4)
    for adapted in layers.adapted_layers(model).values():
        adapted.a = torch.randn(6, 4, adapted.in_features, device=device)
        adapted.b = torch.randn(6, 4, adapted.out_features, device=device)
    routing.table.copy_(torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32))
    x = torch.randn(5, 16, device=device)

    def run() -> Tensor:
        with torch.no_grad(), routing.batch([2, 3]):
            return model(x)

    replay = capture(run, device)
    before = replay().clone()
    routing.table[1, 1:] = -1
    after = replay()
    assert torch.equal(after, run())
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])


@on_gpu
@every_mode
def test_streams_do_not_meet(backend, device, dtype, mode) -> None:
    """Four streams at once, many launches each: every result has the bits of the same call alone."""
    cases = [make(g.UNEVEN, dtype, seed=seed).to(device) for seed in range(4)]
    want = [layer(case, backend, mode) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found: list[list[Tensor]] = [[] for _ in cases]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, found):
            with torch.cuda.stream(stream):
                results.append(layer(case, backend, mode))
    torch.cuda.synchronize()
    for expected, results in zip(want, found):
        assert all(torch.equal(expected, result) for result in results)


@on_gpu
def test_nothing_waits_for_the_device(backend, device, dtype) -> None:
    case = make(g.MANY, dtype).to(device)
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.a, case.b)]
    seeds, rows = (torch.arange(n, device=device) for n in (len(case.ids), len(case.x)))
    for mode in MODES:
        for dropout in (None, (0.5, seeds, rows)):
            for debug in ("default", "error"):  # the first call may compile and load
                torch.cuda.set_sync_debug_mode(debug)
                try:
                    y = masked_lora_linear(
                        *(leaves[0], case.weight, case.bias, leaves[1], leaves[2], case.ids, case.offsets),
                        scale=case.scales,
                        dropout=dropout,
                        mode=mode,
                        backend=backend,
                    )
                    y.backward(case.dy)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_id_out_of_range_reads_nothing(backend, device, dtype) -> None:
    case = make(g.MANY, dtype)
    wild = torch.where(case.ids == 3, 2**31 - 1, torch.where(case.ids == 2, 6, case.ids))
    tame = torch.where((case.ids == 3) | (case.ids == 2), -1, case.ids)
    for base in (False, True):
        want = g.gradients(replace(case, ids=tame), backend, base, device)
        g.same_bits(want, g.gradients(replace(case, ids=wild), backend, base, device))


@on_gpu
def test_runs_repeat_their_bits(backend, device, dtype) -> None:
    case = make(g.UNEVEN, dtype)
    want = g.gradients(case, backend, True, device)
    for _ in range(20):
        g.same_bits(want, g.gradients(case, backend, True, device))


@on_gpu
def test_rows_do_not_depend_on_their_number(backend, device, dtype) -> None:
    """Mode exact, across the tile shapes of every bucket of T: a row alone has its bits in any batch."""
    draw = torch.Generator().manual_seed(3)
    inputs, outputs, rank, most = 512, 384, 16, 8192
    x = torch.randn(most, inputs, generator=draw).to(device, dtype)
    weight = (torch.randn(outputs, inputs, generator=draw) * inputs**-0.5).to(device, dtype)
    a = (torch.randn(4, rank, inputs, generator=draw) * inputs**-0.5).to(device, dtype)
    b = torch.randn(4, rank, outputs, generator=draw).to(device, dtype)
    ids = torch.tensor([[2, -1, 0]], dtype=torch.int32, device=device)

    def run(rows: Tensor) -> Tensor:
        return masked_lora_linear(rows, weight, None, a, b, ids, mode="exact", backend=backend)

    if backend == "reference":
        x, most = x[:64], 64
    whole = run(x)
    for count in (1, 2, 7, 8, 16, 33, 64, 65, 128, 200, 256, 512, 1000, 2048, 4096):
        if count <= most:
            assert torch.equal(run(x[:count]), whole[:count]), count
            assert torch.equal(run(x[most - count :]), whole[most - count :]), count


@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=g.GPU) for b in ("native", "triton") if serves(b, "shrink", "cuda", torch.float32)],
)
@pytest.mark.parametrize("shape", g.ALL_SHAPES, ids=str)
def test_fp32_has_the_bits_of_the_cpu(backend, shape) -> None:
    """One order of sums everywhere (guarantee 3)."""
    case = make(shape, torch.float32)
    for base in (False, True):
        g.same_bits(g.gradients(case, "native", base), g.gradients(case, backend, base, "cuda"))


@every_device
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_autocast(device, mode) -> None:
    case = make(g.MANY, torch.float32).to(device)
    a, b = (t.clone().requires_grad_() for t in (case.a, case.b))
    with torch.autocast(device, torch.bfloat16):
        y = layer(case, "", mode, a=a, b=b)
    assert y.dtype == torch.bfloat16
    typed = replace(case, x=case.x.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    assert torch.equal(y, layer(typed, "", mode))
    y.backward(case.dy.bfloat16())
    assert a.grad.dtype == b.grad.dtype == torch.float32


@on_gpu
def test_opcheck_on_the_device(backend, device, dtype) -> None:
    case = make(g.MANY, dtype).to(device)
    x, a, b = (t.detach().clone().requires_grad_() for t in (case.x, case.a, case.b))
    table = (case.ids, case.offsets, case.scales, 1.0)
    rest = (None, None, None, None, 0.0)
    opcheck(torch.ops.s3t.masked_lora, (x, a, b, *table, *rest, backend))
    for mode in MODES:
        args = (x, case.weight, None, case.bias, a, b, *table, *rest, mode, g.MANY.outputs, backend)
        opcheck(torch.ops.s3t.masked_lora_linear, args)


@on_gpu
@pytest.mark.parametrize("compiler", ["default", "reduce-overhead"])
def test_compiled_layer_follows_the_table(backend, device, dtype, compiler) -> None:
    case = make(g.MANY, dtype).to(device)
    run = torch.compile(
        lambda x, ids: layer(case, backend, "exact", x=x, ids=ids).relu(), fullgraph=True, mode=compiler
    )
    with torch.no_grad():
        for _ in range(4):
            got = run(case.x, case.ids).clone()
            assert torch.equal(got, layer(case, backend, "exact").relu())
        case.ids[2] = -1
        got = run(case.x, case.ids).clone()
        assert torch.equal(got, layer(case, backend, "exact").relu())
