"""A PEFT adapter folder as a model that the methods of this room work on, and back as a folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s3t_ext.approximate.adapter import AdaptedModel, OverFeatures, OverTransformers
from s3t_ext.lora.peft.files import CHANGES_BASE
from s3t_ext.lora.peft.refused import load_peft
from s3t_ext.models.files import TOKENIZER, local_folder, read_object
from s3t_ext.models.folder import load_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
HEAD = "head.safetensors"  # weight (C, F) and, if there is one, bias (C,): what reads the base's features
ABOUT = "unlearned.json"  # what was done to the adapter


# --- in --------------------------------------------------------------------------------------------------------------


def load_adapter(
    folder: Path | str, base: Path | str, task: str, outputs: int = 0, text: bool = False, seed: int = 0
) -> AdaptedModel:
    """Load an adapter folder over its base model, in float32 and eval mode.

    Args:
        folder: holds PEFT's two files; with ``head.safetensors`` beside them it fits what ``load_model`` makes of the
            base, else transformers' ``AutoModelForSequenceClassification``, ``...ImageClassification`` or, for the task
            ``causal``, ``...CausalLM``, with the head in ``modules_to_save`` or in the base.
        base: a model folder, or a name on the Hugging Face hub.
        task: ``classification``, ``regression`` or ``causal``; ``outputs``: of the head, one a class or target.
        text: inputs are token ids, padded with -1.
        seed: of weights that nobody brings: those that ``modules_to_save`` had before their training.

    Raises:
        ValueError: the folder is no adapter's, or does not fit base or task.
        NotImplementedError: the adapter is more than plain LoRA and a head.
        ImportError: PEFT or transformers is not installed.
    """
    peft, folder = load_peft(), Path(folder)
    found = _read(folder)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers and keys: all of them are checked below
        torch.manual_seed(seed)
        if (folder / HEAD).exists():
            model, missing = load_model(base, causal=False), list[str]()
            inner: Any = getattr(model, "backbone", None) or getattr(model, "module", None) or model
        else:
            inner, missing = _of_transformers(base, task, outputs, text)
        try:
            wrapped = peft.PeftModel.from_pretrained(inner, str(folder), is_trainable=True).eval()
            there = _tensors(wrapped)
        except Exception as error:  # PEFT's own have no common class
            raise _unfit(folder, base, " ".join(str(error).split())[:200]) from error
    bare = [name for name in missing if f"base_model.model.{name}" not in found]
    if bare:
        raise ValueError(f"ADAPTER: expected {HEAD}, or a head in its modules_to_save or in the base, got no {bare[0]}")
    wrong = sorted(set(found) ^ set(there)) or [
        n for n, t in found.items() if not torch.equal(t.float(), there[n].float())
    ]
    if wrong:
        raise _unfit(folder, base, f"{len(wrong)} weights that differ, {wrong[0]} for one")
    if (folder / HEAD).exists():
        adapted: AdaptedModel = OverFeatures(model, wrapped, _head(folder, outputs, model.features))
    else:
        adapted = OverTransformers(wrapped, _last(inner, outputs, task == "causal"), text, task == "causal")
    known = (".lora_A.", ".lora_B.", ".modules_to_save.", "head.")
    more = [n for n, p in adapted.named_parameters() if p.requires_grad and not any(k in f".{n}" for k in known)]
    if more:
        raise NotImplementedError(f"ADAPTER: expected plain LoRA and at most a head, got one that trains {more[0]}")
    return adapted.eval()


def _read(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's weights, once its configuration is seen to be plain LoRA."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"ADAPTER: expected a folder with {CONFIG} and {WEIGHTS}, got {folder} without {name}")
    config = read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise NotImplementedError(f"ADAPTER: expected plain LoRA (peft_type LORA), got {kind}")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise NotImplementedError(
            f"ADAPTER: began as {config['init_lora_weights']!r}, which changed the base weights: convert it in PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    return _load(folder / WEIGHTS)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: expected weights as safetensors' save_file writes them, got {error}") from None


def _unfit(folder: Path, base: Path | str, why: str) -> ValueError:
    named = read_object(folder / CONFIG).get("base_model_name_or_path")
    hint = f" (it names {named!r})" if named else ""
    return ValueError(
        f"--base: expected the model that the adapter in {folder} was trained on{hint}, got {base}: {why}"
    )


def _of_transformers(base: Path | str, task: str, outputs: int, text: bool) -> tuple[Any, list[str]]:
    """Load a base with the head of a task; give it, and the weights that the base did not bring."""
    import transformers

    from s3t_ext.models.huggingface import quiet

    base = local_folder(base)
    if not (base / "config.json").exists():
        raise ValueError(f"ADAPTER: expected {HEAD} beside an adapter over {base}, which transformers does not load")
    kind = "CausalLM" if task == "causal" else "SequenceClassification" if text else "ImageClassification"
    more: dict[str, Any] = {} if task == "causal" else {"num_labels": outputs, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, told = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
                base, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                output_loading_info=True, **more,
            )  # fmt: skip  # eager: the others have no gradient of a gradient
    except Exception as error:  # transformers' own have no common class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--base: expected a model for AutoModelFor{kind} in {base}, got: {reason}") from error
    return model.requires_grad_(False), sorted(told["missing_keys"]) + [k for k, *_ in told["mismatched_keys"]]


def _last(inner: Any, outputs: int, causal: bool) -> nn.Module:
    """Find the layer that gives the answers: the adapter's copy of it, where it has one."""
    if causal:
        return inner.get_output_embeddings()
    own = inner.base_model_prefix + "."
    found = [
        name.removesuffix(".base_layer")
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and not name.startswith(own)
        if "original_module" not in name and ".lora_" not in name
    ]
    if not found:
        raise ValueError(f"ADAPTER: expected a linear head of {outputs} outputs in {type(inner).__name__}, got none")
    return inner.get_submodule(found[-1])


def _head(folder: Path, outputs: int, features: int) -> nn.Linear:
    found = _load(folder / HEAD)
    shapes = {name: list(value.shape) for name, value in found.items()}
    wanted = {"weight": [outputs, features], "bias": [outputs]}
    if "weight" not in found or any(shape != wanted.get(name) for name, shape in shapes.items()):
        raise ValueError(f"{folder / HEAD}: expected weight {wanted['weight']} and at most a bias, got {shapes}")
    head = nn.Linear(features, outputs, bias="bias" in found)
    head.load_state_dict({name: value.float() for name, value in found.items()})
    return head


def earlier(folder: Path | str) -> list[dict[str, Any]]:
    """Give what the ``unlearned.json`` of an adapter says of each time that it forgot, oldest first."""
    file = Path(folder) / ABOUT
    if not file.exists():
        return []
    last = read_object(file)
    return [*last.pop("earlier", []), last]


# --- out -------------------------------------------------------------------------------------------------------------


def _tensors(wrapped: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()
def round_as_saved(model: nn.Module, source: Path | str) -> None:
    """Round weights to the types of a folder's tensors, in place: so what is measured of a model is what is saved."""
    for tensors, name in _parts(model):
        types = _types(Path(source) / name)
        for key, value in tensors.items():
            value.copy_(value.to(types[key]))


def save_adapter(model: nn.Module, source: Path | str, dest: Path | str, about: Mapping[str, Any]) -> None:
    """Write a model's adapter as a folder like the one it came from, whole or not at all.

    Names, types and configuration are the source's, whose tokenizer goes with it; nothing else does, for checkpoints
    and optimizer states beside an adapter have met the forgotten records.

    Args:
        dest: a new folder; ``about``: goes in it as ``unlearned.json``.
    """
    source, dest = Path(source), Path(dest).absolute()
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.parent / f".{dest.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        for tensors, name in _parts(model):
            types = _types(source / name)
            cast = {key: value.to(types[key]).cpu().contiguous() for key, value in tensors.items()}
            save_file(cast, part / name, metadata={"format": "pt"})
        for name in (CONFIG, *TOKENIZER):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        (part / ABOUT).write_text(json.dumps(about, indent=1))
        os.rename(part, dest)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _parts(model: nn.Module) -> list[tuple[Mapping[str, Tensor], str]]:
    """Give the tensors of each file of an adapter's folder: the model's own memory."""
    own = [(model.head.state_dict(), HEAD)] if isinstance(model, OverFeatures) else []
    return [(_tensors(model.peft), WEIGHTS), *own]


def _types(file: Path) -> dict[str, torch.dtype]:
    return {key: value.dtype for key, value in load_file(file).items()}
