"""Runs the CUDA sources (csrc/cuda/*.cu) on the CPU: compiled as C++17 with the headers of this folder in CUDA's place.

``native.py`` and ``bind.cpp`` are the real ones; only tensors stay on the CPU. See emulator.cpp for what is caught.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import mmap
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from s3t_ext.lora.kernels import native

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
COMPILER = shutil.which("g++")
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w")
_MACROS = ("-U_FORTIFY_SOURCE", "-DS3T_EMULATE", "-DS3T_WITH_CUDA", '-DS3T_CUDA_VERSION=""', '-DS3T_CUDA_ARCHS=""')


def library(folder: Path, sources: list[Path]) -> Path:
    """Compile what changed since the last time, and link it with the emulator; one process waits for another.

    Args:
        folder: keeps the objects.
        sources: C++ or CUDA; the headers of csrc and of this folder are found.
    """
    import pybind11

    headers = [*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.*h"), *HERE.glob("*.h")]
    include = [HERE, CSRC, CSRC / "cuda", sysconfig.get_path("include"), pybind11.get_include()]
    base = hashlib.sha256(b"".join(f.read_bytes() for f in [*sorted(headers), Path(__file__)]))

    def compiled(source: Path) -> Path:
        digest = base.copy()
        digest.update(source.read_bytes())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            command = [
                str(COMPILER),
                *_FLAGS,
                *_MACROS,
                *(f"-I{i}" for i in include),
                "-x",
                "c++",
                "-c",
                source,
                "-o",
                target,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        return target

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compiled, [*sources, HERE / "emulator.cpp"]))
        name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        target = folder / f"{name}.so"
        if not target.exists():
            subprocess.run([str(COMPILER), "-shared", *objects, "-o", target], check=True)
    return target


def build(folder: Path, kernels: list[Path] | None = None) -> ModuleType:
    """Load ``bind.cpp`` over emulated kernels: by default all of csrc/cuda."""
    sources = [CSRC / "bind.cpp", CSRC / "direct.cpp", CSRC / "cpu" / "check.cpp"]
    path = library(folder, [*(kernels or sorted((CSRC / "cuda").glob("*.cu"))), *sources])
    spec = importlib.util.spec_from_file_location("cuda_emulator._native", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.settings = ctypes.CDLL(str(path)).emulator_settings
    return module


@contextmanager
def emulated(module: ModuleType, seed: int = 0, capability: int = 9, multiprocessors: int = 132) -> Iterator[None]:
    """Let the native backend of this process run the emulated kernels (``pack`` has none and stays as it is)."""
    module.settings(seed, capability, multiprocessors)
    names = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    mixed = SimpleNamespace(**{**names, "pack": native._native.pack, "build_info": native._native.build_info})
    with (
        patch.object(native, "_native", mixed),
        patch.object(native, "_where", lambda tensor: (1, 0, 0)),
        patch.object(native, "direct", lambda *_: None),  # it would run the CPU's kernels
    ):
        yield


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor) -> Tensor:
    """Copy a contiguous tensor to where the page after its last byte cannot be touched; the copy is never freed."""
    size, page = max(tensor.numel() * tensor.element_size(), 1), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0)
    if tensor.numel() == 0:
        return tensor
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
    return view.view(tensor.shape).copy_(tensor)
