"""What nvcc makes of the CUDA kernels: nothing spills, tensor cores and 16-byte accesses are there, blocks fit.

The kernels are those of the installed module where it was built after the last change of csrc, else compiled here.
``pytest -s`` prints the table of registers, shared memory and blocks on a multiprocessor.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from s3t_ext.lora.kernels import native

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
NVCC = shutil.which("nvcc")
ARCHS = (80, 90)
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block may have; a multiprocessor has 1 KB more


def _cuobjdump() -> str | None:
    spec = find_spec("triton")
    if spec and spec.submodule_search_locations:
        inside = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.exists():
            return str(inside)
    return shutil.which("cuobjdump")


TOOL = _cuobjdump()
pytestmark = pytest.mark.skipif(NVCC is None or TOOL is None, reason="no nvcc on PATH, or no cuobjdump beside it")


@dataclass
class Kernel:
    """One entry point of one cubin."""

    file: str
    arch: int
    name: str  # mangled
    registers: int = 0
    stack: int = 0  # spilled registers lie there
    shared: int = 0  # static, and on 9.0 under clusters the system's 1 KB
    sass: list[str] = field(default_factory=list)

    @property
    def half(self) -> bool:
        return "6__half" in self.name or "__nv_bfloat16" in self.name

    @property
    def singly(self) -> bool:
        """For rows that cannot be read 16 bytes at a time, and nothing else."""
        return re.search(r"single_kernelILi\d+ELb[01]ELb0E", self.name) is not None

    @property
    def threads(self) -> int:
        return 128 if "expand_kernel" in self.name else 256

    @property
    def dynamic(self) -> int:
        """Shared memory that the launch asks for: the sizes of Parts, Deal, and the rings of the linear kernels."""
        tile = re.search(r"shrink_kernelI.*Li(\d)ELi(\d)E", self.name)
        if tile:
            across, down = map(int, tile.groups())
            return 8 * (8 * down) * (16 * across + 4) * 4
        tile = re.search(r"half_kernelI.*?Li(\d)ELi(\d)E", self.name)
        if tile:
            across, down = map(int, tile.groups())
            return (65536 if across == 1 else 98304) + 1032 + 8 * 8 * down  # the ring, then Runs
        tile = re.search(r"single_kernelI.*?Li(\d+)E", self.name)
        if tile:
            return 65536 + (1152 + 8) * int(tile[1]) + 1032
        return 8 * 4 * 2 * 32 * 16 if "outer_kernel" in self.name else 0

    @property
    def blocks(self) -> int:
        """Blocks on a multiprocessor, by registers (given out by 256 to a warp), shared memory and threads."""
        registers = 65536 // (-(-self.registers * 32 // 256) * 256 * self.threads // 32)
        shared = self.shared + self.dynamic + 1024
        return min(registers, (SHARED[self.arch] + 1024) // shared, 2048 // self.threads)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, op) is not None for op in self.sass)

    @property
    def burst(self) -> int:
        """The most loads of 16 bytes that stand together: no branch and no product between the first and the last."""
        longest = run = 0
        for op in self.sass:
            if re.match(r"FFMA|HMMA|BRA|BSSY|BSYNC|CALL|RET", op):
                run = 0
            run += re.match(r"LDG\.E\..*128", op) is not None
            longest = max(longest, run)
        return longest


def is_installed() -> bool:
    """Tell whether the installed module has these kernels, for these devices."""
    if not native.CUDA:
        return False
    built = {arch.removesuffix("-real") for arch in native.build_info()["cuda_archs"]}
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    changed = max(source.stat().st_mtime for source in sources)
    return set(map(str, ARCHS)) <= built and Path(native._native.__file__).stat().st_mtime > changed


def compiled(folder: Path, source: Path, arch: int) -> Path:
    """Compile one file for one architecture, if it has changed since the last time."""
    headers = [*CUDA.glob("*.*h"), *CUDA.parent.glob("*.h")]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in [source, *sorted(headers)])).hexdigest()[:16]
    cubin = folder / f"{source.stem}-{arch}-{digest}.cubin"
    if not cubin.exists():
        whole = cubin.with_suffix(f".{os.getpid()}")
        command = [str(NVCC), "-std=c++17", f"-arch=sm_{arch}", "-cubin", source, "-o", whole]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        whole.rename(cubin)
    return cubin


def read(binary: Path, arch: int) -> list[Kernel]:
    """List the kernels in a cubin or a module: resources and instructions."""
    kernels: dict[str, Kernel] = {}
    for line in _dumped("-res-usage", binary, arch):
        if found := re.search(r"Function (\w+):", line):
            name = found[1]
            file = next(f.name for f in SOURCES if f"s3t_{f.stem}_args" in name)
            kernels[name] = Kernel(file, arch, name)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernels[name].registers, kernels[name].stack, kernels[name].shared = registers, stack + local, shared
    for line in _dumped("-sass", binary, arch):
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)", line):
            kernels[name].sass.append(found[1].rstrip(";"))
    return list(kernels.values())


def _dumped(what: str, binary: Path, arch: int) -> list[str]:
    command = [str(TOOL), what, "-arch", f"sm_{arch}", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def kernels(compiled_once) -> list[Kernel]:
    if is_installed():
        return [kernel for arch in ARCHS for kernel in read(Path(native._native.__file__), arch)]
    folder = compiled_once("cuda_compile")
    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda job: compiled(folder, *job), jobs))
    return [kernel for cubin, (_, arch) in zip(cubins, jobs) for kernel in read(cubin, arch)]


def test_every_file_has_kernels_for_every_architecture(kernels) -> None:
    assert {(k.file, k.arch) for k in kernels} == {(s.name, arch) for s in SOURCES for arch in ARCHS}
    print(f"\n{'kernel':60} arch  registers shared blocks warps")
    for k in sorted(kernels, key=lambda k: (k.file, k.name, k.arch)):
        name = re.sub(r"^_ZN3s3t4cuda(6linear)?\d+|Ev\w*$", "", k.name)
        name = name.replace("13__nv_bfloat16", "bf16,").replace("6__half", "f16,")
        resident = f"{k.blocks:6} {k.blocks * k.threads // 32:5}"
        print(f"{name[:60]:60} sm_{k.arch} {k.registers:9} {k.shared + k.dynamic:6} {resident}")


def test_nothing_spills(kernels) -> None:
    assert not [(k.arch, k.name, k.stack) for k in kernels if k.stack]
    assert all(k.registers for k in kernels)


def test_blocks_fit(kernels) -> None:
    for k in kernels:
        assert k.registers <= 255
        assert k.shared <= 48 << 10
        assert k.shared + k.dynamic <= SHARED[k.arch]
        assert k.blocks >= 1, (k.arch, k.name)


def test_instructions(kernels) -> None:
    for k in kernels:
        assert (k.count(r"HMMA\.16816\.F32") > 0) == k.half, (k.arch, k.name)
        assert k.singly or k.count(r"(LDG|LDGSTS)\.E\..*128") > 0, (k.arch, k.name)
        assert k.count(r"(LDL|STL)") == 0, (k.arch, k.name)
        if k.arch >= 90 and k.file == "linear.cu":  # it waits for shrink before it reads s
            assert k.count("ACQBULK") == 1, (k.arch, k.name)
        if not k.half:  # the order of fp32 sums is a contract: fused where it says so
            assert k.count("FFMA") > 0, (k.arch, k.name)
            assert k.count("HMMA") == 0, (k.arch, k.name)


def test_loads_of_fp32_overlap(kernels) -> None:
    """Where 16 bytes can be read at once, and between two words of dropout, loads do not wait for each other."""
    wide = [k for k in kernels if not (k.half or k.singly)]
    assert len(wide) == len(ARCHS) * 11  # linear has four, shrink three, expand and outer two
    for k in wide:
        drops = re.search(r"(shrink_kernelIfLi1ELi\d|(expand|outer)_kernelIf)E?Lb1E", k.name)
        assert k.burst >= (4 if drops else 10), (k.arch, k.name, k.burst)


@pytest.mark.parametrize("built", [(80,), (80, 89), (80, 90)], ids=str)
def test_host_asks_for_what_the_build_has(tmp_path, built) -> None:
    """A launch has clusters and overlap by the code that will run: a device newer than the build does not decide."""
    code = "".join(
        f"static_assert(s3t::cuda::newest_for({device}, {{__CUDA_ARCH_LIST__}}) =="
        f" {max((arch * 10 for arch in built if arch * 10 <= device), default=0)});\n"
        for device in (750, 800, 860, 890, 900, 1000)
    )
    source = tmp_path / "built.cu"
    source.write_text(f'#include "common.cuh"\n{code}')
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in built]
    command = [str(NVCC), "-std=c++17", f"-I{CUDA}", *archs, "-c", source, "-o", tmp_path / "built.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asking = [f.name for f in CUDA.iterdir() if "cudaDevAttrComputeCapability" in f.read_text()]
    assert asking == ["common.cuh"]
