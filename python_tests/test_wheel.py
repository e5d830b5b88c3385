"""The build: what the module is linked to, what a wheel holds, what the option S3T_CUDA does."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from s3t_ext.lora.kernels import native

ROOT = Path(__file__).parents[1]
LONG = bool(os.environ.get("S3T_LONG"))
TOOLS = ("scikit_build_core", "pybind11", "cmake", "ninja")
MISSING = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
BESIDE = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # the one just installed
CMAKE = shutil.which("cmake", path=BESIDE) or "cmake"
needs_compiler = pytest.mark.skipif(
    bool(MISSING) or shutil.which("c++") is None, reason=f"no compiler, or not installed: {' '.join(MISSING)}"
)


@pytest.mark.skipif(not native.AVAILABLE, reason=native.WHY_NOT)
@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_the_module_is_linked_to_neither_torch_nor_cuda_nor_openmp() -> None:
    listed = subprocess.run(["ldd", native._native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in listed
    for name in ("torch", "c10", "cuda", "omp", "python"):
        assert name not in listed.replace(str(ROOT), ""), listed


@pytest.mark.skipif(not native.AVAILABLE, reason=native.WHY_NOT)
def test_build_info() -> None:
    info = native.build_info()
    assert info["isa"] in info["isas"]
    assert bool(info["cuda"]) == bool(info["cuda_archs"]) == bool(native.CUDA)
    assert info["compiler"].split()[0] in ("gcc", "clang")


def test_a_module_that_does_not_load_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "s3t_ext"
    shutil.copytree(ROOT / "s3t_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_native.py").write_text("raise ImportError('libstdc++.so.6: version not found')")
    code = (
        "import sys, torch\n"
        "sys.meta_path[:] = [m for m in sys.meta_path if 'ScikitBuild' not in type(m).__name__]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from s3t_ext.lora.kernels import native\n"
        "print(native.AVAILABLE, native.WHY_NOT, native.CUDA)\n"
        "native.pack(torch.ones(2, 2))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith("False the compiled module s3t_ext._native did not load (libstdc++.so.6")
    assert "pip install" in run.stdout
    assert run.stderr.strip().splitlines()[-1].startswith("NotImplementedError: pack: the compiled module")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copy the sources to two places."""
    sources = [tmp_path_factory.mktemp(name) / "source" for name in ("one", "another-place")]
    for source in sources:
        source.mkdir()
        for part in ("csrc", "s3t_ext"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        for part in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, source / part)
        (source / "python_tests").mkdir()
        (source / "python_tests" / "test_stray.py").touch()
        (source / "bench").mkdir()
        (source / "bench" / "run.py").touch()
    return sources


@pytest.fixture(scope="module")
def wheels(places: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build the wheel at both, without its module: four minutes of compiling, where S3T_LONG=1."""
    paths = []
    for source in places:
        out = tmp_path_factory.mktemp("out")
        command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-build-isolation", "--no-deps", "-q", "-w"]
        if not LONG:
            command.insert(-1, "-Cwheel.cmake=false")
        subprocess.run([*command, str(out)], check=True, timeout=600)
        build = f"from scikit_build_core.build import build_sdist; build_sdist({str(out)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
        paths.append(next(out.glob("*.whl")))
    return paths


@needs_compiler
def test_two_builds_give_the_same_wheel(wheels: list[Path]) -> None:
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels)
    assert first == second


@needs_compiler
@pytest.mark.parametrize(
    "target",
    [
        "s3t_portable.dir/csrc/cpu/expand.cpp",
        pytest.param(
            "_native.dir/csrc/cuda/expand.cu",
            marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
        ),
    ],
)
def test_compiled_at_another_place_it_is_the_same(places: list[Path], tmp_path: Path, target: str) -> None:
    objects = []
    for number, source in enumerate(places):
        folder, cuda = tmp_path / str(number), "ON" if target.endswith(".cu") else "OFF"
        more = "-GNinja", "-DCMAKE_CUDA_ARCHITECTURES=80-real"
        done = configure(folder, cuda, shutil.which("nvcc") or "", source, *more)
        assert done.returncode == 0, done.stderr
        command = [CMAKE, "--build", folder / "build", "--target", f"CMakeFiles/{target}.o"]
        done = subprocess.run(command, env={**os.environ, "PATH": BESIDE}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        made, linked = folder / "build" / "CMakeFiles" / f"{target}.o", folder / "linked.so"
        command = ["c++", "-shared", "-s", "-Wl,--build-id=none", made, "-o", linked]
        subprocess.run(command, check=True)  # as installed, without local symbols: nvcc's are named after the place
        objects.append(linked.read_bytes())
    assert objects[0] == objects[1]


def named(names: list[str]) -> list[str]:
    """Of a package's files, name the compiled modules; what else is there must be Python of the package."""
    modules = [name for name in names if name.endswith(".so")]
    assert all(name.startswith("s3t_ext/") and name.endswith(".py") for name in set(names) - set(modules))
    return [Path(name).name.split(".")[0] for name in modules]


@needs_compiler
def test_a_wheel_holds_the_package_and_nothing_else(wheels: list[Path]) -> None:
    names = zipfile.ZipFile(wheels[0]).namelist()
    package = [name for name in names if not name.split("/")[0].endswith(".dist-info")]
    assert named(package) == ["_native"] * LONG
    with tarfile.open(next(wheels[0].parent.glob("*.tar.gz"))) as sdist:
        names = [name.split("/", 1)[1] for name in sdist.getnames()]
    assert "csrc/bind.cpp" in names
    assert not [name for name in names if name.startswith(("python_tests", "bench"))]


def test_what_is_installed_is_the_package_with_its_module() -> None:
    found = metadata.distribution("s3t-ext")
    files = [str(file) for file in found.files or ()]
    if "editable" in (found.read_text("direct_url.json") or ""):
        pytest.skip("installed in place")
    ours = [name for name in files if not name.startswith(("../", "s3t_ext-")) and not name.endswith(".pyc")]
    assert named(ours) == ["_native"]


def configure(tmp_path: Path, cuda: str, compiler: str, source: Path = ROOT, *more: str) -> subprocess.CompletedProcess:
    """Run CMake's first step alone, with one nvcc."""
    import pybind11

    command = [CMAKE, "-S", source, "-B", tmp_path / "build", f"-DS3T_CUDA={cuda}", *more]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    env = {**os.environ, "CUDACXX": compiler, "PATH": BESIDE}  # ninja too
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> str:
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_auto_builds_for_the_cpu_where_nvcc_does_not_work(tmp_path: Path, broken_nvcc: str) -> None:
    run = configure(tmp_path, "AUTO", broken_nvcc)
    assert run.returncode == 0, run.stderr
    assert "CPU kernels only (S3T_CUDA=AUTO)" in run.stdout


@needs_compiler
def test_on_fails_where_nvcc_does_not_work(tmp_path: Path, broken_nvcc: str) -> None:
    run = configure(tmp_path, "ON", broken_nvcc)
    assert run.returncode != 0
    assert "S3T_CUDA=ON, but no working nvcc was found" in run.stderr


@needs_compiler
def test_another_value_is_refused(tmp_path: Path) -> None:
    run = configure(tmp_path, "MAYBE", "")
    assert run.returncode != 0
    assert "S3T_CUDA must be AUTO, ON or OFF; got 'MAYBE'" in run.stderr
