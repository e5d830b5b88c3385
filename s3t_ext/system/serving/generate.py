"""Write on from prompts, for a service of a causal store: what a prompt gets depends on no prompt beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from s3t_ext.lora.rng import uniform
from s3t_ext.models.batches import by_length
from s3t_ext.models.tokens import tokenizer
from s3t_ext.system.serving.ensemble import checked
from s3t_ext.system.serving.live import Route
from s3t_ext.system.serving.paths import by_shard
from s3t_ext.system.serving.writer import Writer

if TYPE_CHECKING:
    from s3t_ext.system.serve import Service

USUAL = 64  # tokens that are written where nobody says how many


@dataclass(frozen=True)
class Written:
    """A released answer in words.

    Args:
        tokens: of each prompt, the ids that go on from it, without the token that ends them.
        nodes, depths, epoch: as in an ``Answer``.
    """

    tokens: list[list[int]]
    nodes: tuple[str, ...]
    depths: tuple[int, ...]
    epoch: int


class Drawn(LogitsProcessor):
    """Make greedy decoding draw, so that what a prompt gets depends on it and the seed, on no prompt beside it.

        argmax(logits / temperature + g),  g = -log(-log u), u uniform in (0, 1) by (seed, prompt, number of the token)

    Args:
        prompts: ids (n, l), padded where they are -1.
    """

    def __init__(self, prompts: Tensor, temperature: float, seed: int) -> None:
        self.temperature, self.start = temperature, prompts.shape[1]
        rows = [prompt[prompt >= 0].to(torch.int64).numpy().tobytes() for prompt in prompts]
        self.keys = [hashlib.sha256(f"{seed} ".encode() + row).digest() for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Give what greedy decoding then takes the largest of."""
        number = (input_ids.shape[1] - self.start).to_bytes(8, "little")
        keys = [hashlib.sha256(key + number).digest() for key in self.keys]
        # In fp64: in fp32 the largest of them rounds to 1, whose g is infinite.
        u = torch.stack([uniform(key, scores.shape[1:], 0.5).double() + 0.5 for key in keys])  # (n, V)
        return scores / self.temperature - (-u.log()).log().to(scores.dtype)


def write(service: Service, prompts: np.ndarray, tokens: int | None, temperature: float, seed: int) -> Written:
    """See ``Service.generate``."""
    writer, base = Writer(service), service.network.base
    x = checked(service.folder.schema, base, prompts)
    if not bool((x >= 0).any(1).all()):
        raise ValueError("prompts: expected at least one token in each, got an empty one")
    longest = by_length(x)[-1][1].shape[1]
    room = base.positions - longest if base.positions else tokens or USUAL
    tokens = min(USUAL, room) if tokens is None else tokens
    if not 1 <= tokens <= room:
        raise ValueError(f"tokens: expected 1..{room}, as the model has {base.positions} positions, got {tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    ends = _ends(service, writer)
    while True:
        route, epoch = service.start()
        found = _by_route(writer, route, x, tokens, temperature, seed, ends)
        if found is not None and writer.valid(route):
            return Written(found, route.names, by_shard(route.served, len(service.depths)), epoch)


def _ends(service: Service, writer: Writer) -> list[int]:
    """List the tokens that end a text."""
    try:
        end = tokenizer(service.folder.base).end
    except ValueError:  # a model that is given ids
        end = writer.generation_config.eos_token_id
    return [end] if isinstance(end, int) else sorted(end or ())


@torch.inference_mode()
def _by_route(
    writer: Writer, route: Route, x: Tensor, tokens: int, temperature: float, seed: int, ends: Sequence[int]
) -> list[list[int]] | None:
    """Write on from prompts, those of one padded length together; None where a deletion came between."""
    found: list[list[int]] = [[] for _ in x]
    for rows, part in by_length(x):
        left = torch.stack([row.roll(int((row < 0).sum())) for row in part])  # (k, l): padded on the left
        how = {"logits_processor": LogitsProcessorList([Drawn(left, temperature, seed)])} if temperature else {}
        written = writer.attempt(
            route, left.clamp(min=0), attention_mask=left >= 0, max_new_tokens=tokens, do_sample=False, num_beams=1,
            repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=0, **how,
        )  # (k, l + at most tokens)  # fmt: skip
        if written is None:
            return None
        for row, ids in zip(rows.tolist(), written[:, part.shape[1] :].tolist(), strict=True):
            found[row] = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
    return found
