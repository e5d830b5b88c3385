"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU: matrix instructions, no spills, shared memory.

The suite compiles a part; ``python python_tests/lora/ahead.py all bench/results/occupancy.csv`` compiles whatever the
table of tiles can launch and writes that table. S3T_OTHER_TRITON names a folder with another Triton to compile with.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import ahead
import pytest

from s3t_ext.lora.kernels.triton import entry
from s3t_ext.lora.kernels.triton.tiles import TABLE

pytest.importorskip("triton", reason=entry.WHY_NOT)
OTHER = os.environ.get("S3T_OTHER_TRITON", "")
HERE = Path(__file__).parent
COMPILERS = [
    pytest.param("", id="installed"),
    pytest.param(OTHER, id="other", marks=pytest.mark.skipif(not OTHER, reason="S3T_OTHER_TRITON names no folder")),
]
MATRIX = {("linear_kernel", 90): "wgmma.mma"}  # mma.sync elsewhere; only sums of fp32 have none
SUMS_ONLY = ("finish_kernel", "outer_kernel")  # may run without a product: they add partial sums


def run(*args: str, other: str = "") -> str:
    """Run ``ahead`` in a process of its own, where Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": other} if other else {}
    done = subprocess.run([sys.executable, HERE / "ahead.py", *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("other", COMPILERS)
def test_kernels_compile_and_fit(other, tmp_path) -> None:
    run("few", str(tmp_path / "few.csv"), other=other)
    with (tmp_path / "few.csv").open() as file:
        rows = list(csv.DictReader(file))
    for r in rows:
        print(*(r[name].ljust(width) for name, width in zip(ahead.FIELDS, (18, 7, 3, 9, 12, 2, 2, 1, 3, 2, 6, 2, 10))))
    kernels = {"shrink_kernel", "finish_kernel", "expand_kernel", "outer_kernel", "outer_chunk_kernel", "linear_kernel"}
    assert {(r["kernel"], int(r["capability"])) for r in rows} == {(k, c) for k in kernels for c in ahead.CAPABILITIES}
    for row in rows:
        check(row)


def check(row: dict[str, str]) -> None:
    """Hold one compiled kernel against the limits of its device."""
    kernel, capability = row["kernel"], int(row["capability"])
    assert int(row["stack"]) == 0, row
    assert int(row["shared"]) <= ahead.LIMITS[capability][1], row
    assert int(row["blocks_per_sm"]) >= 1, row
    if row["type"] != "float32":
        wanted = MATRIX.get((kernel, capability), "mma.sync")
        assert row["matrix"] == wanted or (kernel in SUMS_ONLY and not row["matrix"]), row
        assert row["copies"] or not row["matrix"], row  # the loop over k is pipelined
    else:
        assert not row["matrix"], row  # IEEE fp32, never TF32


def test_the_number_of_rows_recompiles_nothing() -> None:
    code = """
import ahead, torch
for rows in ((5, 7), (200, 201, 208, 255, 256)):  # of one tile each
    calls = tuple(ahead.Call(t, g) for t in rows for g in (1, 4))
    launches = list(ahead.record(90, torch.bfloat16, calls))
    kinds = {(launch.kernel, str(launch.settings)) for launch in launches}
    assert len(ahead.different(iter(launches))) == len(kinds), rows
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_table_is_small() -> None:
    assert sum(map(len, TABLE.values())) <= 40


def test_the_committed_sweep_is_of_this_table_and_fits() -> None:
    """Every tile was compiled, as the committed table of occupancy says, by an old and a new Triton."""
    with (HERE.parents[1] / "bench/results/occupancy.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        check(row)
    kernels = {"shrink": "shrink_kernel", "expand_": "expand_kernel", "outer": "outer_kernel"}
    for version in ("3.6", "3.9"):
        swept = {(r["kernel"], int(r["capability"]), r["tile"]) for r in rows if r["triton"].startswith(version)}
        for (op, capability, _), lines in TABLE.items():
            for _, _, (m, n, k, *_) in lines:
                assert (kernels.get(op, "linear_kernel"), capability, f"{m}x{n}x{k}") in swept, (version, op, m, n, k)
