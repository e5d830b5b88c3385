"""A backbone of the transformers library as a base model, texts without padding."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.lora.nn import routing_of
from s3t_ext.models.attention import attends
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import STEP

POOLING = ("mean", "cls", "last")
VECTOR = 64  # elements after which a loop over bf16 or fp32 vectors leaves no tail, on any processor


class Family(NamedTuple):
    """What is known about a kind of model, by its ``model_type``."""

    blocks: str
    pooling: str
    causal: bool = False  # a token sees those before it only


FAMILIES = {
    "bert": Family("encoder.layer", "mean"),
    "roberta": Family("encoder.layer", "mean"),
    "vit": Family("layers", "cls"),
    "gpt2": Family("h", "last", True),
    "llama": Family("layers", "last", True),
    "qwen2": Family("layers", "last", True),
    "qwen3": Family("layers", "last", True),
}


class HuggingFaceModel(BaseModel):
    """A backbone of the transformers library: token ids (n, l) or images (n, *shape) to features.

    Args:
        backbone: it returns ``last_hidden_state``; changed in place (see Notes).
        family: where its blocks are, how it pools by default, what a token sees.
        pooling: ``mean`` over a record's own tokens, ``cls`` (the first one), ``last``; "": the family's.
        output: makes the model causal: the frozen layer that gives logits.

    Raises:
        ValueError: the model does something that would let one record's bits depend on another, or has no blocks there.

    Notes:
        The pooler is dropped, and attention is `s3t_ext.models.attention`'s. GPT-2's ``Conv1D`` and convolutions over
        patches become linear layers, which take adapters and whose bits do not depend on the batch.
    """

    def __init__(self, backbone: Any, family: Family, pooling: str = "", output: nn.Linear | None = None) -> None:
        super().__init__()
        config = backbone.config
        self.backbone, self.output, self.causal = backbone, output, output is not None
        self.blocks, self.pooling, self.masked = "backbone." + family.blocks, pooling or family.pooling, family.causal
        if self.pooling not in POOLING:
            raise ValueError(f"pooling: expected one of {POOLING}, got {self.pooling!r}")
        self.features = int(config.hidden_size)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        _replace(backbone)
        self._takes = set(inspect.signature(backbone.forward).parameters)
        self.block_list()
        if getattr(backbone, "main_input_name", "") == "pixel_values":
            size = config.image_size
            high, wide = (size, size) if isinstance(size, int) else size
            self.shape = (config.num_channels, high, wide)
        else:
            self.vocabulary = int(config.vocab_size)
            self.first = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0  # position
            self.positions = int(getattr(config, "max_position_embeddings", 0) or 0) - self.first
        self._check(config)

    def _check(self, config: Any) -> None:
        """Refuse what would let a record's bits hang on others; see whether padding can be left out."""
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError("model: expected attention over the whole text, got layers with a sliding window")
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            raise ValueError(f"model: expected positions that hang on no other text, got the rope type {rope!r}")
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.features
        step = STEP if self.vocabulary else VECTOR
        if inner % step:
            raise ValueError(
                f"model: expected an intermediate size that is a multiple of {step}, got {inner}: elementwise "
                "functions give other bits for the tail of a batch"
            )
        known = FAMILIES.get(config.model_type)
        self._unpads = bool(self.vocabulary) and known is not None and inner % VECTOR == 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.vocabulary:
            return self._pool(self._run(pixel_values=x), None)
        if self._unpadded(x):
            return self._forward_unpadded(x)
        length = x.shape[1]
        x = F.pad(x, (0, -length % STEP), value=-1)  # (n, l)
        own = _own(x)  # (n, l)
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self._run(
            input_ids=x.clamp(min=0),
            attention_mask=self._mask(own, places),
            position_ids=(places.clamp(max=self.positions - 1) if self.positions else places)[None] + self.first,
        )  # (n, l, F)
        return hidden[:, :length] if self.causal else self._pool(hidden, own)

    def _apply(self, fn: Any, recurse: bool = True) -> HuggingFaceModel:
        """Cast and move as any module does, but leave the frequencies of rotary positions in fp32, as the library does.

        Rounded to bf16 they would turn the five hundredth token by more than a radian too far.
        """
        kept = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name.endswith("inv_freq")
        }
        super()._apply(fn, recurse)
        for (module, name), buffer in kept.items():
            module._buffers[name] = buffer.to(fn(buffer).device)
        return self

    # --- without padding: tokens of all records, one after the other -------------------------------------------------

    @property
    def unpads(self) -> bool:
        return self._unpads and attends(self.backbone.get_input_embeddings().weight)

    def _unpadded(self, x: Tensor) -> bool:
        return self.unpads and len(x) > 0

    def _forward_unpadded(self, x: Tensor) -> Tensor:
        own = _own(x)  # (n, l)
        starts = F.pad(own.sum(1).cumsum(0), (1, 0))  # (n + 1,)
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)[own]  # (T,)
        routing = routing_of(self.backbone)
        with routing.tokens(starts) if routing else nullcontext():
            hidden = self._run(
                input_ids=x.clamp(min=0)[own][:, None],
                attention_mask=torch.zeros(1, 1, 1, 1, device=x.device),  # one of the library's own would be in vain
                position_ids=(places.clamp(max=self.positions - 1) if self.positions else places)[:, None] + self.first,
                segments=(starts, self.masked),
            )[:, 0]  # (T, F)
        if self.causal:
            return _padded(hidden, own)
        if self.pooling != "mean":
            return hidden[starts[:-1] if self.pooling == "cls" else starts[1:] - 1].float()
        owner = torch.arange(len(x), device=x.device).repeat_interleave(starts.diff())  # (T,)
        sums = hidden.new_zeros(len(x), self.features, dtype=torch.float32).index_add(0, owner, hidden.float())
        return sums / starts.diff()[:, None]  # (n, F)

    def below(self, x: Tensor, block: int) -> Tensor:
        """Give the state (n, l, F) that enters a block, 0 where x is padding."""
        state = super().below(x, block)
        return _padded(state[:, 0], _own(x)) if self._unpadded(x) else state

    def above(self, hidden: Tensor, x: Tensor, block: int) -> Tensor:
        """Go on from the state (n, l, F) that enters a block to what ``forward`` gives."""
        return super().above(hidden[_own(x)][:, None] if self._unpadded(x) else hidden, x, block)

    # --- in the library's own layout ---------------------------------------------------------------------------------

    def _run(self, segments: tuple[Tensor, bool] | None = None, **inputs: Tensor) -> Tensor:
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in self._takes else {}
        if segments is not None:
            more["segments"] = segments  # handed down to the attention function
        return self.backbone(**{k: v for k, v in inputs.items() if k in self._takes}, **more).last_hidden_state

    def _mask(self, own: Tensor, places: Tensor) -> Tensor:
        """Give what is added to scores. Who sees only what is before sees no padding, which is at the end."""
        seen = (
            (places[:, None] >= places)[None, None] if self.masked else own[:, None, None]
        )  # (1, 1, l, l), (n, 1, 1, l)
        return torch.zeros(seen.shape, device=own.device).masked_fill_(~seen, torch.finfo(torch.float32).min)

    def _pool(self, hidden: Tensor, own: Tensor | None) -> Tensor:
        """Give the features (n, F) of a state (n, l, F), in fp32."""
        if self.pooling == "cls":
            return hidden[:, 0].float()
        if own is None:
            return hidden[:, -1].float() if self.pooling == "last" else hidden.float().mean(1)
        count = own.sum(1)  # (n,)
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), count - 1].float()
        return hidden.float().masked_fill(~own[..., None], 0).sum(1) / count[:, None]


def _own(x: Tensor) -> Tensor:
    """Tell tokens from padding (n, l). An empty text is one token: a mean over none would be no number."""
    own = x >= 0
    own[:, 0] = True
    return own


def _padded(rows: Tensor, own: Tensor) -> Tensor:
    """Put rows (T, F) in the places (n, l, F) of their tokens, 0 elsewhere."""
    return rows.new_zeros(*own.shape, rows.shape[-1]).index_put((own,), rows)


class Patches(nn.Module):
    """A convolution over patches that do not overlap, as a linear layer: (n, c, h, w) to (n, F, h / p, w / p)."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight  # (F, c, p, p)
        self.size = convolution.kernel_size
        self.linear = as_linear(weight.flatten(1), convolution.bias)

    @property
    def weight(self) -> Tensor:
        """A tensor of the layer's type: owners look it up, and a packed layer would make a copy."""
        return self.linear.weight if self.linear.bias is None else self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.size
        patches = x.unfold(2, p, p).unfold(3, q, q).permute(0, 2, 3, 1, 4, 5)  # (n, h / p, w / q, c, p, q)
        return self.linear(patches.flatten(3)).permute(0, 3, 1, 2)  # (n, F, h / p, w / q)


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=bias is not None)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _replace(model: nn.Module) -> None:
    """Put linear layers in the places of ``Conv1D`` and of convolutions over patches, with the same weights.

    And GELU by tanh in one pass in the place of GPT-2's, which makes eight: it took 4 times as long in fp32.
    """
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if type(module).__name__ == "NewGELUActivation":
            setattr(model.get_submodule(parent), child, nn.GELU(approximate="tanh"))
        if type(module).__name__ == "Conv1D":
            weight: Any = module.weight  # (K, O)
            setattr(model.get_submodule(parent), child, as_linear(weight.t(), module.bias))
        elif isinstance(module, nn.Conv2d):
            plain = module.stride == module.kernel_size and module.padding in ((0, 0), "valid") and module.groups == 1
            if not plain or module.dilation != (1, 1):
                raise ValueError(f"model: expected convolutions over patches that do not overlap, got {name}: {module}")
            setattr(model.get_submodule(parent), child, Patches(module))
