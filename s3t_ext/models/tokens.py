"""Texts to token ids and back, by the tokenizer that a model folder brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3t_ext.models.files import TOKENIZER, local_folder


class TextTokenizer:
    """Turn texts into token ids. What a text becomes depends on no other text.

    Attributes:
        vocabulary: ids are below it; ``end``: the id that ends a text that a model writes, or None.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocabulary, self.end = len(inner), inner.eos_token_id

    def encode(self, texts: Sequence[str], max_length: int, special: bool = True) -> list[list[int]]:
        """Give the ids of each text, cut after ``max_length``, not padded.

        Args:
            special: with the tokens that the model expects around a text.
        """
        if not len(texts):
            return []
        told = self._inner(
            list(texts), add_special_tokens=special, truncation=True, max_length=max_length, padding=False,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        return [list(map(int, ids)) for ids in told["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids, without special tokens."""
        return self._inner.decode([i for i in ids if i >= 0], skip_special_tokens=True)


def tokenizer(folder: Path | str) -> TextTokenizer:
    """Load the tokenizer of a model folder, or of a model on the Hugging Face hub.

    Raises:
        ValueError: there is none, it cannot be read, or transformers is not installed.
    """
    folder = local_folder(folder)
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ValueError(
            f"tokenizer: expected tokenizer.json or the like beside the model in {folder}, got none; write it there "
            f"with AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        )
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise ValueError(
            "tokenizer: texts need transformers; install it: pip install 's3t-ext[peft]' 'transformers>=5'"
        ) from None
    try:
        if (folder / "config.json").exists():
            return TextTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        return TextTokenizer(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")))
    except Exception as error:  # theirs have no common class
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"tokenizer: expected one that transformers reads in {folder}, got {type(error).__name__}: {reason}"
        ) from error
