"""The public ops as torch sees them: schema, fake, autograd, compile, autocast, errors, edges."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
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


@every_backend
def test_one_strided_row(backend) -> None:
    """A single row must be contiguous as well: its elements are not where a kernel looks for them."""
    case = make(SHAPES[1], torch.float32)
    x = torch.randn(1, 2 * case.x.shape[1])[:, ::2]
    with pytest.raises(ValueError, match="x"):
        masked_lora(x, case.a, case.b, case.ids, backend=backend)
    masked_lora(x.contiguous(), case.a, case.b, case.ids, backend=backend)


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


@every_type
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("given", "packed"), [(9, 10), (10, 9), (9, 8), (10, 11)])
def test_a_packed_weight_of_another_width_is_refused(dtype, autocast, given, packed) -> None:
    """Of bf16, panels hold an even number of columns: 9 and 10 have the same shape."""
    x, a, b = torch.ones(3, given, dtype=dtype), torch.ones(1, 2, given), torch.ones(1, 2, 12)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    weight = pack(torch.ones(12, packed, dtype=dtype), backward=True)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=rf"^x: expected \(T, {packed}\)"):
        masked_lora_linear(x, weight, None, a, b, ids)


@every_type
def test_a_packed_weight_tells_its_sizes(dtype) -> None:
    weight = torch.ones(12, 9, dtype=dtype)
    assert pack(weight)[1:] == (12, 9, None)
    x, a, b = torch.ones(3, 9, dtype=dtype), torch.ones(1, 2, 9), torch.ones(1, 2, 12)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    for outputs, backward, name in ((20, False, "b"), (20, True, "weight"), (33, False, "weight")):
        changed = pack(weight, backward=backward)._replace(out_features=outputs)
        with pytest.raises(ValueError, match=f"^{name}: "):
            masked_lora_linear(x, changed, None, a, b, ids)


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


# --- bad input: an error that names the argument ---------------------------------------------------------------------


def _calls():
    case = make(MANY, torch.float32)
    good = {
        "x": case.x,
        "weight": case.weight,
        "bias": case.bias,
        "a": case.a,
        "b": case.b,
        "adapter_ids": case.ids,
        "offsets": case.offsets,
        "scale": case.scales,
        "train": None,
        "dropout": None,
        "mode": "exact",
    }
    off = case.offsets
    return good, [
        ("x", case.x[0], ValueError),
        ("x", case.x.t().contiguous().t(), ValueError),
        ("x", case.x.long(), NotImplementedError),
        ("weight", case.weight[:, :-1], ValueError),
        ("weight", case.weight.bfloat16(), ValueError),
        ("weight", case.weight.clone().requires_grad_(), ValueError),
        ("weight", pack(case.weight)._replace(out_features=case.weight.shape[0] + 64), ValueError),
        ("weight", pack(case.weight)._replace(turned=case.weight.t().contiguous()), ValueError),
        ("bias", case.bias[:-1], ValueError),
        ("bias", case.bias.clone().requires_grad_(), ValueError),
        ("a", case.a[:, :, :-1], ValueError),
        ("a", case.a.bfloat16(), ValueError),
        ("a", case.a[::2], ValueError),
        ("b", case.b[:, :-1], ValueError),
        ("b", case.b[0], ValueError),
        ("b", case.b.transpose(0, 1), ValueError),
        ("adapter_ids", case.ids.long(), ValueError),
        ("adapter_ids", case.ids[0], ValueError),
        ("adapter_ids", case.ids + 100, ValueError),
        ("adapter_ids", case.ids - 5, ValueError),
        ("offsets", off.long(), ValueError),
        ("offsets", off[:-1], ValueError),
        ("offsets", off + 1, ValueError),
        ("offsets", off.flip(0).contiguous(), ValueError),
        ("adapter_ids", None, ValueError),
        ("scale", case.scales[:-1], ValueError),
        ("scale", case.scales.double(), ValueError),
        ("train", (case.a,), ValueError),
        ("train", (1, 2), ValueError),
        ("scale", case.scales.clone().requires_grad_(), ValueError),
        ("train", (case.a, case.b[:2]), ValueError),
        ("train", (case.a[..., :-1].contiguous(), case.b), ValueError),
        ("mode", "quick", ValueError),
        ("mode", None, ValueError),
        ("x", None, ValueError),
        ("x", case.x[:, :-1].contiguous(), ValueError),
        ("weight", "W", ValueError),
        ("weight", (case.weight, 70), ValueError),
        ("weight", case.weight[0], ValueError),
        ("bias", 0.5, ValueError),
        ("a", case.a.numpy(), ValueError),
        ("adapter_ids", [[0, 1]], ValueError),
        ("offsets", case.offsets.tolist(), ValueError),
        ("scale", None, ValueError),
        ("scale", "2", ValueError),
        ("scale", torch.tensor(2.0), ValueError),
        ("dropout", (0.1, None, None), ValueError),
        ("dropout", 0.1, ValueError),
        ("dropout", (1.0, *dropout(case)[1:]), ValueError),
        ("dropout", (0.1, dropout(case)[1].int(), dropout(case)[2]), ValueError),
        ("dropout", (0.1, dropout(case)[1], dropout(case)[2][1:]), ValueError),
    ]


@pytest.mark.parametrize("number", range(len(_calls()[1])))
def test_bad_input_is_named(number) -> None:
    good, bad = _calls()
    name, value, error = bad[number]
    call = {**good, name: value}
    if name == "adapter_ids" and value is None:  # two groups and no offsets
        call = {**good, "offsets": None}
    with pytest.raises(error, match=name) as caught:
        masked_lora_linear(**call)
    assert "\n" not in str(caught.value)
    with Calls(), pytest.raises(error) as watched:  # as a torch op, see test_autograd
        masked_lora_linear(**call)
    assert str(watched.value) == str(caught.value)


def test_what_came_is_told_from_what_was_wanted() -> None:
    case = make(MANY, torch.float32)
    with pytest.raises(ValueError, match=r"weight: .*got .*strides \(1, 70\)"):
        masked_lora_linear(case.x, case.weight.t().contiguous().t(), None, case.a, case.b, case.ids, case.offsets)
    with pytest.raises(ValueError, match="scale"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, scale=torch.tensor(2.0), dropout=dropout(case))


@pytest.mark.parametrize(
    "weight",
    [
        np.ones((4, 6)),
        torch.nn.Linear(6, 4),
        pack(torch.ones(4, 6)),
        None,
        [[1.0]],
        torch.ones(6),
        torch.ones(6, 4).t(),
    ],
    ids=["numpy", "linear", "packed", "none", "list", "vector", "transposed"],
)
def test_pack_says_what_to_give(weight) -> None:
    with pytest.raises(ValueError, match=r"^weight: expected a contiguous"):
        pack(weight)


@pytest.mark.parametrize("mode", ["exact", "split"])
def test_a_packed_weight_of_another_type_says_what_to_do(mode) -> None:
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        case = make(MANY, dtype, pool=torch.float32)
        had, has = str(other).removeprefix("torch."), str(dtype).removeprefix("torch.")
        with pytest.raises(
            ValueError, match=rf"^weight: packed as {had}, x is {has}; give pack\(weight.to\({dtype}\)\)"
        ):
            masked_lora_linear(
                *(case.x, pack(case.weight.to(other)), case.bias, case.a, case.b, case.ids, case.offsets), mode=mode
            )


@every_type
def test_panels_come_as_the_packed_that_holds_them(dtype) -> None:
    case = make(MANY, dtype)
    panels = pack(case.weight).panels
    with pytest.raises(ValueError, match=r"^weight: expected a matrix \(O, K\), or the Packed that pack\(\) returned"):
        masked_lora_linear(case.x, panels, case.bias, case.a, case.b, case.ids, case.offsets)


@pytest.mark.parametrize(
    "scale", [np.float32(2), np.float64(2), np.int64(2), 2], ids=lambda scale: type(scale).__name__
)
def test_a_scale_is_any_real_number(scale) -> None:
    case = make(MANY, torch.float32)
    args = (case.x, case.a, case.b, case.ids, case.offsets)
    for keys in (None, dropout(case)):
        assert torch.equal(masked_lora(*args, scale=scale, dropout=keys), masked_lora(*args, scale=2.0, dropout=keys))


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make(MANY, torch.float32)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, backend="triton")


def test_unknown_backend_and_type_are_refused() -> None:
    case = make(MANY, torch.float32)
    with pytest.raises(ValueError, match="backend"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, backend="cudnn")
    double = make(MANY, torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        masked_lora(double.x, double.a, double.b, double.ids, double.offsets, backend="native")
