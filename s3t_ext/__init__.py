"""Exact machine unlearning with masked stacks of slice LoRA adapters (S3T, arXiv 2406.16257).

Names are loaded on first use: ``import s3t_ext`` imports neither torch nor triton nor peft and touches no device.
"""

from __future__ import annotations

import importlib

_PUBLIC = {
    "masked_lora": "s3t_ext.lora.ops",
    "masked_lora_linear": "s3t_ext.lora.ops",
    "pack": "s3t_ext.lora.ops",
    "Packed": "s3t_ext.lora.ops",
    "adapt": "s3t_ext.lora.nn",
    "pack_layers": "s3t_ext.lora.nn",
    "MaskedLoRALinear": "s3t_ext.lora.nn",
    "Routing": "s3t_ext.lora.routing",
    "from_peft": "s3t_ext.lora.peft",
    "to_peft": "s3t_ext.lora.peft",
    "StageTree": "s3t_ext.plan",
    "Schema": "s3t_ext.system.data.schema",
    "Table": "s3t_ext.system.data.tables",
    "read_table": "s3t_ext.system.data.tables",
    "Config": "s3t_ext.system.config",
    "Settings": "s3t_ext.system.settings",
    "fit": "s3t_ext.system.fit",
    "Service": "s3t_ext.system.serve",
    "delete": "s3t_ext.system.unlearn",
    "heal": "s3t_ext.system.heal",
    "status": "s3t_ext.system.status",
    "verify": "s3t_ext.system.verify",
    "audit": "s3t_ext.system.audit",
    "backup": "s3t_ext.system.backup",
    "restore": "s3t_ext.system.restore",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("s3t-ext")
    if name not in _PUBLIC:
        raise AttributeError(f"module 's3t_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
