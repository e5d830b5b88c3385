"""Which files make a model folder, and where a folder of the Hugging Face hub lies. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BUILT_IN = ("vit", "mlp")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
DESCRIPTION = ("model.json", "config.json", "generation_config.json", "1_Pooling/config.json", *TOKENIZER)


_SAID = {  # what may stand in model.json
    "architecture": "a text", "arguments": "an object", "features": "a whole number of at least 1",
    "vocabulary": "a whole number of at least 1", "positions": "a whole number of at least 1",
    "shape": "a list of whole numbers of at least 1", "blocks": "a text", "pooling": "a text", "sees": "a text",
}  # fmt: skip


def read_description(folder: Path) -> dict[str, Any]:
    """Read a folder's ``model.json``; nothing where it has none.

    Raises:
        ValueError: names the file, the key, and what is wanted there.
    """
    file = folder / "model.json"
    if not file.exists():
        return {}
    said = read_object(file)
    for key, value in said.items():
        if key not in _SAID:
            raise ValueError(f"{file}: expected keys of {sorted(_SAID)}, got {key!r}")
        whole = [type(n) is int and n >= 1 for n in (value if isinstance(value, list) else [value])]
        fits = {"a text": isinstance(value, str), "an object": isinstance(value, dict)}
        fits["a list of whole numbers of at least 1"] = isinstance(value, list) and bool(value) and all(whole)
        if not fits.get(_SAID[key], not isinstance(value, list) and all(whole)):
            raise ValueError(f"{file}: {key}: expected {_SAID[key]}, got {value!r:.40}")
    return said


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError naming the file where it is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file}: expected a JSON object, got {said!r:.40}")
    return said


def local_folder(folder: Path | str) -> Path:
    """Give the folder of a model: itself, or the hub's, fetched into its cache.

    Raises:
        ValueError: there is neither.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    name = str(folder)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"model: expected a folder with a model, got {name!r}, which is none")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[*DESCRIPTION, "*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:  # its errors have no common class, and a name of a folder is mistyped more often
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"model: expected a model folder or the name of one on the Hugging Face hub, got {name!r}: no such folder, "
            f"and the hub says {type(error).__name__}: {reason}"
        ) from None


def base_files(folder: Path | str) -> list[str]:
    """List what of a model folder a store keeps: weights, configuration, tokenizer; names relative to the folder.

    Raises:
        ValueError: it holds no weights as safetensors.
    """
    folder = local_folder(folder)
    weights = sorted(p.name for p in folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"model: expected weights as *.safetensors in {folder}, got none; write them with "
            "model.save_pretrained(folder), which pickles nothing"
        )
    index = sorted(p.name for p in folder.glob("*.safetensors.index.json"))
    return [*(name for name in DESCRIPTION if (folder / name).is_file()), *index, *weights]
