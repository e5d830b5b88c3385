"""Every way to compute the layer is right or declines, and the strongest are as strong as they can be made."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import s3t_ext
from bench import measure, run
from bench.cases import CPU_DEFAULT, Case
from bench.measure import Log
from bench.providers import BASELINES, OURS, PROVIDERS
from bench.roofline import H100
from bench.truth import TYPES, make, plain, wrong
from s3t_ext.lora.kernels import IMPLS

CASE = Case(T=9, K=20, O=24, r=2, G=3, P=2, live=2, timer="all")


@pytest.mark.parametrize(
    ("step", "dtype", "groups"),
    [
        *itertools.product(["fwd"], ["fp32", "bf16"], [1, 3]),
        *(("bwd", "fp32", 3), ("bwd", "bf16", 1), ("fwdbwd", "fp32", 1), ("fwdbwd", "bf16", 3)),  # any two values meet
    ],
)
def test_every_provider_is_right_or_declines(step, dtype, groups) -> None:
    case = replace(CASE, step=step, dtype=dtype, G=groups)
    log = Log()
    with torch.set_grad_enabled(step != "fwd"):
        found = [provider.name for provider, _ in measure.ready(case, "cpu", PROVIDERS.values(), log)]
    assert not log.failures
    assert {"bare", "auto-exact", "auto-fast", "native-fused", "native-split", "naive", "addmm", "three_calls"} <= {
        *found
    }
    assert {*found} | {name for name, _ in log.declined} == {*PROVIDERS}
    assert ("cat" in found) == (groups == 1 and step == "fwd")  # PEFT concatenates for a whole batch, and not to train
    assert "onednn" in found
    assert ("padded" in found) == (groups > 1)
    assert ("by_group" in found) == (groups > 1 and step == "fwd")


def test_every_backend_is_a_provider() -> None:
    for backend in IMPLS["shrink"]:
        assert any(name.startswith(f"{backend}-") for name in OURS), backend
    assert {"auto-exact", "auto-fast", "auto-exact-packed", "auto-fast-packed"} <= {*OURS}
    assert {"peft", "peft-bf16", "naive", "cat", "three_calls", "addmm", "by_group", "padded"} | {
        "compile",
        "compile_cat",
        "onednn",
        "bare",
    } == {*BASELINES}


def test_a_packed_layer_that_trains_packs_the_transpose(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(s3t_ext, "pack", lambda weight, backward: asked.append(backward))
    for step in ("fwd", "fwdbwd"):
        PROVIDERS["auto-exact-packed"].build(make(replace(CASE, step=step), "cpu"))
    assert asked == [False, True]


@pytest.mark.parametrize(("groups", "ranks", "masks"), [(1, 2, 0), (3, 12, 2)])
def test_onednn_trains_one_group_without_a_mask(groups, ranks, masks) -> None:
    """The mask of one group is a constant: dead adapters are left out and the scale is in b, as in forward alone."""
    i = make(replace(CASE, step="fwdbwd", G=groups), "cpu")
    built = PROVIDERS["onednn"].build(i)
    assert [len(pool) for pool in built.leaves] == [ranks, ranks]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(built.forward(), [built.x, *built.leaves], i.dy)
    assert sum(event.name == "aten::mul_" for event in profile.events()) == masks


def test_no_kernel_is_timed_twice() -> None:
    """On a CPU `auto` takes the two ways of the one backend; asked for by name they are timed all the same."""
    on_cpu, on_gpu = ({p.name for p in run.chosen([], "", False, device)} for device in ("cpu", "cuda"))
    assert on_gpu - on_cpu == {name for name in OURS if name.startswith(("native", "triton"))}
    assert on_cpu == {*BASELINES} | {name for name in OURS if name.startswith("auto")}
    assert [p.name for p in run.chosen(["native-fused"], "", False, "cpu")] == ["native-fused"]


def test_the_interpreter_is_never_timed(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    log = Log()
    triton = [name for name in PROVIDERS if name.startswith("triton-")]
    assert measure.measure(CASE, "cpu", [PROVIDERS[n] for n in triton], H100, 0.01, log) == []
    assert not log.failures


# A private op, which a build of torch may lack: without the guard no test of the project would be collected there.
ONEDNN_BF16 = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not ONEDNN_BF16, reason="oneDNN has no bf16 on this processor")
def test_compile_is_frozen_and_right() -> None:
    """The compiled baseline must be the strongest form: weights prepacked, which inductor does only when it freezes."""
    case = replace(CPU_DEFAULT, dtype="bf16")
    i = make(case, "cpu")
    with torch.no_grad():
        built = PROVIDERS["compile"].build(i)
        assert not wrong({"y": built.forward()}, plain(i, TYPES["bf16"]), plain(i, torch.float64), i)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            built.forward()
    assert any("mkldnn" in event.key for event in profile.key_averages())
