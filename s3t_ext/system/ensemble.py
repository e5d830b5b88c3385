"""All paths that answer as one batch: the part of the base below the lowest adapter once, the rest for each path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.system.network import Network
from s3t_ext.system.paths import Served

SAMPLES = 4096  # of one forward pass, all paths together: more would only leave the processor's cache


def outputs(network: Network, x: Tensor, table: Tensor) -> Tensor:
    """Run all paths on inputs.

    Args:
        x: inputs (n, ...); ``table``: the adapters of each path (G, L).

    Returns:
        (G, n, C) logits, or what else the head gives.
    """
    paths = len(table)
    rows = max(1, SAMPLES // paths)
    return torch.cat([_together(network, part, table) for part in x.split(rows)], 1)


def _together(network: Network, x: Tensor, table: Tensor) -> Tensor:
    paths = len(table)
    with network.routing.batch([len(x)] * paths, table):
        y = network(x.repeat(paths, *[1] * (x.dim() - 1)))  # (G * n, C)
    return y.view(paths, len(x), *y.shape[1:])  # (G, n, C)


def combined(values: Tensor, served: Sequence[Served], how: str) -> Tensor:
    """Combine the paths' outputs (G, n, C) to (n, C), by weight and in the paths' order.

    Args:
        how: ``probabilities``, ``logits``, ``vote``, or ``mean`` of the outputs themselves.
    """
    total = torch.zeros_like(values[0])  # (n, C)
    for each, path in zip(values, served, strict=True):
        total += _vote(each, how) * path.weight
    return total


def _vote(y: Tensor, how: str) -> Tensor:
    if how == "probabilities":
        return y.softmax(-1)
    if how == "vote":
        return F.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
    return y
