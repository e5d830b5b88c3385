"""All paths that answer as one batch: the part of the base below the lowest adapter once, the rest for each path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length
from s3t_ext.system.data.schema import PADDING, Schema
from s3t_ext.system.network import Network
from s3t_ext.system.serving.paths import Served

TOKENS = 1024  # of one forward pass in fp32, all paths together: the activations of more leave a core's cache
RECORD = 16  # tokens that a record of numbers counts for


def checked(schema: Schema, base: BaseModel, inputs: np.ndarray) -> Tensor:
    """Give inputs as the network takes them: float32 (n, *shape), or token ids (n, max_length), -1 after their end.

    Raises:
        ValueError: inputs of another shape or type, not finite, or ids that are none.
    """
    x = np.asarray(inputs)
    if not schema.is_text:
        x = np.asarray(schema.scaled(x), np.float32)
        if x.shape[1:] != schema.shape or not len(x) or not np.isfinite(x).all():
            wanted = ", ".join(map(str, schema.shape))
            raise ValueError(f"inputs: expected finite numbers of shape (n, {wanted}), n >= 1, got shape {x.shape}")
        return torch.from_numpy(x)
    whole = x.dtype.kind in "iu" and x.ndim == 2 and x.size > 0 and x.shape[1] <= schema.max_length
    if not whole or x.max() >= base.vocabulary or x.min() < PADDING or (np.diff((x < 0).astype(np.int8)) < 0).any():
        raise ValueError(
            f"inputs: expected token ids below {base.vocabulary} of shape (n, l), n >= 1 and l of 1 to "
            f"{schema.max_length}, {PADDING} after the end of a text alone, got {x.dtype} of shape {x.shape}"
        )
    padded = np.full((len(x), schema.max_length), PADDING, np.int64)  # a text's bits are not to depend on l
    padded[:, : x.shape[1]] = x
    return torch.from_numpy(padded)


def outputs(network: Network, x: Tensor, table: Tensor, depth: int) -> Tensor:
    """Run all paths on inputs; texts of one padded length at a time, unless the base leaves padding out.

    Args:
        x: inputs (n, ...); ``table``: the adapters of each path (G, columns); ``depth``: of the deepest path.

    Returns:
        (G, n, C) logits or values; of a causal model the logits of the token that follows each text.
    """
    block = network.trunk(depth)
    tokens = TOKENS * 4 // network.dtype.itemsize
    parts = []
    for rows, part in [(torch.arange(len(x)), x)] if network.base.unpads else by_length(x):
        each = int((part >= 0).sum()) // len(part) + 1 if network.base.vocabulary else RECORD  # tokens of a record
        for below in torch.arange(len(part)).split(max(1, tokens // each)):
            hidden = _trunk(network, part[below], table, block)
            for top in torch.arange(len(below)).split(max(1, tokens // (each * len(table)))):
                state = None if hidden is None else hidden[top]
                parts.append((rows[below[top]], _tops(network, part[below[top]], state, table, block)))
    paths, _, width = parts[0][1].shape
    values = torch.empty(paths, len(x), width)
    for rows, y in parts:
        values[:, rows] = y
    return values  # (G, n, C)


def _trunk(network: Network, x: Tensor, table: Tensor, block: int) -> Tensor | None:
    """Run the blocks under ``block``, which have no adapter, once for all paths."""
    if not block:
        return None
    with network.routing.batch([len(x)], table.new_full((1, table.shape[1]), -1)):
        return network.below(x, block)  # (n, ...)


def _tops(network: Network, x: Tensor, hidden: Tensor | None, table: Tensor, block: int) -> Tensor:
    """Run all paths on inputs of one padded length, from the state that enters a block."""
    n, paths = len(x), len(table)
    copies = x.repeat(paths, *[1] * (x.dim() - 1))  # (G * n, ...)
    if hidden is not None:
        hidden = hidden.repeat(paths, *[1] * (hidden.dim() - 1))  # (G * n, ...)
    with network.routing.batch([n] * paths, table):
        features = network.features(copies, hidden, block)  # (G * n, F), of a causal model (G * n, l, F)
        if network.base.causal:
            last = ((copies >= 0).sum(1) - 1).clamp(min=0)  # (G * n,)
            features = features[torch.arange(len(copies)), last]
        y = network.answer(features)  # (G * n, C)
    return y.view(paths, n, -1)


def combined(values: Tensor, served: Sequence[Served], how: str) -> Tensor:
    """Combine the paths' outputs (G, n, ..., C) to (n, ..., C), by weight and in the paths' order.

    Args:
        how: ``probabilities``, ``logits``, ``vote``, or ``mean`` of the outputs themselves.
    """
    total = torch.zeros_like(values[0])
    for each, path in zip(values, served, strict=True):
        total += _vote(each, how) * path.weight
    return total


def _vote(y: Tensor, how: str) -> Tensor:
    if how == "probabilities":
        return y.softmax(-1)
    if how == "vote":
        return F.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
    return y
