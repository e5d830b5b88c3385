"""Tiny random models of every tested family, as folders; and forward and backward passes as training does them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from s3t_ext.lora.nn import adapt, adapted_layers, pack_layers
from s3t_ext.lora.pinned import pinned
from s3t_ext.lora.routing import Routing
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length

TEXT = ("bert", "roberta", "gpt2", "llama", "qwen2", "qwen3")
FAMILIES = (*TEXT, "vit")
WORDS, DEPTH = 97, 3


def config(family: str):
    """Give the configuration of a tiny model of a family."""
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": DEPTH, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 40}
    if family == "gpt2":
        return transformers.GPT2Config(vocab_size=WORDS, n_positions=40, n_embd=32, n_layer=DEPTH, n_head=4)
    if family == "vit":
        del sizes["vocab_size"], sizes["max_position_embeddings"]
        return transformers.ViTConfig(image_size=12, patch_size=4, num_channels=1, **sizes)
    if family in ("llama", "qwen2", "qwen3"):
        sizes["num_key_value_heads"] = 2
    if family == "qwen3":
        sizes["head_dim"] = 8
    kind = {"bert": "Bert", "roberta": "Roberta", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return getattr(transformers, kind + "Config")(**sizes, pad_token_id=1)


def save(family: str, folder: Path, task: str = "", **more) -> Path:
    """Write a folder with a tiny model, by ``AutoModel`` or the ``AutoModelFor...`` of a task."""
    import transformers

    settings = config(family)
    settings.update(more)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModel{task}").from_config(settings)
    with torch.no_grad():  # biases and norms as trained ones are: not 0 and 1
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def records(model: BaseModel, count: int, longest: int = 30) -> Tensor:
    """Draw records: texts of 1 to ``longest`` tokens padded with -1, or numbers."""
    torch.manual_seed(1)
    if not model.vocabulary:
        return torch.randn(count, *model.shape)
    x = torch.randint(2, WORDS, (count, longest), dtype=torch.int32)  # 1 pads where a model pads by itself
    lengths = torch.randint(1, longest + 1, (count,))
    lengths[:3] = torch.tensor([1, longest, 8])
    return x.masked_fill(torch.arange(longest) >= lengths[:, None], -1)


class Adapted:
    """A model with random adapters of ``stages`` stages in every linear layer; a group for each of ``nodes`` nodes."""

    def __init__(self, model: BaseModel, nodes: int, stages: int = 2, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.nodes, self.stages = model.to(dtype), nodes, stages
        self.routing: Routing = adapt(model, model.adaptable(), stages=stages, groups=nodes, rank=4)
        self.layers = adapted_layers(model)
        pack_layers(model, backward=True)
        self.pools = {}
        torch.manual_seed(2)
        for name, layer in self.layers.items():
            layer.a, layer.b = (torch.randn_like(t.new_empty(nodes, *t.shape[1:])) * 0.1 for t in (layer.a, layer.b))
            self.pools[name] = [torch.randn_like(t) * 0.1 for t in (layer.a, layer.b)]  # the trained stage's

    def run(self, x: Tensor, weights: Tensor, nodes: list[int], rows: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
        """Run some nodes on some records each, in one pass for each length, and backward.

        Returns:
            Their features, node after node, and the gradients of their trained adapters (nodes, ...).
        """
        pools = [[t[nodes].clone().requires_grad_() for t in pair] for pair in self.pools.values()]
        for layer, pair in zip(self.layers.values(), pools, strict=True):
            layer.train_pool = tuple(pair)
        table = torch.full((len(nodes), self.stages), -1, dtype=torch.int32)
        table[:, 0] = torch.tensor(nodes)
        table[:, 1] = self.nodes + torch.arange(len(nodes))
        order = [row for own in rows for row in own]
        owner = torch.tensor([j for j, own in enumerate(rows) for _ in own])
        out: list[Tensor] = [torch.empty(0)] * len(order)
        with pinned():
            for part, inputs in by_length(x[order]):
                counts = torch.bincount(owner[part], minlength=len(nodes)).tolist()
                with self.routing.batch(counts, table):
                    features = self.model(inputs)
                scores = features.float() if features.dim() == 2 else features.float()[:, 0] + features.float()[:, -1]
                (scores * weights[[order[i] for i in part]]).sum().backward()
                for i, row in zip(part.tolist(), features.detach(), strict=True):
                    out[i] = row
        return out, [t.grad for pair in pools for t in pair]
