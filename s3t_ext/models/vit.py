"""A small vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.models.attention import attention
from s3t_ext.models.base import BaseModel


class Block(nn.Module):
    """Pre-norm transformer block with ReLU, whose bits, unlike GELU's, no vector width or tail can change."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, s, w = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, w // self.heads)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (n, h, s, d); their gradients are stacked as they lie
        mixed = attention(q, k, v, None, q.shape[-1] ** -0.5).view(n, s, w)  # (n, s, w)
        x = x + self.proj(mixed)
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class VisionTransformer(BaseModel):
    """Map images (n, channels, height, width) to features (n, ``width``), read off a class token.

    Args:
        shape: (channels, height, width) of an image; ``patch``: side of a square patch, a divisor of both sides.
        width, depth, heads: of the transformer.
    """

    blocks = "layers"

    def __init__(
        self, shape: tuple[int, int, int] = (1, 8, 8), patch: int = 2, width: int = 64, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape: expected [channels, height, width], got {list(shape)}")
        channels, high, wide = shape
        if high % patch or wide % patch:
            raise ValueError(f"patch: expected a divisor of {high} and {wide}, got {patch}")
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.shape, self.patch, self.features = tuple(shape), patch, width
        tokens = (high // patch) * (wide // patch) + 1
        self.embed = nn.Linear(channels * patch * patch, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        x = x.to(self.token.dtype)
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)  # (n, h/p, w/p, c, p, p)
        h = self.embed(patches.reshape(len(x), -1, self.embed.in_features))  # (n, tokens - 1, width)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.position  # (n, tokens, width)
        for block in self.layers:
            h = block(h)
        return self.norm(h[:, 0]).float()  # (n, width)
