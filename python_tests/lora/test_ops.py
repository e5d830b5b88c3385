"""The public ops as torch sees them: schema, fake, autograd, compile, autocast, edges; see test_ops_refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from guarantees import MANY, forward, gradients, same_bits
from numerics import SHAPES, TYPES, make
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from s3t_ext import masked_lora, masked_lora_linear, pack
from s3t_ext.lora.kernels import reference

BACKENDS = ("native", "reference")  # Triton, slow in its interpreter, has test_triton, and test_graphs on a device
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_()


def dropout(case, p=0.25):
    """Give (p, seeds, row keys) for a case, halves of 64 bits used."""
    seeds = torch.arange(len(case.ids)) * 0x1_0000_0001 - 2
    return p, seeds, torch.arange(len(case.x)) * 0x7_0000_0003 + 5


def pools(case):
    """Split a case's adapters in a frozen and a trainable pool that together name the same ids."""
    return case.a[:4].contiguous(), case.b[:4].contiguous(), leaf(case.a[4:]), leaf(case.b[4:])


@pytest.mark.parametrize("number", range(7))
@every_type
def test_opcheck_with_gradients(dtype, number) -> None:
    """Each call with each type; the two backends take turns, so that each call and each type has both."""
    backend = BACKENDS[(number + TYPES.index(dtype)) % 2]
    case = make(MANY, dtype)
    a, b, a1, b1 = pools(case)
    common = (leaf(case.x), case.weight, None, case.bias)
    packed = pack(case.weight, backward=True)
    keys = dropout(case)
    joint = (leaf(case.a), leaf(case.b), case.ids, case.offsets, case.scales, 1.0, None, None, *keys[1:], keys[0])
    split = (a, b, case.ids, case.offsets, None, 2.0, a1, b1, None, None, 0.0)
    of_panels = (leaf(case.x), packed.panels, packed.turned, case.bias)
    linear, alone = torch.ops.s3t.masked_lora_linear, torch.ops.s3t.masked_lora
    calls = [(linear, (*common, *given, mode, MANY.outputs)) for mode in ("exact", "split") for given in (joint, split)]
    calls += [(linear, (*of_panels, *joint, "exact", MANY.outputs))]
    calls += [(alone, (leaf(case.x), *given)) for given in (joint, split)]
    assert len(calls) == 7
    op, args = calls[number]
    opcheck(op, (*args, backend))


@every_backend
@pytest.mark.parametrize("op", ["shrink", "expand_", "linear", "layer", "outer"])
def test_opcheck_primitives(backend, op) -> None:
    case = make(MANY, torch.float32)
    p, *keys = dropout(case)
    table = (case.ids, case.offsets)
    s = torch.ops.s3t.shrink(case.x, case.a, None, *table, case.scales, 1.0, *keys, p, backend)
    args = {
        "shrink": (case.x, case.a, None, *table, case.scales, 1.0, *keys, p, backend),
        "expand_": (case.dy.clone(), s, case.b, None, *table, *keys, p, backend),
        "linear": (case.x, case.weight, case.bias, s, case.b, None, *table, MANY.outputs, False, *keys, p, backend),
        "layer": (
            *(case.x, case.weight, case.bias, case.a, None, case.b, None, *table, None, 2.0),
            *(MANY.outputs, *keys, p, backend),
        ),
        "outer": (s, case.x, *table, 1, 3, torch.float32, *keys, p, backend),
    }
    opcheck(getattr(torch.ops.s3t, op), args[op])


@every_backend
@every_type
def test_compiles_without_a_break(backend, dtype) -> None:
    case = make(MANY, dtype)
    a, b, a1, b1 = pools(case)

    def step(x, a1, b1):
        y = masked_lora_linear(
            x,
            case.weight,
            case.bias,
            a,
            b,
            case.ids,
            case.offsets,
            scale=case.scales,
            train=(a1, b1),
            mode="exact",
            backend=backend,
        )
        return (y * case.dy).sum()

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [leaf(t) for t in (case.x, a1, b1)]
        run(*leaves).backward()
        found.append(dict(zip("xab", (t.grad for t in leaves))))
    same_bits(*found)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a compiler")
def test_compiles_with_inductor() -> None:
    case = make(MANY, torch.float32)
    run = torch.compile(lambda x: masked_lora(x, case.a, case.b, case.ids, case.offsets).relu(), fullgraph=True)
    assert torch.equal(run(case.x), masked_lora(case.x, case.a, case.b, case.ids, case.offsets).relu())


def test_one_graph_serves_every_number_of_rows() -> None:
    case = make(MANY, torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(
        lambda x, offsets: masked_lora_linear(
            x, case.weight, case.bias, case.a, case.b, case.ids[:1], offsets, mode="exact"
        ),
        fullgraph=True,
        backend=count,
    )
    for rows in (3, 4, 5, 7, 11, 13, 17):
        x, offsets = case.x[:1].repeat(rows, 1), torch.tensor([0, rows], dtype=torch.int32)
        want = masked_lora_linear(x, case.weight, case.bias, case.a, case.b, case.ids[:1], offsets, mode="exact")
        assert torch.equal(run(x, offsets), want)
    assert len(graphs) <= 2, "one for the first number of rows, one for all others"


def test_gradients_against_finite_differences() -> None:
    case = make(SHAPES[2], torch.float64)
    case = replace(case, scales=case.scales.float())

    def run(x, a, b):
        return masked_lora_linear(
            x, case.weight, case.bias, a, b, case.ids, case.offsets, scale=0.5, mode="exact", backend="reference"
        )

    assert torch.autograd.gradcheck(run, tuple(leaf(t) for t in (case.x, case.a, case.b)))


@every_backend
@every_type
def test_two_pools_are_one(backend, dtype) -> None:
    """With ``train`` the result and the trainable gradients are those of the joint pool, and nothing else has one."""
    case = make(MANY, dtype, pool=torch.float32)
    joint = gradients(case, backend, True)
    a, b, a1, b1 = pools(case)
    frozen = leaf(a)
    x = leaf(case.x)
    y = masked_lora_linear(
        x,
        case.weight,
        case.bias,
        frozen,
        b,
        case.ids,
        case.offsets,
        scale=case.scales,
        train=(a1, b1),
        mode="exact",
        backend=backend,
    )
    y.backward(case.dy)
    same_bits(joint, {"y": y, "dx": x.grad, "da": joint["da"], "db": joint["db"]})
    assert torch.equal(a1.grad, joint["da"][4:])
    assert torch.equal(b1.grad, joint["db"][4:])
    assert frozen.grad is None
    assert a1.grad.dtype == torch.float32
    assert not a1.grad[1].any(), "adapter 5 is named by no group"


class Calls(TorchDispatchMode):
    """Record the ops of this package that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "s3t":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@every_backend
@every_type
@pytest.mark.parametrize("backward", [False, True], ids=["panels", "turned"])
def test_packed_weight_gives_the_same_bits(backend, dtype, backward) -> None:
    """And the gradient of x reads the panels of the transposed weight where there are some."""
    case = make(MANY, dtype)
    plain = gradients(case, backend, True)
    x, a, b = leaf(case.x), leaf(case.a), leaf(case.b)
    packed = pack(case.weight, backward=backward)
    y = masked_lora_linear(
        *(x, packed, case.bias, a, b, case.ids, case.offsets), scale=case.scales, mode="exact", backend=backend
    )
    with Calls() as calls:
        y.backward(case.dy)
    same_bits(plain, {"y": y, "dx": x.grad, "da": a.grad, "db": b.grad})
    (read,) = [args[1] for name, args in calls.seen if name == "linear"]
    assert read.data_ptr() == (packed.turned if backward else packed.panels).data_ptr()


@every_type
def test_pack_holds_the_weight_once_or_twice(dtype) -> None:
    weight = torch.randn(64, 96).to(dtype)
    once, twice = pack(weight), pack(weight, backward=True)
    assert once.turned is None
    assert once.panels.untyped_storage().nbytes() == weight.nbytes
    assert sum(t.untyped_storage().nbytes() for t in (twice.panels, twice.turned)) == 2 * weight.nbytes


@every_type
@pytest.mark.parametrize("sizes", [(1, 1), (5, 1), (1, 5), (32, 64), (33, 257), (290, 40)], ids=str)
def test_pack_turns_a_weight_without_a_copy(dtype, sizes) -> None:
    weight = torch.randn(sizes).to(dtype)
    made: list[torch.Tensor] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if result.data_ptr() != weight.data_ptr():
                made.append(result)
            return result

    with Allocations():
        packed = pack(weight, backward=True)
    assert [t.data_ptr() for t in made] == [packed.panels.data_ptr(), packed.turned.data_ptr()]
    assert torch.equal(packed.panels, reference.pack(weight))
    assert torch.equal(packed.turned, reference.pack(weight.t().contiguous()))


@every_backend
def test_table_rewritten_in_place_takes_effect_in_the_next_call(backend) -> None:
    case = make(MANY, torch.float32)
    wide = torch.full((5, 4), -1, dtype=torch.int32)
    wide[:, 1:3] = case.ids
    column = wide[:, 1:3]  # a strided view of a model-wide table
    run = lambda: masked_lora(case.x, case.a, case.b, column, case.offsets, backend=backend)  # noqa: E731
    before, address = run(), column.data_ptr()
    wide[2] = -1
    after = run()
    rows = slice(int(case.offsets[2]), int(case.offsets[3]))
    assert not after[rows].any()
    assert before[rows].any()
    assert column.data_ptr() == address
    others = torch.ones(len(case.x), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(before[others], after[others])


@every_backend
@pytest.mark.parametrize("mode", ["exact", "fast", "fused", "split"])
def test_modes_agree_within_rounding(backend, mode) -> None:
    case = make(MANY, torch.float32)
    y = masked_lora_linear(
        case.x,
        case.weight,
        case.bias,
        case.a,
        case.b,
        case.ids,
        case.offsets,
        scale=case.scales,
        mode=mode,
        backend=backend,
    )
    torch.testing.assert_close(y, forward(case, "reference", True), rtol=1e-5, atol=1e-4)


@every_backend
def test_autocast_casts_as_linear_does(backend) -> None:
    case = make(MANY, torch.float32)
    a, b = leaf(case.a), leaf(case.b)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_lora_linear(
            case.x,
            case.weight,
            case.bias,
            a,
            b,
            case.ids,
            case.offsets,
            scale=case.scales,
            mode="exact",
            backend=backend,
        )
    assert y.dtype == torch.bfloat16
    typed = replace(case, x=case.x.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    assert torch.equal(y, forward(typed, backend, True))
    y.backward(case.dy.bfloat16())
    assert a.grad.dtype == b.grad.dtype == torch.float32


@every_type
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [MANY, replace(MANY, outputs=32)], ids=["panels", "one panel"])
def test_autocast_of_a_packed_weight(dtype, to, shape) -> None:
    """Panels are laid out for their own type: another type takes the weight out of them first."""
    case = make(shape, dtype)
    found = []
    for weight in (case.weight.to(to), pack(case.weight, backward=True)):
        x = leaf(case.x)
        with torch.autocast("cpu", to):
            y = masked_lora_linear(x, weight, case.bias, case.a, case.b, case.ids, case.offsets, mode="exact")
        y.backward(case.dy.to(to))
        found.append({"y": y, "dx": x.grad})
    same_bits(*found)


@every_backend
def test_training_mode_changes_nothing(backend) -> None:
    """A forward under no_grad, under inference_mode and with gradients gives the same bits."""
    case = make(MANY, torch.float32)
    with_grad = gradients(case, backend, True)["y"]
    with torch.no_grad():
        assert torch.equal(with_grad, forward(case, backend, True))
    with torch.inference_mode():
        assert torch.equal(with_grad, forward(case, backend, True))
