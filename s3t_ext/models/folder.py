"""Models in a folder: ``model.json`` (architecture and its arguments) and ``weights.safetensors``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from s3t_ext.models.base import BaseModel
from s3t_ext.models.mlp import MLP
from s3t_ext.models.vit import VisionTransformer

ARCHITECTURES: dict[str, type[BaseModel]] = {"vit": VisionTransformer, "mlp": MLP}


def build(architecture: str, arguments: dict) -> BaseModel:
    """Make a built-in model with random weights.

    Raises:
        ValueError: unknown architecture or arguments.
    """
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"model: expected one of {sorted(ARCHITECTURES)} or a model folder, got {architecture!r}")
    try:
        return ARCHITECTURES[architecture](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {architecture} does not take these arguments: {error}") from None


def save_model(folder: Path | str, model: nn.Module, architecture: str, arguments: dict) -> None:
    """Write a model folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps({"architecture": architecture, "arguments": arguments}, indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")


def load_model(folder: Path | str) -> BaseModel:
    """Load a model folder, frozen and in eval mode (rule: the base's own dropout is off).

    Raises:
        ValueError: the folder is none, or its files do not fit together.
    """
    folder = Path(folder)
    try:
        spec = json.loads((folder / "model.json").read_text())
        model = build(spec["architecture"], spec["arguments"])
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    except (
        OSError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        SafetensorError,
        RuntimeError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model: expected a folder with model.json and weights.safetensors that fit together at "
            f"{folder}, got {type(error).__name__}: {reason}"
        ) from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"model: expected finite weights in {folder}, got NaN or infinity")
    return model.eval().requires_grad_(False)


def model_hash(model: nn.Module) -> str:
    """Hash a model's parameters and buffers by name, type, shape and bytes (SHA-256, hex)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
