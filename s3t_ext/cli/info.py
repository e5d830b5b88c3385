"""``s3t info``: what is installed and what serves what; paste it into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("s3t-ext", "torch", "triton", "numpy", "scipy", "safetensors", "cryptography", "peft", "transformers")


def add(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Report versions, processor, devices and backends."""
    import torch

    from s3t_ext.lora.kernels import IMPLS, backend_for, native

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": platform.machine(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "native": native.build_info() if native.AVAILABLE else {"missing": native.WHY_NOT},
        "devices": devices,
        "backends": {
            op: {kind: _serving(backend_for, op, kind) for kind in ("cpu", *(["cuda"] if devices else []))}
            for op in IMPLS
        },
    }
    return 0, report, _text(report)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _serving(backend_for, op: str, kind: str) -> dict[str, str]:
    import torch

    return {
        str(t).removeprefix("torch."): backend_for(op, torch.device(kind), t)
        for t in (torch.float32, torch.float16, torch.bfloat16)
    }


def _text(report: dict) -> str:
    native = report["native"]
    lines = ["  ".join(f"{k} {v}" for k, v in report["versions"].items() if v)]
    lines.append("not installed: " + ", ".join(k for k, v in report["versions"].items() if not v))
    lines.append(
        f"machine {report['machine']}, torch capability {report['torch_cpu_capability']}, {report['threads']} threads"
    )
    lines.append("native module: " + ", ".join(f"{k} {v or 'none'}" for k, v in native.items()))
    if not native.get("missing") and not native.get("cuda"):
        lines.append("CUDA: not built in (no nvcc when this was compiled, or S3T_CUDA=OFF)")
    lines.append(f"devices: cpu{''.join(', ' + d for d in report['devices'])}")
    for op, kinds in report["backends"].items():
        lines.append(
            f"  {op:<8} "
            + "; ".join(f"{kind}: " + ", ".join(f"{t} {b}" for t, b in by.items()) for kind, by in kinds.items())
        )
    return "\n".join(lines)
