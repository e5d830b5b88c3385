"""Let a causal store write: ``generate`` of the transformers library, whose every step asks all paths as one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from s3t_ext.lora.rng import uniform
from s3t_ext.models.batches import by_length
from s3t_ext.models.tokens import tokenizer
from s3t_ext.system.ensemble import checked, combined
from s3t_ext.system.live import Route
from s3t_ext.system.paths import by_shard

if TYPE_CHECKING:
    from s3t_ext.system.serve import Service

USUAL = 64  # tokens that are written where nobody says how many


class Overtaken(RuntimeError):
    """A node that an answer rests on died, or left the memory, while the answer was written."""


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


# --- keys and values of all paths ------------------------------------------------------------------------------------


class _Layer(DynamicLayer):
    """Keys and values of one layer; what is replaced is overwritten."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        old = self.keys, self.values
        kept = super().update(key_states, value_states, *args, **kwargs)
        _overwrite(*old)
        return kept

    def reorder_cache(self, beam_idx: Any) -> None:
        old = self.keys, self.values
        super().reorder_cache(beam_idx)
        _overwrite(*old)


def _overwrite(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.fill_(torch.nan)


class PathCache(Cache):
    """Keys and values of all paths, path after path: derived data, overwritten once the answer is there.

    Args:
        route: the paths; all steps of an answer go by one.
    """

    def __init__(self, route: Route) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.route = route

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the prompts of every path, for beam search."""
        paths, n = len(self.route.served), len(beam_idx)
        super().reorder_cache(torch.cat([beam_idx + path * n for path in range(paths)]))  # type: ignore[arg-type]

    def wipe(self) -> None:
        """Overwrite all that is held, and hold nothing."""
        for layer in self.layers:
            _overwrite(getattr(layer, "keys", None), getattr(layer, "values", None))
        self.layers.clear()


# --- the model -------------------------------------------------------------------------------------------------------


class Writer(PreTrainedModel, GenerationMixin):
    """A causal language model whose next token is that of all paths: the logarithm of their mean of probabilities.

    ``generate`` takes what transformers' own models take: prompts padded on the left with ``attention_mask``, greedy
    decoding, sampling, beams, processors of logits. An answer that a deletion overtakes is written anew.

    Args:
        service: of a causal store.

    Raises:
        ValueError: the store is not causal.
    """

    def __init__(self, service: Service) -> None:
        backbone: Any = getattr(service.network.base, "backbone", None)
        if backbone is None or not service.network.base.causal:
            raise ValueError(f"service: expected one of a causal store, got the task {service.folder.schema.task!r}")
        super().__init__(backbone.config)
        self._owned = (service, backbone)  # in a tuple: their parameters are not this module's
        try:
            self.generation_config = GenerationConfig.from_pretrained(service.folder.base)
        except OSError:
            self.generation_config = GenerationConfig.from_model_config(backbone.config)

    @property
    def service(self) -> Service:
        """Whose paths answer."""
        return self._owned[0]

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.service.network.routing.table.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits."""
        return torch.float32

    @torch.inference_mode()
    def generate(self, inputs: Tensor | None = None, **how: Any) -> Any:  # type: ignore[override]
        """Write on from prompts as transformers' ``generate`` does; released if every node is live at the end.

        Raises:
            ValueError: an option that would let tokens out before that, or pass the cache by.
            Refused: every shard is dead, or the ledger failed.
        """
        for option in ("streamer", "past_key_values", "assistant_model", "cache_implementation"):
            if how.get(option) is not None:
                raise ValueError(f"{option}: expected none: an answer is released as a whole, with a cache of its own")
        if how.pop("use_cache", True) is not True:
            raise ValueError("use_cache: expected True: an answer has a cache of its own")
        while True:
            written = self.attempt(self.service.start()[0], inputs, **how)
            if written is not None:
                return written

    def attempt(self, route: Route, inputs: Tensor | None = None, **how: Any) -> Any:
        """Write by one route; None where a deletion overtook it."""
        cache = PathCache(route)
        try:
            written = GenerationMixin.generate(self, inputs, past_key_values=cache, use_cache=True, **how)  # type: ignore
            return written if self.valid(route) else None
        except Overtaken:
            return None
        finally:
            cache.wipe()

    def valid(self, route: Route) -> bool:
        """Tell whether what was computed by a route may be released now."""
        self.service.refresh()
        return self.service.releasable(route)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PathCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Give the logits of the next tokens (n, l, vocabulary) for ids (n, l) that follow those in the cache.

        Raises:
            ValueError: a cache of another model.
            Overtaken: a node of the cache's route is not live any more; the cache is overwritten.
        """
        cache = PathCache(self.service.start()[0]) if past_key_values is None else past_key_values
        if not isinstance(cache, PathCache):
            raise ValueError(f"past_key_values: expected None or what a call gave before, got {type(cache).__name__}")
        logits = self._step(cache, input_ids, attention_mask, logits_to_keep)
        if not self.valid(cache.route):
            cache.wipe()
            raise Overtaken("a node of this answer died while it was written: begin anew")
        if past_key_values is None and not use_cache:
            cache.wipe()
        kept: Any = cache if use_cache or past_key_values is not None else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)

    def _step(self, cache: PathCache, ids: Tensor, own: Tensor | None, keep: int) -> Tensor:
        service, backbone = self._owned
        paths, past = len(cache.route.served), cache.get_seq_length()
        n, length = ids.shape
        seen = torch.ones(n, past + length, dtype=torch.bool) if own is None else own.bool()  # (n, t)
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]  # (n, l)
        order = torch.arange(past + length)
        mask = (order <= order[past:, None]) & seen[:, None]  # (n, l, t)
        added = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)[:, None]  # (n, 1, l, t)
        with service.one_pass(), service.network.routing.batch([n] * paths, cache.route.table):
            hidden = backbone(
                input_ids=ids.clamp(min=0).repeat(paths, 1), attention_mask=added.repeat(paths, 1, 1, 1),
                position_ids=places.repeat(paths, 1), past_key_values=cache, use_cache=True,
            ).last_hidden_state[:, -keep:]  # (G * n, l, F)  # fmt: skip
            logits = service.network.answer(hidden)  # (G * n, l, V)
        together = combined(logits.view(paths, n, *logits.shape[1:]), cache.route.served, service.combine)
        return together if service.combine == "logits" else together.log()  # (n, l, V)


# --- writing for a service -------------------------------------------------------------------------------------------


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
        u = torch.stack([uniform(key, scores.shape[1:], 0.5) + 0.5 for key in keys])  # (n, V)
        return scores / self.temperature - (-u.log()).log()


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
