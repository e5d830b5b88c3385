"""Heads that no record can leak through: a frozen one, one for each node, or a causal model's own; and their losses."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.lora.kernels import backend_for
from s3t_ext.lora.primitives import KERNELS
from s3t_ext.lora.rng import uniform
from s3t_ext.lora.routing import Routing

IGNORED = -100  # a label at which no loss is taken


def head_kind(wanted: str, task: str, outputs: int, features: int) -> str:
    """Name the kind of head: ``frozen`` (one random orthonormal matrix), ``trained`` (by each node) or ``base``.

    Args:
        wanted: one of the three, or empty: ``base`` for causal models, ``frozen`` for at most as many classes as
            features, else ``trained``.

    Raises:
        ValueError: no such head for this task.
    """
    usual = "trained" if task == "regression" or outputs > features else "frozen"
    kind = wanted or ("base" if task == "causal" else usual)
    if (kind == "base") != (task == "causal"):
        allowed = "'base', a causal model's own" if task == "causal" else "'frozen' or 'trained'"
        raise ValueError(f"head: expected {allowed} for the task {task!r}, got {wanted!r}")
    return kind


def orthonormal(key: bytes, classes: int, features: int) -> Tensor:
    """Draw a frozen head (classes, features) with orthonormal rows; logits are ``head @ features``.

    It is stored and hashed as part of a node's identity, since the bits of a QR factorisation differ between machines.

    Raises:
        ValueError: more classes than features.
    """
    if classes > features:
        raise ValueError(
            f"classes: expected at most as many as the model's features ({features}) for a frozen head, got {classes}; "
            "use head='trained'"
        )
    q, r = torch.linalg.qr(uniform(key, (features, classes), 1.0).double())
    return (q * r.diagonal().sign()).t().float().contiguous()  # (classes, features)


class NodeHeads(nn.Module):
    """Apply a linear head of its own to the rows of each group: ``y[t] = W[n] x[t] + bias[n]``, n from the table.

    Args:
        routing: the model's table; ``column``: the one that names a head for each group, or -1: all outputs are 0.
        features: F; ``outputs``: C.

    Notes:
        One grouped product in mode ``exact``: the bits of a row depend on the row and its own head alone. In fp32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, routing: Routing, column: int, features: int, outputs: int) -> None:
        super().__init__()
        self._routing, self.column = (routing,), column  # in a tuple: the table belongs to the model
        self.features, self.outputs = features, outputs
        self.register_buffer("weight", torch.zeros(0, outputs, features), persistent=False)  # (N, C, F)
        self.register_buffer("bias", torch.zeros(0, outputs), persistent=False)  # (N, C)
        self.train_pool: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        ids, offsets = self._routing[0].view(slice(self.column, self.column + 1), features)  # (G, 1), (G + 1,)
        weight, bias = self.train_pool or (self.weight, self.bias)
        x = F.pad(features.float(), (0, 1), value=1.0)  # (n, F + 1): the last column meets the bias
        return _Grouped.apply(x, torch.cat([weight, bias[..., None]], 2), ids, offsets)  # (n, C)


class _Grouped(torch.autograd.Function):
    """``y[t] = w[ids[group(t)]] x[t]`` with x (T, D), w (N, C, D), ids (G, 1); fp32."""

    @staticmethod
    def forward(ctx, x, w, ids, offsets):
        ctx.save_for_backward(x, w, ids, offsets)
        return KERNELS.shrink(x, w, None, ids, offsets, None, 1.0, *_PLAIN, _backend(x))[:, 0]  # (T, C)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, ids, offsets = ctx.saved_tensors
        s, dx, dw = dy.contiguous()[:, None], None, None  # (T, 1, C)
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)  # (T, D)
            KERNELS.expand_(dx, s, w, None, ids, offsets, *_PLAIN, _backend(x))
        if ctx.needs_input_grad[1]:
            dw = KERNELS.outer(s, x, ids, offsets, 0, len(w), w.dtype, *_PLAIN, _backend(x))  # (N, C, D)
        return dx, dw, None, None


_PLAIN = (None, None, 0.0)  # no dropout


def _backend(x: Tensor) -> str:
    return backend_for("shrink", x.device, x.dtype)


# --- losses ----------------------------------------------------------------------------------------------------------


def record_losses(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Give the loss of each record (n,), or of each counted token of a causal model (k,); nothing joins two of them.

    Args:
        outputs: (n, C) logits, (n, C) values of a regression, or (k, vocabulary) logits of counted tokens.
        labels: (n,) int64, (n, C) float32, or (k,) int64.

    Returns:
        Cross entropy; for a regression the mean of squared errors over the targets.
    """
    if task != "regression":
        return F.cross_entropy(outputs, labels, reduction="none")
    squared = (outputs - labels).square()  # (n, C)
    return functools.reduce(torch.add, squared.unbind(1)) / squared.shape[1]  # in a fixed order


def counted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find what a causal model is asked: the (row, column) of hidden states whose next token has a label.

    Args:
        labels: (n, l) int64, in line with the token ids; ``IGNORED`` where no loss is taken.

    Returns:
        Rows and columns (k,), in ascending order; the label of (row, column) is ``labels[row, column + 1]``.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows, columns
