"""Which way a call goes: by mode, device, type and rows, from one table."""

from __future__ import annotations

import pytest
import torch

from s3t_ext.lora.kernels import paths
from s3t_ext.lora.kernels.paths import MODES, Path, path_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_on_the_cpu() -> None:
    assert {"exact", "fast", "fused", "split"} == set(MODES)
    assert path_for("exact", CPU, torch.float32, 5) == Path(True, "native")
    assert path_for("fused", CPU, torch.bfloat16, 5) == Path(True, "native")
    assert path_for("split", CPU, torch.float32, 5) == Path(False, "native")
    assert path_for("exact", CPU, torch.float64, 5) == Path(True, "reference")
    assert path_for("split", CPU, torch.float32, 5, "reference") == Path(False, "reference")
    assert path_for("fast", CPU, torch.bfloat16, 500, packed=True).fused, "panels are of no use to the library"
    assert not path_for("fast", CPU, torch.bfloat16, 500).fused
    assert path_for("fast", CPU, torch.float32, 500).fused
    assert path_for("fast", torch.device("meta"), torch.float32, 5, "reference") == Path(False, "reference")


def test_on_a_device(monkeypatch) -> None:
    """One family for every number of rows in mode exact; elsewhere what the table says, or the argument."""
    served = {"native", "triton", "reference"}
    monkeypatch.setattr(paths, "serves", lambda backend, *_: backend in served)
    monkeypatch.setattr(paths, "backend_for", lambda op, device, dtype, wanted="": wanted or "native")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {path_for("exact", CUDA, dtype, rows) for rows in (1, 64, 65, 8192)} == {Path(True, "triton")}
    assert [path_for("fused", CUDA, torch.bfloat16, rows).backend for rows in (64, 65)] == ["native", "triton"]
    assert [path_for("fast", CUDA, torch.bfloat16, rows).fused for rows in (1, 64, 65)] == [True, True, False]
    assert not path_for("fast", CUDA, torch.float32, 1).fused
    assert path_for("exact", CUDA, torch.bfloat16, 1, "reference").backend == "reference", "an argument overrides it"
    served.remove("triton")
    assert {path_for("exact", CUDA, torch.bfloat16, rows) for rows in (1, 65)} == {Path(True, "native")}


@pytest.mark.parametrize("lines", [*paths.FAST.values(), *paths.FUSED.values()])
def test_every_list_has_an_end(lines) -> None:
    limits = [most for most, _ in lines]
    assert limits == sorted(limits)
    assert limits[-1] == float("inf")
