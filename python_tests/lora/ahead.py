"""Compile Triton kernels ahead of time, with no GPU: what each launch of the tile table would run, and what it takes.

The host wrappers run on ``meta`` tensors with their launches recorded, so that what is compiled is what is launched.
As a program, in a process without TRITON_INTERPRET: ``python ahead.py few FILE.csv`` compiles each kernel for each type
and device; ``python ahead.py all FILE.csv [PROCESSES]`` all that the table can launch, and keeps in the file one line a
tile, the worst of its programs, beside the lines of other versions of Triton.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

CAPABILITIES = (80, 90)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
FILES = ("launch", "shrink", "expand", "outer", "linear")
FIELDS = (
    "kernel", "triton", "capability", "type", "tile", "warps", "stages", "programs", "registers", "stack", "shared",
    "blocks_per_sm", "matrix", "copies",
)  # fmt: skip
# registers, shared memory (of one block, of a multiprocessor), threads
LIMITS = {80: (65536, 163 << 10, 164 << 10, 2048), 90: (65536, 227 << 10, 228 << 10, 2048)}


class Launch(NamedTuple):
    """One recorded launch."""

    module: str
    kernel: str
    capability: int
    variant: str
    args: tuple
    settings: dict


class Call(NamedTuple):
    """What shapes and options a call has."""

    rows: int = 4096
    groups: int = 1
    slots: int = 1
    rank: int = 16
    dim: int = 4096
    drop: bool = False
    train: bool = False
    pool: torch.dtype | None = None
    number: bool = False
    offsets: bool = True

    def __str__(self) -> str:
        words = [f"T{self.rows}", f"G{self.groups}", f"P{self.slots}", f"r{self.rank}", f"D{self.dim}"]
        words += [name for name in ("drop", "train", "number") if getattr(self, name)]
        return " ".join(words + ["fp32-pool"] * (self.pool is not None) + ["one-group"] * (not self.offsets))


# Each line of the table is taken by one of these; then each option once.
SHAPES = tuple(
    Call(rows, groups, slots, rank)
    for (rows, groups), (slots, rank) in itertools.product(
        ((1, 1), (64, 75), (2048, 75), (256, 1), (8192, 1)), ((1, 8), (1, 16), (4, 16), (12, 16), (1, 64))
    )
)
OPTIONS = (
    Call(drop=True), Call(64, 75, drop=True, rank=64), Call(train=True), Call(pool=torch.float32, train=True),
    Call(number=True), Call(offsets=False), Call(rank=5, slots=3), Call(rank=300), Call(dim=300),
    *(Call(rows, dim=300, groups=5, slots=4) for rows in (64, 128, 256, 512)),  # off the copy engine
    Call(2048, 75, slots=4, drop=True, train=True), Call(128), Call(512), Call(512, 75, slots=4, train=True),
)  # fmt: skip


def record(capability: int, dtype: torch.dtype, calls: tuple[Call, ...]) -> Iterator[Launch]:
    """Run every wrapper on meta tensors and give the launches that differ in what is compiled."""
    found: list[tuple[str, Any, tuple, dict]] = []
    chip, *files = (importlib.import_module(f"s3t_ext.lora.kernels.triton.{name}") for name in FILES)
    for file in files:
        file.chip = lambda device: chip.Chip(capability, 132)
        file.launch = lambda kernel, grid, *args, _file=file, **settings: found.append(
            (_file.__name__, kernel, args, settings)
        )
    for call in calls:
        found.clear()
        run(call, dtype, files)
        for module, kernel, args, settings in found:
            yield Launch(module, kernel.fn.__name__, capability, str(call), args, settings)


def run(call: Call, dtype: torch.dtype, files: list[Any]) -> None:
    """Call all primitives once."""
    from s3t_ext.lora.kernels.dropout import Dropout

    def new(*size: int, as_: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=as_, device="meta")

    shrink, expand, outer, linear = files
    count = 4
    w = new(count, call.rank, call.dim, as_=call.pool or dtype)
    w1 = new(count, call.rank, call.dim, as_=dtype) if call.train else None
    ids = new(call.groups, call.slots, as_=torch.int32)
    offsets = new(call.groups + 1, as_=torch.int32) if call.offsets or call.groups > 1 else None
    scales = None if call.number else new(2 * count, as_=torch.float32)
    drop = None
    if call.drop:
        drop = Dropout(0.1, new(call.groups, as_=torch.int64), new(call.rows, as_=torch.int64), 0)
    x, y = new(call.rows, call.dim), new(call.rows, call.dim)
    s = new(call.rows, call.slots, call.rank)
    shrink.shrink(x, w, w1, ids, offsets, scales, 1.0, drop)
    expand.expand_(y, s, w, w1, ids, offsets, drop)
    for adapters in (1, 1000):
        outer.outer(s, x, ids, offsets, 0, adapters, call.pool or dtype, drop)
    weight, bias = new(call.dim, call.dim), None if call.number else new(call.dim)
    linear.linear(x, weight, None, s, w, w1, ids, offsets, call.dim, True, drop)
    if drop is None:
        linear.linear(x, weight, bias, s, w, w1, ids, offsets, call.dim, False)


def source_of(launch: Launch) -> tuple[Any, Any, dict]:
    """Give the source, target and options that Triton would compile for a launch; as ``JITFunction.run`` does it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from s3t_ext.lora.kernels.triton.launch import options

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    target = GPUTarget("cuda", launch.capability, 32)
    backend = make_backend(target)
    settings = {**launch.settings, **options(launch.settings["num_warps"]), "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, chosen = bind(*launch.args, **settings)
    chosen, signature, constants, attributes = kernel._pack_args(backend, settings, bound, specialization, chosen)
    return ASTSource(kernel, signature, constants, attributes), target, chosen.__dict__


def compile_one(launch: Launch) -> dict[str, Any]:
    """Compile a launch and read registers, stack, shared memory and instructions off the result."""
    import triton

    source, target, options = source_of(launch)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    dtype = next(a.dtype for a in launch.args if getattr(a, "is_floating_point", lambda: False)())
    settings, shared = launch.settings, compiled.metadata.shared
    edges = (("ROWS", "RANKS", "BLOCK_M"), ("COLUMNS", "BLOCK_N"), ("DEPTH", "BLOCK_K"))
    tile = "x".join(str(settings[name]) for names in edges for name in names if name in settings)
    file, _, multi, threads = LIMITS[launch.capability]
    warps = settings["num_warps"]
    blocks = min(file // (-(-registers * 32 // 256) * 256 * warps), multi // (shared + 1024), threads // (32 * warps))
    values = (
        launch.kernel, triton.__version__, launch.capability, str(dtype).removeprefix("torch."), tile, warps,
        settings["num_stages"], 1, registers, stack, shared, min(blocks, 32),
        "+".join(sorted(set(re.findall(r"wgmma\.mma|mma\.sync", ptx)))),
        "+".join(sorted(set(re.findall(r"cp\.async\.bulk\.tensor|cp\.async\.c[ag]", ptx)))),
    )  # fmt: skip
    return dict(zip(FIELDS, values))


def resources(cubin: bytes) -> tuple[int, int]:
    """Read registers a thread and bytes of stack (spills) off a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said.stdout)
    assert used, said.stdout
    return int(used[1]), int(used[2]) + int(used[3])


def different(launches: Iterator[Launch]) -> list[Launch]:
    """Drop launches that compile to the same program as an earlier one."""
    kept: dict[str, Launch] = {}
    for launch in launches:
        source, target, options = source_of(launch)
        kept.setdefault(f"{source.hash()}-{target}-{options['num_warps']}-{options['num_stages']}", launch)
    return list(kept.values())


def plan(full: bool) -> list[Launch]:
    """List the launches to compile: all that the table can give, or each kernel, type and device once or twice."""
    launches: list[Launch] = []
    for capability, dtype in itertools.product(CAPABILITIES, TYPES):
        calls: tuple[Call, ...] = (Call(2048, 75), Call(64, 1, slots=4, drop=True, train=True))
        if full and dtype != torch.float16:  # fp16 has the tiles and the instructions of bf16
            calls += SHAPES + OPTIONS
        if full or dtype != torch.float16:
            launches += record(capability, dtype, calls)
    return different(iter(launches))


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the programs of each kernel, type, device and tile: the most of each resource, the fewest blocks."""
    joined: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        kept = joined.setdefault(tuple(row[name] for name in (*FIELDS[:7], "matrix")), {**row, "programs": 0})
        kept["programs"] += 1
        for name in ("registers", "stack", "shared"):
            kept[name] = max(kept[name], row[name])
        kept["blocks_per_sm"] = min(kept["blocks_per_sm"], row["blocks_per_sm"])
        kept["copies"] = "+".join(sorted({*kept["copies"].split("+"), *row["copies"].split("+")} - {""}))
    return list(joined.values())


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter does not compile"
    torch.set_num_threads(1)
    full, path = sys.argv[1] == "all", Path(sys.argv[2])
    launches = plan(full)
    with ProcessPoolExecutor(int(sys.argv[3]) if len(sys.argv) > 3 else 2) as pool:
        rows = list(pool.map(compile_one, launches))
    if full:
        rows = worst(rows)
        if path.exists():
            with path.open() as file:
                rows += [row for row in csv.DictReader(file) if row["triton"] != rows[0]["triton"]]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: [str(row[name]) for name in FIELDS]))


if __name__ == "__main__":
    main()
