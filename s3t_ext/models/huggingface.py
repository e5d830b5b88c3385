"""Folders of the transformers library: what is loaded, what is checked, and the attention that they are given."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.models.attention import attention
from s3t_ext.models.backbone import FAMILIES, POOLING, Family, HuggingFaceModel, as_linear
from s3t_ext.models.files import read_object


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Do what transformers asks of an attention function."""
    scale = how.get("scaling") or query.shape[-1] ** -0.5
    if how.get("segments") is not None:
        starts, causal = how["segments"]
        q, k, v = (x.permute(2, 1, 0, 3) for x in (query, key, value))  # (T, h, 1, d) to (1, h, T, d)
        return attention(q, k, v, None, scale, starts, causal).transpose(0, 1), None  # (T, 1, h, d)
    return attention(query, key, value, attention_mask, scale), None


def load(folder: Path, declared: dict, causal: bool | None) -> HuggingFaceModel:
    """Load a folder of the transformers library.

    Args:
        declared: the folder's ``model.json``, where it has one: ``blocks``, ``pooling``, ``sees`` ("all", "before").
        causal: give hidden states and the output layer; None: as the folder's own architecture does.

    Raises:
        ValueError: transformers is missing or old, the family is unknown and not declared, weights are missing.
    """
    try:
        import transformers
        from transformers.masking_utils import eager_mask
    except ImportError:
        raise ValueError(
            f"model: {folder} is a folder of the transformers library, version 5; install it: pip install "
            "'s3t-ext[peft]' 'transformers>=5'"
        ) from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ValueError(f"model: expected transformers 5 or newer, got {transformers.__version__}")
    transformers.AttentionInterface.register("s3t", _attend)
    transformers.AttentionMaskInterface.register("s3t", eager_mask)
    config = read_object(folder / "config.json")
    names = config.get("architectures") or [""]
    if causal is None:
        causal = names[0].endswith(("ForCausalLM", "LMHeadModel"))
    family = _family(folder, config, declared)
    if causal and not family.causal:
        raise ValueError(f"model: expected a decoder for a causal task, got {config.get('model_type')!r} in {folder}")
    kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    how = {"dtype": torch.float32, "attn_implementation": "s3t", "local_files_only": True}
    try:
        with quiet():
            model, told = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except Exception as error:  # transformers' own have no common class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: expected a folder that transformers loads, got {folder}, of which it says: {reason}"
        ) from error
    if unfit := [f"{k} of shape {list(there)} for {list(made)}" for k, there, made in sorted(told["mismatched_keys"])]:
        raise ValueError(f"model: expected weights in {folder} that fit its config.json, got {'; '.join(unfit[:3])}")
    missing = sorted(k for k in told["missing_keys"] if ".pooler." not in "." + k)
    if missing:
        raise ValueError(f"model: expected all weights in {folder}, got none for {missing[:4]}")
    unread = sorted(k for k in told["unexpected_keys"] if f".{family.blocks}." in f".{k}")
    if unread:
        raise ValueError(
            f"model: expected weights that transformers' model reads, got others in {folder}: {unread[:4]}"
        )
    model.eval().requires_grad_(False)
    if not causal:
        return HuggingFaceModel(model, family, declared.get("pooling", "") or _sentence_pooling(folder))
    head = model.get_output_embeddings()
    return HuggingFaceModel(model.base_model, family, output=as_linear(head.weight, head.bias))


def _family(folder: Path, config: dict, declared: dict) -> Family:
    known = FAMILIES.get(config.get("model_type", ""))
    if known is None and not {"blocks", "pooling", "sees"} <= set(declared):
        raise ValueError(
            f"model: expected one of the families {sorted(FAMILIES)}, got {config.get('model_type')!r}; to use "
            f'another, declare it in {folder / "model.json"}: {{"blocks": path of its list of layers, "pooling": '
            f'one of {list(POOLING)}, "sees": what a token sees, "all" or "before"}}'
        )
    sees = declared.get("sees", "before" if known and known.causal else "all")
    if sees not in ("all", "before"):
        raise ValueError(f"sees: expected 'all' or 'before', got {sees!r}")
    blocks = declared.get("blocks") or (known.blocks if known else "")
    return Family(blocks, known.pooling if known else declared["pooling"], sees == "before")


def _sentence_pooling(folder: Path) -> str:
    """Read the pooling that a folder of sentence-transformers declares; "" where there is none."""
    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return ""
    told = json.loads(file.read_text())
    for key, pooling in (("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")):
        if told.get(f"pooling_mode_{key}"):
            return pooling
    raise ValueError(f"pooling: expected one of {POOLING}, got another in {file}; declare it in model.json")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing bars and reports about weights, which are checked here."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
