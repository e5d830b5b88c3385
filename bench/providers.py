"""Ways to compute the layer: ours by backend and mode, and the strongest that others can be made to do.

A provider builds from one case's tensors what it needs (packs, modules) and gives a callable. Where it cannot do a case
it raises ``Cannot`` and there is no row: never another computation under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bench import baselines, onednn
from bench.built import Built, Cannot, leaf
from bench.peft_layer import peft
from bench.truth import SCALE, Inputs

BROKEN = ""  # why there is nothing of ours: a device must be calibrated by the baselines even then
try:
    import s3t_ext.lora.ops
    from s3t_ext.lora.kernels import IMPLS
except Exception as error:
    BROKEN, IMPLS = f"{type(error).__name__}: {error}", {}


class Provider(NamedTuple):
    """A name, the kind of its roofline ("": none), how to build it; ``listed``: devices where it is timed unasked."""

    name: str
    kind: str
    build: Callable[[Inputs], Built]
    mode: str = ""
    listed: tuple[str, ...] = ("cpu", "cuda")


def _ours(backend: str, mode: str, packed: bool = False) -> Callable[[Inputs], Built]:
    def build(i: Inputs) -> Built:
        on = i.x.device.type
        if backend == "triton" and on == "cpu":
            raise Cannot("the interpreter is never timed")
        if packed and on != "cpu":
            raise Cannot("packed weights are for the CPU")
        if BROKEN:
            raise Cannot(BROKEN)
        weight = s3t_ext.pack(i.weight, backward=i.case.step != "fwd") if packed else i.weight
        x, a, b = (leaf(t, i) for t in (i.x, i.a, i.b))

        def forward() -> Tensor:
            return s3t_ext.masked_lora_linear(
                x, weight, i.bias, a, b, i.ids, i.offsets, scale=SCALE, mode=mode, backend=backend
            )

        return Built(forward, x, [a, b], lambda grads: (grads[0], grads[1]))

    return build


def backends() -> list[str]:
    return sorted({name for op in ("shrink", "expand_", "linear", "layer", "outer") for name in IMPLS.get(op, {})})


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("bare", "bare", baselines.bare),
        Provider("auto-exact", "two", _ours("", "exact"), "exact"),
        Provider("auto-fast", "fast", _ours("", "fast"), "fast"),
        Provider("auto-exact-packed", "two", _ours("", "exact", packed=True), "exact"),
        Provider("auto-fast-packed", "fast", _ours("", "fast", packed=True), "fast"),
        *(  # on a CPU there is one backend, and `auto` takes its two ways
            Provider(f"{name}-{mode}", kind, _ours(name, mode), mode, listed=("cuda",))
            for name in backends()
            if name != "reference"
            for mode, kind in (("fused", "two"), ("split", "split"))
        ),
        Provider("reference-exact", "", _ours("reference", "exact"), "exact", listed=()),  # the truth: slow by design
        Provider("peft", "peft", peft(fp32_adapters=True)),
        Provider("peft-bf16", "naive", peft(fp32_adapters=False)),
        Provider("naive", "naive", baselines.naive),
        Provider("cat", "cat", peft(fp32_adapters=False, cat=True)),
        Provider("three_calls", "three", baselines.three_calls),
        Provider("addmm", "addmm", baselines.addmm),
        Provider("by_group", "", onednn.by_group),
        Provider("padded", "", onednn.padded),
        Provider("compile", "compile", baselines.compiled(baselines.Naive)),
        Provider("compile_cat", "", baselines.compiled(baselines.Concatenated, autotune=True)),
        Provider("onednn", "", onednn.onednn),
    )
}

OURS = tuple(name for name in PROVIDERS if name.split("-")[0] in ("auto", "reference", *backends()))
BASELINES = tuple(name for name in PROVIDERS if name not in OURS)
