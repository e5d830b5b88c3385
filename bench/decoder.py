"""A small decoder made here, a folder of the transformers library: words and weights are learnt from declared texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

WORDS, END = 1024, "<end>"
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def words(texts: Sequence[str]) -> str:
    """Learn a byte-pair vocabulary; give it as the text of a ``tokenizer.json``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet)
    )
    return made.to_str()


def declare(folder: Path, vocabulary: str) -> Any:
    """Write what says how texts become tokens, and give the configuration of the model."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=WORDS, eos_token_id=0, bos_token_id=None, **SIZES)
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(vocabulary)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return config


def make(folder: Path, vocabulary: str, inputs: np.ndarray, labels: np.ndarray, how: Any, seed: int) -> None:
    """Train a decoder on token ids and write it, with its words.

    Args:
        inputs: (n, l) token ids, -1 after the last; ``labels``: (n, l), -100 where no loss is taken;
        how: a ``bench.datasets.Training``.
    """
    from transformers import LlamaForCausalLM

    config = declare(folder, vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimizer, schedule = how.optimizer(model.parameters(), len(inputs))
        for _ in range(how.epochs):
            for rows in torch.randperm(len(inputs)).split(how.batch):
                length = int((inputs[rows] >= 0).sum(1).max())  # what is behind a text's end, a causal model never sees
                x, y = (torch.from_numpy(part[rows, :length]) for part in (inputs, labels))
                logits = model(input_ids=x.clamp(min=0).long()).logits[:, :-1]  # (b, length - 1, WORDS)
                F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.save_pretrained(folder)
