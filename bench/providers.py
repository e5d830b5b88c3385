"""Ways to compute the layer: ours by backend and mode, and the strongest that others can be made to do.

A provider builds from one case's tensors what it needs (packs, modules) and gives a callable. Where it cannot do a case
it raises ``Cannot`` and there is no row: never another computation under its name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import COMPILED
from bench.truth import SCALE, Inputs, Results

BROKEN = ""  # why there is nothing of ours: a device must be calibrated by the baselines even then
try:
    import s3t_ext.lora.ops
    from s3t_ext.lora.kernels import IMPLS
except Exception as error:
    BROKEN, IMPLS = f"{type(error).__name__}: {error}", {}


class Cannot(Exception):
    """The provider does not do this case; the message says why."""


class Built(NamedTuple):
    """A provider over one case: ``forward()`` is timed; gradients go to x and ``leaves``."""

    forward: Callable[[], Tensor]
    x: Tensor
    leaves: list[Tensor]
    pools: Callable[[list[Tensor]], tuple[Tensor, Tensor]]  # gradients of the leaves as da (N, r, K), db (N, r, O)


class Provider(NamedTuple):
    """A name, the kind of its roofline ("": none), how to build it; ``listed``: timed unless others are asked for."""

    name: str
    kind: str
    build: Callable[[Inputs], Built]
    mode: str = ""
    listed: bool = True


def step(built: Built, i: Inputs) -> Callable[[], object]:
    """Give what is timed. ``bwd`` runs the forward at its first call only, on the stream of that call."""
    leaves = [built.x, *built.leaves]
    if i.case.step == "fwd":
        return built.forward
    if i.case.step == "fwdbwd":
        return lambda: torch.autograd.grad(built.forward(), leaves, i.dy)
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(built.forward())
        return torch.autograd.grad(kept[0], leaves, i.dy, retain_graph=True)

    return backward


def results(built: Built, i: Inputs) -> Results:
    """Compute the case once: what ``truth.wrong`` judges."""
    y = built.forward()
    if i.case.step == "fwd":
        return {"y": y}
    dx, *rest = torch.autograd.grad(y, [built.x, *built.leaves], i.dy)
    found = {"dx": dx}
    if built.leaves:
        found["da"], found["db"] = built.pools(rest)
    return found | ({"y": y.detach()} if i.case.step == "fwdbwd" else {})


def _leaf(t: Tensor, i: Inputs) -> Tensor:
    return t.detach().requires_grad_(i.case.step != "fwd")


def _live(i: Inputs) -> list[int]:
    return [n for _, live in i.groups for n in live]


def _scatter(i: Inputs, live: list[int]) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Give dense pools from one gradient for each live adapter, all of a before all of b."""

    def pools(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        both = []
        for like, part in ((i.a, grads[: len(live)]), (i.b, grads[len(live) :])):
            full = torch.zeros_like(like)
            for n, grad in zip(live, part):
                full[n] = grad if grad.shape == full[n].shape else grad.t()
            both.append(full)
        return both[0], both[1]

    return pools


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(backend: str, mode: str, packed: bool = False) -> Callable[[Inputs], Built]:
    def build(i: Inputs) -> Built:
        on = i.x.device.type
        if backend == "triton" and on == "cpu":
            raise Cannot("the interpreter is never timed")
        if packed and on != "cpu":
            raise Cannot("packed weights are for the CPU")
        if BROKEN:
            raise Cannot(BROKEN)
        weight = s3t_ext.pack(i.weight) if packed else i.weight
        x, a, b = (_leaf(t, i) for t in (i.x, i.a, i.b))

        def forward() -> Tensor:
            return s3t_ext.masked_lora_linear(
                x, weight, i.bias, a, b, i.ids, i.offsets, scale=SCALE, mode=mode, backend=backend
            )

        return Built(forward, x, [a, b], lambda grads: (grads[0], grads[1]))

    return build


def backends() -> list[str]:
    return sorted({name for op in ("shrink", "expand_", "linear", "layer", "outer") for name in IMPLS.get(op, {})})


# --- the library's ---------------------------------------------------------------------------------------------------


def _bare(i: Inputs) -> Built:
    x = _leaf(i.x, i)
    return Built(lambda: F.linear(x, i.weight, i.bias), x, [], lambda grads: (i.a, i.b))


class Naive(nn.Module):
    """PEFT's loop in plain torch, one parameter for each live adapter, group by group."""

    def __init__(self, i: Inputs) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias))
        grad = i.case.step != "fwd"
        self.a = nn.ParameterList([nn.Parameter(i.a[n].clone(), grad) for n in _live(i)])  # (r, K) each
        self.b = nn.ParameterList([nn.Parameter(i.b[n].t().contiguous(), grad) for n in _live(i)])  # (O, r) each
        self.groups = [(rows.start, rows.stop, len(live)) for rows, live in i.groups]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (T, O)
        parts, at = [], 0
        for lo, hi, count in self.groups:
            rows, part = (x, y) if len(self.groups) == 1 else (x[lo:hi], y[lo:hi])
            for n in range(at, at + count):
                part = part + F.linear(F.linear(rows, self.a[n]), self.b[n]) * SCALE
            parts.append(part)
            at += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _naive(i: Inputs) -> Built:
    module, x = Naive(i), _leaf(i.x, i)
    return Built(lambda: module(x), x, [*module.a, *module.b], _scatter(i, _live(i)))


def _compiled(i: Inputs) -> Built:
    if i.case not in COMPILED:
        raise Cannot("compiled for four cases only")
    import torch._inductor.config

    module = torch.compile(Naive(i).eval(), fullgraph=True)
    # Freezing prepacks weights on the CPU. As an option of torch.compile it did nothing (torch 2.13), so it is set
    # while the first call compiles; on a device there is nothing to prepack.
    with torch._inductor.config.patch(freezing=i.x.device.type == "cpu"):
        module(i.x)
    return Built(lambda: module(i.x), i.x, [], lambda grads: (i.a, i.b))


def _addmm(i: Inputs) -> Built:
    """Add each adapter by ``addmm`` with alpha, as Unsloth does: in place without gradients."""
    live, x = _live(i), _leaf(i.x, i)
    at = {n: index for index, n in enumerate(live)}
    a = [_leaf(i.a[n], i) for n in live]  # (r, K) each
    b = [_leaf(i.b[n], i) for n in live]  # (r, O) each
    groups, grad = i.groups, i.case.step != "fwd"

    def forward() -> Tensor:
        y = F.linear(x, i.weight, i.bias)  # (T, O)
        parts = []
        for rows, names in groups:
            part, own = (y, x) if len(groups) == 1 else (y[rows], x[rows])
            for n in names:
                s = own @ a[at[n]].t()  # (rows, r)
                part = torch.addmm(part, s, b[at[n]], alpha=SCALE) if grad else part.addmm_(s, b[at[n]], alpha=SCALE)
            parts.append(part)
        return y if not grad else parts[0] if len(parts) == 1 else torch.cat(parts)

    return Built(forward, x, [*a, *b], _scatter(i, live))


def _mask(i: Inputs) -> Tensor:
    """Give the scale of each column of s for each row: 0 where the row's group does not name the adapter. (T, N r)"""
    mask = torch.zeros(i.case.T, i.case.N, i.case.r, device=i.x.device, dtype=i.x.dtype)  # (T, N, r)
    for rows, live in i.groups:
        mask[rows, live] = SCALE
    return mask.flatten(1)


def _three(base: Callable[[Inputs, Tensor], Callable[[], Tensor]]) -> Callable[[Inputs], Built]:
    """All adapters by three calls: one product, the mask, ``addmm``; the mask is made beforehand."""

    def build(i: Inputs) -> Built:
        x, a, b = _leaf(i.x, i), _leaf(i.a.flatten(0, 1), i), _leaf(i.b.flatten(0, 1), i)  # (T, K), (N r, K), (N r, O)
        mask, product, grad = _mask(i), base(i, x), i.case.step != "fwd"

        def forward() -> Tensor:
            y, s = product(), (x @ a.t()) * mask  # (T, O), (T, N r)
            return torch.addmm(y, s, b) if grad else y.addmm_(s, b)

        return Built(forward, x, [a, b], lambda grads: (grads[0].view_as(i.a), grads[1].view_as(i.b)))

    return build


def _onednn_base(i: Inputs, x: Tensor) -> Callable[[], Tensor]:
    ops = torch.ops.mkldnn
    if x.device.type != "cpu" or not hasattr(ops, "_linear_pointwise"):
        raise Cannot("oneDNN's prepacked linear is for the CPU")
    if i.case.step != "fwd":
        raise Cannot("oneDNN's prepacked linear has no backward")
    packed = ops._reorder_linear_weight(i.weight, len(x))
    return lambda: ops._linear_pointwise(x, packed, i.bias, "none", [], "")


# --- PEFT's ----------------------------------------------------------------------------------------------------------


def _peft(fp32_adapters: bool, cat: bool = False) -> Callable[[Inputs], Built]:
    """Real PEFT: one nn.Linear with the live adapters active, or by adapter_names where a row has one adapter."""

    def build(i: Inputs) -> Built:
        case = i.case
        if importlib.util.find_spec("peft") is None:
            raise Cannot("peft is not installed")
        if case.G > 1 and (case.P > 1 or cat):
            raise Cannot("PEFT routes one adapter a row")
        if cat and case.step != "fwd":
            raise Cannot("a concatenated copy trains no adapter")
        if not fp32_adapters and not cat and case.dtype == "fp32":
            raise Cannot("the same as peft where everything is fp32")
        if case.G > 1 and case.timer == "graph":
            raise Cannot("PEFT's mixed batches copy indices from the host: no CUDA graph")
        return _peft_layer(i, fp32_adapters, cat)

    return build


def _peft_layer(i: Inputs, fp32_adapters: bool, cat: bool) -> Built:
    from peft import LoraConfig, get_peft_model

    case, live, x = i.case, _live(i), _leaf(i.x, i)
    linear = nn.Linear(1, 1, device=i.x.device, dtype=i.x.dtype)
    linear.weight, linear.bias = nn.Parameter(i.weight, False), nn.Parameter(i.bias, False)
    linear.in_features, linear.out_features = case.K, case.O
    config = LoraConfig(r=case.r, lora_alpha=round(SCALE * case.r), target_modules=["0"])
    names = [f"adapter{n}" for n in live]
    model = get_peft_model(nn.Sequential(linear), config, names[0], autocast_adapter_dtype=fp32_adapters)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=fp32_adapters)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, n in zip(names, live):
            layer.lora_A[name].weight.copy_(i.a[n])  # (r, K)
            layer.lora_B[name].weight.copy_(i.b[n].t())  # (O, r)
    active = names
    if cat:
        model.add_weighted_adapter(names, [1.0] * len(names), "cat", combination_type="cat")
        active = ["cat"]
    model.base_model.set_adapter(active)
    model.eval()
    leaves = [pool[name].weight for pool in (layer.lora_A, layer.lora_B) for name in names]
    if case.G == 1:
        return Built(lambda: layer(x), x, leaves, _scatter(i, live))
    by_row = [f"adapter{ids[0]}" for rows, ids in i.groups for _ in range(rows.stop - rows.start)]
    return Built(lambda: layer(x, adapter_names=by_row), x, leaves, _scatter(i, live))


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("bare", "bare", _bare),
        Provider("auto-exact", "two", _ours("", "exact"), "exact"),
        Provider("auto-fast", "fast", _ours("", "fast"), "fast"),
        Provider("auto-exact-packed", "two", _ours("", "exact", packed=True), "exact"),
        Provider("auto-fast-packed", "fast", _ours("", "fast", packed=True), "fast"),
        *(
            Provider(f"{name}-{mode}", kind, _ours(name, mode), mode)
            for name in backends()
            if name != "reference"
            for mode, kind in (("fused", "two"), ("split", "split"))
        ),
        Provider(
            "reference-exact", "", _ours("reference", "exact"), "exact", listed=False
        ),  # the truth: slow by design
        Provider("peft", "peft", _peft(fp32_adapters=True)),
        Provider("peft-bf16", "naive", _peft(fp32_adapters=False)),
        Provider("naive", "naive", _naive),
        Provider("cat", "cat", _peft(fp32_adapters=False, cat=True)),
        Provider("three_calls", "three", _three(lambda i, x: lambda: F.linear(x, i.weight, i.bias))),
        Provider("addmm", "addmm", _addmm),
        Provider("compile", "compile", _compiled),
        Provider("onednn", "three", _three(_onednn_base)),
    )
}

OURS = tuple(name for name in PROVIDERS if name.split("-")[0] in ("auto", "reference", *backends()))
BASELINES = tuple(name for name in PROVIDERS if name not in OURS)
