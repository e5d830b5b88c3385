"""Which way a call goes: by mode, device, type and rows, from one table."""

from __future__ import annotations

import pytest
import torch

from s3t_ext.lora.kernels import paths
from s3t_ext.lora.kernels.paths import MODES, Path, path_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_on_the_cpu() -> None:
    assert path_for("exact", CPU, torch.float32, 5) == Path(True, "native")
    assert path_for("fused", CPU, torch.bfloat16, 5) == Path(True, "native")
    assert path_for("split", CPU, torch.float32, 5) == Path(False, "native")
    assert path_for("exact", CPU, torch.float64, 5) == Path(True, "reference")
    assert path_for("split", CPU, torch.float32, 5, "reference") == Path(False, "reference")
    assert path_for("fast", CPU, torch.float32, 5, packed=True).fused, "panels are of no use to the library"


def test_exact_is_one_family_for_every_number_of_rows(monkeypatch) -> None:
    served = {"native", "triton", "reference"}

    def backend_for(op, device, dtype, wanted=""):
        if wanted and wanted not in served:
            raise NotImplementedError
        return wanted or "native"

    monkeypatch.setattr(paths, "backend_for", backend_for)
    for dtype, family in ((torch.float32, "native"), (torch.float16, "triton"), (torch.bfloat16, "triton")):
        assert {path_for("exact", CUDA, dtype, rows) for rows in (1, 64, 65, 8192)} == {Path(True, family)}
    served.remove("triton")
    assert {path_for("exact", CUDA, torch.bfloat16, rows) for rows in (1, 65)} == {Path(True, "native")}
    served.add("triton")
    assert path_for("exact", CUDA, torch.bfloat16, 1, "reference").backend == "reference", "an argument overrides it"
    assert [path_for("fast", CUDA, torch.bfloat16, rows).fused for rows in (1, 64, 65, 8192)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("device", paths.FAST)
def test_the_table_has_an_end(device) -> None:
    limits = [most for most, _ in paths.FAST[device]]
    assert limits == sorted(limits)
    assert limits[-1] == float("inf")
    assert {"exact", "fast", "fused", "split"} == set(MODES)
