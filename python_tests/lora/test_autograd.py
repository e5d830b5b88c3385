"""The two ways of a call: straight to the kernels, or as a torch op wherever something in torch watches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from guarantees import MANY, forward, gradients, same_bits
from numerics import TYPES, Case, make
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from s3t_ext import masked_lora, masked_lora_linear, pack
from s3t_ext.lora import autograd
from s3t_ext.lora.check import check_values
from s3t_ext.lora.kernels import native

every_backend = pytest.mark.parametrize("backend", ["native", "reference"])


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """List, call by call of the formula, how its primitives are run; "direct": all in one step, see test_direct."""
    seen: list[str] = []
    inner, direct = autograd._forward, native.direct

    def count(ops, *args):
        seen.append("straight" if ops is autograd.KERNELS else "op")
        return inner(ops, *args)

    def count_direct(*args):
        y = direct(*args)
        if y is not None:
            seen.append("direct")
        return y

    monkeypatch.setattr(autograd, "_forward", count)
    monkeypatch.setattr(native, "direct", count_direct)
    return seen


def call(case: Case, x: Tensor | None = None, a: Tensor | None = None, **options) -> Tensor:
    return masked_lora_linear(
        *(case.x if x is None else x, case.weight, case.bias, case.a if a is None else a, case.b),
        *(case.ids, case.offsets),
        **{"scale": 2.0, "mode": "exact", **options},
    )


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass in its plainest form."""


@pytest.mark.parametrize(
    "around",
    [contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["plain", "no_grad", "inference", "autocast"],
)
def test_a_plain_call_goes_straight(ways, around) -> None:
    case = make(MANY, torch.float32)
    with around():
        call(case)
        call(
            case, a=nn.Parameter(case.a.clone()), x=case.x.clone().requires_grad_(not torch.is_inference_mode_enabled())
        )
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets)
    autocast, no_grad = isinstance(around(), torch.autocast), around in (torch.no_grad, torch.inference_mode)
    assert ways == ["straight" if autocast else "direct", "direct" if no_grad else "straight", "straight"]


def test_backward_goes_straight_too(ways, monkeypatch) -> None:
    case = make(MANY, torch.float32)
    ran: list[str] = []
    for name in ("shrink", "linear", "outer"):
        kernel = getattr(autograd.KERNELS, name)
        monkeypatch.setattr(
            autograd.KERNELS, name, lambda *args, name=name, kernel=kernel: (ran.append(name), kernel(*args))[1]
        )
    leaves = [t.clone().requires_grad_() for t in (case.x, case.a)]
    y = call(case, *leaves)
    y.backward(case.dy)
    assert ran == ["shrink", "linear", "outer"]
    with Watching():
        y = call(case, *leaves)
        y.backward(case.dy)
    assert len(ran) == 3, "a mode sees the backward pass as well"
    assert ways == ["straight", "op"]


@pytest.mark.parametrize(
    "around",
    [
        Watching,
        WatchingFunctions,
        torch.profiler.profile,
        torch.autograd.profiler.profile,
        lambda: torch.device("cpu"),
    ],
    ids=["dispatch mode", "function mode", "profiler", "old profiler", "default device"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_whoever_watches_sees_an_op(ways, around, grad) -> None:
    case = make(MANY, torch.float32)
    want = call(case)
    x = case.x.clone().requires_grad_(grad)
    with around():
        assert torch.equal(call(case, x), want)
    call(case, x)
    assert ways == ["direct", "op", "straight" if grad else "direct"]


def test_a_subclass_is_an_op_s_to_see(ways) -> None:
    case = make(MANY, torch.float32)
    want = call(case)
    for name in ("x", "a"):
        ways.clear()
        got = call(case, **{name: getattr(case, name).as_subclass(Wrapped)})
        assert torch.equal(got.as_subclass(Tensor), want)
        assert ways == ["op"]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "a", "b", "ids", "offsets", "scales", "dy"])
def test_a_negative_bit_is_no_memory_of_its_own(name, packed, grad, base) -> None:
    """Where torch has only noted that a tensor is the negative of its memory, every way reads the negative."""
    case = make(MANY, torch.float32)

    def run(negate) -> dict[str, Tensor]:
        v = {n: getattr(case, n).clone() for n in ("x", "weight", "bias", "a", "b", "ids", "offsets", "scales", "dy")}
        v[name] = negate(-v[name])
        x = v["x"].requires_grad_() if grad else v["x"]
        weight = pack(v["weight"], backward=True) if packed else v["weight"]
        table = {"adapter_ids": v["ids"], "offsets": v["offsets"], "scale": v["scales"]}
        if base:
            y = masked_lora_linear(x, weight, v["bias"], v["a"], v["b"], **table, mode="exact")
        else:
            y = masked_lora(x, v["a"], v["b"], **table)
        if grad:
            y.backward(v["dy"])
        return {"y": y, **({"dx": x.grad} if grad else {})}

    same_bits(run(torch._neg_view), run(torch.neg))


def test_profiler_names_the_op() -> None:
    case = make(MANY, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(case)
    assert {"s3t::masked_lora_linear", "s3t::layer"} <= {event.key for event in profile.key_averages()}


def test_tracers_record_the_op(ways) -> None:
    case = make(MANY, torch.float32)
    fake = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    for settings in ({}, {"pre_dispatch": True}, fake):
        graph = make_fx(lambda x: call(case, x), **settings)(case.x)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert any(name.startswith("s3t.") for name in names), settings
    assert set(ways) == {"op"}
    traced = torch.jit.trace(lambda x: call(case, x), (case.x,), check_trace=False)
    assert "s3t::masked_lora_linear" in str(traced.graph)
    program = torch.export.export(Holder(case), (case.x,))
    assert any("s3t.masked_lora_linear" in str(node.target) for node in program.graph.nodes)
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(lambda x: call(case, x), fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)(case.x)
    assert any("masked_lora_linear" in str(node.target) for node in graphs[0].graph.nodes)


class Holder(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return call(self.case, x)


def test_a_transform_is_not_passed_by() -> None:
    case = make(MANY, torch.float32)
    found: list[bool] = []
    torch.vmap(lambda x: (found.append(autograd.unseen(case.x)), x)[1])(case.x)
    assert found == [False]
    assert autograd.unseen(case.x)


@every_backend
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mode", ["exact", "split"])
def test_both_ways_have_the_same_bits(backend, dtype, mode) -> None:
    case = make(MANY, dtype, pool=torch.float32)
    keys = (0.25, torch.arange(len(case.ids)), torch.arange(len(case.x)))

    def run(weight) -> dict[str, Tensor]:
        x, a, b, a1, b1 = (t.clone().requires_grad_() for t in (case.x, case.a[:4], case.b[:4], case.a[4:], case.b[4:]))
        y = masked_lora_linear(
            *(x, weight, case.bias, a.detach(), b.detach(), case.ids, case.offsets),
            scale=case.scales,
            train=(a1, b1),
            dropout=keys,
            mode=mode,
            backend=backend,
        )
        y.backward(case.dy)
        return {"y": y, "dx": x.grad, "da": a1.grad, "db": b1.grad}

    for weight in (case.weight, pack(case.weight), pack(case.weight, backward=True)):
        straight = run(weight)
        with Watching():
            same_bits(straight, run(weight))
    for base in (False, True):
        straight = gradients(case, backend, base)
        with Watching():
            same_bits(straight, gradients(case, backend, base))
            same_bits({"y": straight["y"]}, {"y": forward(case, backend, base)})


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", [contextlib.nullcontext, Watching], ids=["straight", "op"])
def test_a_checkpoint_changes_no_gradient(ways, base, mode, reentrant, around) -> None:
    case = make(MANY, torch.float32)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if not base:
            return masked_lora(x, a, b, case.ids, case.offsets)
        return masked_lora_linear(x, case.weight, case.bias, a, b, case.ids, case.offsets, mode=mode)

    def run(apply) -> dict[str, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (case.x, case.a, case.b)]
        with around():
            y = apply(*leaves)
            y.backward(case.dy)
        return dict(zip(("y", "dx", "da", "db"), (y, *(t.grad for t in leaves))))

    same_bits(run(layer), run(lambda *leaves: checkpoint(layer, *leaves, use_reentrant=reentrant)))
    assert len(ways) == 3, "the checkpoint ran forward twice"


def test_changed_in_place_between_forward_and_backward() -> None:
    """What the backward pass reads is watched by torch, also what gets no gradient."""
    for name in ("x", "ids", "offsets", "b", "weight"):
        case = make(MANY, torch.float32)
        y = call(case, x=case.x, a=case.a.clone().requires_grad_())
        getattr(case, name).add_(0)
        with pytest.raises(RuntimeError, match="inplace"):
            y.backward(case.dy)


# --- values -----------------------------------------------------------------------------------------------------------


def _texts(ids: Tensor, offsets: Tensor | None, rows: int, adapters: int, monkeypatch) -> list[str]:
    """Check a table in C++ and in Python; give what each said."""
    texts = []
    for available in (native.AVAILABLE, False):
        with monkeypatch.context() as patch:
            patch.setattr(native, "AVAILABLE", available)
            try:
                check_values(ids, offsets, rows, adapters)
                texts.append("")
            except ValueError as error:
                texts.append(str(error))
    return texts


def test_both_checks_of_values_agree(monkeypatch) -> None:
    draw = torch.Generator().manual_seed(0)
    verdicts = set()
    for _ in range(400):
        groups, slots, rows, adapters = (int(torch.randint(low, 4, (), generator=draw)) for low in (1, 0, 0, 0))
        wide = torch.randint(-1, adapters + 1, (groups, 2 * slots), generator=draw, dtype=torch.int32)
        wide -= int(torch.rand((), generator=draw) < 0.1)
        ids = wide[:, ::2]  # (G, P), strided
        inner = torch.randint(0, rows + 1, (groups - 1,), generator=draw).sort().values
        offsets = torch.cat([torch.zeros(1), inner, torch.full((1,), rows)]).to(torch.int32)  # (G + 1,)
        if torch.rand((), generator=draw) < 0.3:
            offsets[int(torch.randint(0, groups + 1, (), generator=draw))] += 1
        in_cpp, in_python = _texts(ids, offsets, rows, adapters, monkeypatch)
        if native.AVAILABLE:
            assert native.check_values(ids, offsets, rows, adapters) == (in_python == "")
        assert in_cpp == in_python
        verdicts.add(in_python.split(":")[0])
    assert verdicts == {"", "adapter_ids", "offsets"}


@every_backend
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_bad_tables_are_told_alike(backend, base, watched) -> None:
    case = make(MANY, torch.float32)
    for field, value, text in (
        ("ids", case.ids + 2, "adapter_ids: expected -1 (masked) or 0..5, got 1..6"),
        ("ids", case.ids - 1, "adapter_ids: expected -1 (masked) or 0..5, got -2..3"),
        ("offsets", case.offsets + 1, "offsets: expected ascending numbers from 0 to T = 22, got [1, 6, 6, 15]..23"),
    ):
        case = make(MANY, torch.float32)
        setattr(case, field, value)
        with Watching() if watched else contextlib.nullcontext(), pytest.raises(ValueError, match=":") as caught:
            forward(case, backend, base)
        assert str(caught.value) == text


def tangents(f, x: Tensor) -> Tensor:
    """Give the derivative along ones, by torch's dual numbers."""
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


@pytest.mark.parametrize("along", ["x", "a"])
@pytest.mark.parametrize(
    "differentiate", [tangents, lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]], ids=["dual", "func"]
)
def test_forward_mode_is_refused_and_never_zero(differentiate, along) -> None:
    case = make(MANY, torch.float32)
    with pytest.raises(NotImplementedError, match=f"{along}: forward-mode differentiation is not supported"):
        differentiate(lambda t: call(case, **{along: t}), getattr(case, along))
    y = call(case)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(call(case), y)  # what has no tangent is computed


def test_a_batch_of_gradients_is_computed() -> None:
    case = make(MANY, torch.float32)
    x = case.x.clone().requires_grad_()
    y = call(case, x)
    wanted = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(y, x, wanted, retain_graph=True, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in wanted])
    assert torch.equal(found, one_by_one)
