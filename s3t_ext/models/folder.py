"""Base models in a folder: a built-in one, one of the transformers library, or any module with a description.

::

    model.json            {"architecture": "vit" or "package.module:factory", "arguments": {...}}; of a module of your
                          own also "features", "blocks" and "shape" or "vocabulary"; of a transformers folder, where it
                          is to be told, "blocks", "pooling" and "sees"
    weights.safetensors   of a built-in model or a module of your own
    config.json           of a transformers folder, with its *.safetensors
    tokenizer.json, ...   of a model for texts
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from s3t_ext.models.base import BaseModel
from s3t_ext.models.described import Described
from s3t_ext.models.files import BUILT_IN, base_files, local_folder, read_description
from s3t_ext.models.mlp import MLP
from s3t_ext.models.trial import try_out
from s3t_ext.models.vit import VisionTransformer

ARCHITECTURES: dict[str, type[BaseModel]] = dict(zip(BUILT_IN, (VisionTransformer, MLP), strict=True))


def build(architecture: str, arguments: dict) -> BaseModel:
    """Make a built-in model with random weights.

    Raises:
        ValueError: unknown architecture or arguments.
    """
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"model: expected one of {sorted(ARCHITECTURES)} or a model folder, got {architecture!r}")
    try:
        model = ARCHITECTURES[architecture](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {architecture} does not take these arguments: {error}") from None
    model.fingerprint = _hash([architecture, arguments])
    return model


def save_model(folder: Path | str, model: nn.Module, architecture: str, arguments: dict) -> None:
    """Write a model folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps({"architecture": architecture, "arguments": arguments}, indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")


def load_model(folder: Path | str, causal: bool | None = None) -> BaseModel:
    """Load a base model, frozen and in eval mode (rule: the base's own dropout is off), in float32.

    Args:
        folder: of the model, or the name of one on the Hugging Face hub.
        causal: hidden states of every token and an ``output`` layer, or pooled features; None: as the folder's own
            architecture does. A head that the folder brings for another task is dropped.

    Raises:
        ValueError: the folder is none, its files do not fit together, or the model is none that can be trusted with
            the promise of exactness.
    """
    folder = local_folder(folder)
    try:
        spec = read_description(folder)
        if "architecture" in spec or not (folder / "config.json").exists():
            model = _described(folder, spec, causal)
        else:
            from s3t_ext.models.huggingface import load

            model = load(folder, spec, causal)
            model.fingerprint = _fingerprint(folder)
        if spec.get("blocks"):  # somebody's own word for it
            try_out(model.eval().requires_grad_(False))
    except (
        OSError,
        ImportError,
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        RuntimeError,
    ) as error:
        raise _unfit(folder, error) from error
    except json.JSONDecodeError as error:
        raise _unfit(folder, error) from None
    if not all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()):
        raise ValueError(f"model: expected finite weights in {folder}, got NaN or infinity")
    return model.eval().requires_grad_(False)


def _unfit(folder: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"model: expected a folder with model.json and weights.safetensors, or with config.json and *.safetensors as "
        f"save_pretrained writes them, that fit together at {folder}, got {type(error).__name__}: {reason}"
    )


def _described(folder: Path, spec: dict, causal: bool | None) -> BaseModel:
    """Load a built-in model, or what a factory of the user's makes."""
    if causal:
        raise ValueError(f"model: expected a decoder of the transformers library for a causal task, got {folder}")
    where = folder / "model.json"
    if "architecture" not in spec:
        if spec:
            raise ValueError(f"{where}: expected 'architecture', for there is no config.json, got {sorted(spec)}")
        raise ValueError(f"model: expected a folder with a model.json or a config.json, got {folder}, which has none")
    architecture, arguments = spec["architecture"], spec.get("arguments", {})
    if ":" not in architecture:
        try:
            model = build(architecture, arguments)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        _load_weights(model, folder)
        return model
    module, _, factory = architecture.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{where}: architecture: expected an importable 'package.module:factory', got {architecture!r}: {error}"
        ) from error
    try:
        inner = make(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: arguments: {architecture} does not take {arguments}: {error}") from error
    _load_weights(inner, folder)
    model = Described(inner, spec, where)
    model.fingerprint = _fingerprint(folder)
    return model


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load a folder's weights; raise ValueError naming the file, and the weights that do not fit its ``model.json``."""
    file, made = folder / "weights.safetensors", model.state_dict()
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: expected weights as safetensors' save_file writes them, got {error}") from None
    wrong = [f"none for {name}" for name in made if name not in found]
    wrong += [f"{name}, which the model lacks" for name in found if name not in made]
    wrong += [
        f"{name} of shape {list(found[name].shape)} for {list(made[name].shape)}"
        for name in made
        if name in found and found[name].shape != made[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{file}: expected the weights of the architecture and arguments in model.json, got "
            f"{'; '.join(wrong[:3])}{more}"
        )
    model.load_state_dict(found)


def _fingerprint(folder: Path) -> str:
    """Hash what a folder says beside its weights: what its texts become, and what is done with them."""
    names = [name for name in base_files(folder) if not name.endswith(".safetensors")]
    return _hash({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_hash(model: nn.Module) -> str:
    """Hash a model's ``fingerprint`` and its parameters and buffers by name, type, shape and bytes (SHA-256, hex)."""
    digest = hashlib.sha256(getattr(model, "fingerprint", "").encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
