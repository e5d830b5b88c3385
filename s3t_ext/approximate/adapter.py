"""A PEFT adapter over a base model and under a head, as a model that the methods of this room work on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class AdaptedModel(nn.Module):
    """Map inputs to answers through a base model, an adapter in PEFT's own layers, and a head.

    What requires gradients is what the adapter trained: A and B, and the head or PEFT's ``modules_to_save``. A deep
    copy has its own, and shares what is frozen: methods make several, and bases are large.

    Attributes:
        peft: the ``PeftModel``; ``head``: the linear layer that reads ``features(x)``.
    """

    peft: Any
    head: Any

    def features(self, x: Tensor) -> Tensor:
        """Give what the head reads: (n, F), of a causal model (n, l, F)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Give logits or values (n, C), or logits of the next token (n, l, vocabulary)."""
        return self.head(self.features(x))

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        memo |= {id(p): p for p in self.parameters() if not p.requires_grad}
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class OverFeatures(AdaptedModel):
    """An adapter in a base model that ``load_model`` loads, with a head of its own beside it."""

    def __init__(self, base: nn.Module, peft: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.base, self.peft, self.head = base, peft, head

    def features(self, x: Tensor) -> Tensor:
        return self.base(x)


class OverTransformers(AdaptedModel):
    """An adapter in one of transformers' ``AutoModelFor...``, whose last layer is the head."""

    def __init__(self, peft: nn.Module, head: nn.Module, text: bool, causal: bool) -> None:
        super().__init__()
        self.peft, self.head, self.text, self.causal = peft, head, text, causal

    def _run(self, x: Tensor) -> Any:
        if not self.text:
            return self.peft(pixel_values=x)
        x = x[:, : int((x >= 0).sum(1).max())].long()  # (n, longest)
        return self.peft(input_ids=x.clamp(min=0), attention_mask=(x >= 0).long())

    def features(self, x: Tensor) -> Tensor:
        with self.head.register_forward_pre_hook(_reach):
            try:
                self._run(x)
            except _Reached as reached:
                state = reached.state
        if self.causal or state.ndim == 2:
            return state
        return state[torch.arange(len(x), device=x.device), (x >= 0).sum(1) - 1]  # of decoders the last token's

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x).logits if self.causal else super().forward(x)


class _Reached(Exception):
    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


def _reach(_: nn.Module, given: tuple[Tensor, ...]) -> None:
    raise _Reached(given[0])


def before_training(model: AdaptedModel, seed: int) -> AdaptedModel:
    """Give the model as it was before the adapter met any record, for retraining.

    LoRA begins as PEFT begins it (B = 0, A drawn), PEFT's ``modules_to_save`` as the base has them, a head beside the
    adapter as ``nn.Linear`` begins; what the base itself learnt stays.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        kind = fresh.peft.peft_config["default"].init_lora_weights
        for module in fresh.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", kind if kind == "gaussian" else True)
            elif isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
        if isinstance(fresh, OverFeatures):
            fresh.head.reset_parameters()
    return fresh
