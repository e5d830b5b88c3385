"""Tiny models for texts with a tokenizer of whole words, and tables of texts for them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import tiny_models

from s3t_ext.system.data.schema import Schema

LENGTH = 16
SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[END]")
WORDS = tuple(f"w{i}" for i in range(80))
CLASSES = ("bad", "good")
SCHEMA = Schema(classes=CLASSES, max_length=LENGTH, input="sentence")
CAUSAL = Schema(task="causal", max_length=LENGTH, input="prompt", label="completion")


def model(folder: Path, family: str = "bert", tokens: bool = True) -> Path:
    """Write a tiny model: an encoder, or, of the families gpt2 and llama, a decoder."""
    decoder = family in ("gpt2", "llama")
    with redirect_stderr(io.StringIO()):  # a progress bar
        tiny_models.save(family, folder, "ForCausalLM" if decoder else "")
    if tokens:
        _tokenizer(folder, decoder)
    return folder


def _tokenizer(folder: Path, decoder: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(ids, "[UNK]"))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if decoder:
        names["eos_token"] = "[END]"
    else:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def rows(count: int = 60, people: int = 25) -> list[dict]:
    """Give rows of a table of sentences, 1 to 12 words long; the last word tells the class."""
    told = []
    for i in range(count):
        length = 1 + i * 7 % 12
        words = [WORDS[(i * 31 + j * 17) % len(WORDS)] for j in range(length)]
        told.append({"subject": f"person {i % people}", "sentence": " ".join(words), "label": CLASSES[i % 2]})
    return told


def pairs(count: int = 40, people: int = 20) -> list[dict]:
    """Give rows of a table of prompts with completions."""
    return [
        {
            "subject": row["subject"],
            "prompt": " ".join(row["sentence"].split()[:5]),
            "completion": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 3)),
        }
        for i, row in enumerate(rows(count, people))
    ]


def write(path: Path, table: list[dict]) -> Path:
    """Write rows as the file's ending says: .jsonl, .csv or .tsv."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(table[0]), *(mark.join(map(str, row.values())) for row in table)]
        path.write_text("\n".join(lines) + "\n")
    return path
