"""A small residual network for tensors."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.models.base import BaseModel


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class MLP(BaseModel):
    """Map tensors (n, *shape) to features (n, ``width``) by ``depth`` pre-norm residual blocks with ReLU."""

    blocks = "layers"

    def __init__(self, shape: tuple[int, ...] = (16,), width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.shape, self.features = tuple(shape), width
        self.embed = nn.Linear(math.prod(shape), width)
        self.layers = nn.ModuleList(MLPBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.to(self.norm.weight.dtype).flatten(1))  # (n, width)
        for block in self.layers:
            h = block(h)
        return self.norm(h).float()  # (n, width)
