"""What may change a node's bits without changing its identity, and where two nodes can be compared. Loads no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any


def provenance(precision: str = "float32", device: str = "cpu") -> dict[str, Any]:
    """Describe what may change bits without changing a node's identity.

    All but ``threads`` and ``isa`` must agree to compare: in fp32 our kernels give the same bits on every instruction
    set and any number of threads; where they do not, in bf16, ``kernels`` names the set too. ``cpu`` guards what
    torch's own operators choose.

    Raises:
        ValueError: S3T_CPU names no instruction set of this processor.
    """
    import torch

    from s3t_ext.lora.kernels import backend_for, native

    if native.AVAILABLE:  # S3T_CPU, before any work: a call without rows looks at nothing else
        ids = torch.empty(1, 0, dtype=torch.int32)
        native.shrink(torch.empty(0, 1), torch.empty(0, 1, 1), None, ids, None, None, 1.0)
    isa = native.build_info()["isa"] if native.AVAILABLE else ""
    return {
        "s3t_ext": version("s3t-ext"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "libraries": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("MKL_", "ONEDNN_", "DNNL_", "ATEN_"))
        },
        "backend": backend_for("linear", torch.device("cpu"), torch.float32),
        "device": "" if device == "cpu" else torch.cuda.get_device_name(device),
        "kernels": isa if precision != "float32" else "",
        "isa": isa,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Name the processor's model: libraries choose their code by it."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        told = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in told.items()}
        parts = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
        return " ".join(fields[part] for part in parts if part in fields)
    return platform.processor()


def differences(theirs: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """List what forbids a comparison of what was trained there with what is trained here.

    Threads and instruction set of our kernels change no bit in fp32, and do not. Under ``mixed`` a node lists in what
    its ancestors' training differed from its own: nobody can train its whole path anew to the same bits.
    """
    found = [
        f"{name}: trained with {theirs.get(name)}, here {value}"
        for name, value in here.items()
        if name not in ("threads", "isa", "mixed") and theirs.get(name) != value
    ]
    return found + [f"above it {difference}" for difference in theirs.get("mixed", ())]
