"""A causal store as a model of the transformers library: every step of ``generate`` asks all paths as one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from s3t_ext.system.network import Network
from s3t_ext.system.serving.ensemble import combined
from s3t_ext.system.serving.live import Route

if TYPE_CHECKING:
    from s3t_ext.system.serve import Service


class Overtaken(RuntimeError):
    """A node that an answer rests on died, or left the memory, while the answer was written."""


# --- keys and values of all paths ------------------------------------------------------------------------------------


def _overwrite(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:  # all that lies under it: it may have been cropped
            torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()).fill_(torch.nan)


def _overwriting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Overwrite the keys and values that a method of a layer replaces."""

    @wraps(method)
    def replace(layer: DynamicLayer, *args: Any, **kwargs: Any) -> Any:
        old = layer.keys, layer.values
        given = method(layer, *args, **kwargs)
        if layer.keys is not old[0]:
            _overwrite(*old)
        return given

    return replace


class _Layer(DynamicLayer):
    """Keys and values of one layer; what is replaced is overwritten."""

    update = _overwriting(DynamicLayer.update)
    reset = _overwriting(DynamicLayer.reset)
    reorder_cache = _overwriting(DynamicLayer.reorder_cache)
    batch_repeat_interleave = _overwriting(DynamicLayer.batch_repeat_interleave)
    batch_select_indices = _overwriting(DynamicLayer.batch_select_indices)


class PathCache(Cache):
    """Keys and values of all paths, path after path: derived data, overwritten once the answer is there.

    One that a caller holds is overwritten when a node of its route dies: its service knows of it, and of its copies.
    Layers below the lowest adapter hold those of each prompt once.

    Args:
        service: whose route it is; ``route``: the paths; all steps of an answer go by one.
    """

    def __init__(self, service: Service, route: Route) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.service, self.route = service, route
        service.watch(self)

    def __copy__(self) -> PathCache:
        copied = PathCache(self.service, self.route)
        copied.layers = self.layers
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> PathCache:
        copied = PathCache(self.service, self.route)
        copied.layers = copy.deepcopy(self.layers, memo)
        if not self.service.releasable(self.route):  # a node died while it was copied
            copied.overwrite()
        return copied

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: rows are of prompts and paths, below the lowest adapter of prompts alone."""
        raise NotImplementedError("a cache of several paths selects no rows: generate for the wanted prompts alone")

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the prompts of every path, for beam search."""
        n = len(beam_idx)
        for layer in self.layers:
            copies = len(layer.keys) // n
            layer.reorder_cache(torch.cat([beam_idx + path * n for path in range(copies)]))

    def overwrite(self) -> None:
        """Overwrite all that is held; a step that runs meanwhile keeps its shapes, and wipes the rest at its end."""
        for layer in list(self.layers):
            _overwrite(getattr(layer, "keys", None), getattr(layer, "values", None))

    def wipe(self) -> None:
        """Overwrite all that is held, and hold nothing."""
        self.overwrite()
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
    def generate(self, inputs: Tensor | None = None, **how: Any) -> Any:
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
        cache = PathCache(self.service, route)
        try:
            written = GenerationMixin.generate(self, inputs, past_key_values=cache, use_cache=True, **how)
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
        cache = PathCache(self.service, self.service.start()[0]) if past_key_values is None else past_key_values
        if not isinstance(cache, PathCache):
            raise ValueError(f"past_key_values: expected None or what a call gave before, got {type(cache).__name__}")
        logits, whole = None, False
        try:
            if self.valid(cache.route):
                logits = self._step(cache, input_ids, attention_mask, logits_to_keep)
                whole = self.valid(cache.route)
        finally:
            if not whole or (past_key_values is None and not use_cache):
                cache.wipe()
        if not whole:
            raise Overtaken("a node of this answer died while it was written: begin anew")
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
        network = service.network
        with service.one_pass(), _branching(network, n, cache.route):
            hidden = backbone(
                input_ids=ids.clamp(min=0), attention_mask=added, position_ids=places, past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -keep:]  # (G * n, l, F)  # fmt: skip
            logits = network.answer(hidden)  # (G * n, l, V)
        together = combined(logits.view(paths, n, *logits.shape[1:]), cache.route.served, service.combine)
        return together if service.combine == "logits" else together.log()  # (n, l, V)


@contextmanager
def _branching(network: Network, n: int, route: Route) -> Iterator[None]:
    """Let a pass over n prompts go on as one over n prompts of every path, at the lowest block with an adapter."""
    table, block = route.table, network.trunk(route.depth)
    paths = len(table)

    def copied(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(copied, given))
        rows = isinstance(given, Tensor) and given.dim() > 1 and len(given) == n
        return given.repeat(paths, *[1] * (given.dim() - 1)) if rows else given

    with ExitStack() as stack:
        stack.enter_context(network.routing.batch([n], table.new_full((1, table.shape[1]), -1)))

        def branch(_: Any, args: Any, kwargs: Any) -> Any:
            stack.enter_context(network.routing.batch([n] * paths, table))
            return copied(args), {name: copied(given) for name, given in kwargs.items()}

        def follow(_: Any, args: Any, kwargs: Any) -> Any:
            return (args[0], *copied(args[1:])), {name: copied(given) for name, given in kwargs.items()}

        for number, module in enumerate(network.base.block_list()):
            if number >= block:
                hook = branch if number == block else follow
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
