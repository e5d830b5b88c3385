"""What a row says of where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time

import torch

from bench import ROOT


def threads(timer: str) -> int:
    """Threads of a CPU timer: one, or as many as this process may use."""
    return 1 if timer == "1t" else len(os.sched_getaffinity(0))


def device_name(device: str) -> str:
    """Name the device in letters that a file name may have."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as lines:
            found = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{found[0] if found else platform.machine()} {threads('all')} cores"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def describe(device: str, program: str = "bench.run") -> dict[str, object]:
    """Give the columns that all rows of a run of a program share."""
    state = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": device_name(device),
        "driver": _driver(device),
        "versions": "; ".join(
            f"{name} {_version(name)}" for name in ("torch", "triton", "peft", "transformers", "s3t-ext")
        )
        + f"; python {platform.python_version()}",
        "commit": os.environ.get("S3T_BENCH_COMMIT")
        or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        or "unknown",
        "dirty": "unknown" if state is None else int(bool(state)),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", program, *map(_named, sys.argv[1:])]),
    }


def _named(word: str) -> str:
    """Leave of an absolute path its last name: where a folder lies is this machine's own affair."""
    return os.path.basename(word.rstrip("/")) if os.path.isabs(word) else word


def _driver(device: str) -> str:
    if device == "cuda":
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    from s3t_ext.lora.kernels import native

    kernel = platform.release().partition("-")[0]
    return f"{kernel} {native.build_info()['isa'] if native.AVAILABLE else 'no native module'}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
