"""Which files make a model folder, and where a folder of the Hugging Face hub lies. Loads no torch."""

from __future__ import annotations

from pathlib import Path

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
DESCRIPTION = ("model.json", "config.json", "generation_config.json", "1_Pooling/config.json", *TOKENIZER)


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
