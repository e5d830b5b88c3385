"""AdamW over stacks of adapters, in operations that round once: the bits of one node do not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AdamW:
    """Update stacked parameters by AdamW (Loshchilov & Hutter, 2019).

    ``m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)``
    with ``c = 1 - b^t``.

    Args:
        parameters: fp32 leaves of any shape; they are moved into one flat buffer, of which they become views.
        weight_decay: wd, decoupled.

    Notes:
        Every operation is elementwise and a single correctly rounded one (no fused multiply-add that a compiler may or
        may not contract in the tail of a vector loop), so a value's bits do not depend on its place in the buffer, on
        the number of nodes trained together or on threads.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        self.flat = torch.cat([p.detach().reshape(-1) for p in parameters])  # (S,)
        self.grad, self.m, self.v, self._tmp = (torch.zeros_like(self.flat) for _ in range(4))  # (S,) each
        self._factors = self.flat.new_empty(3)  # of v, of the step, of the decay: numbers that change with every step
        start = 0
        for p in parameters:
            p.data = self.flat[start : start + p.numel()].view(p.shape)
            p.grad = self.grad[start : start + p.numel()].view(p.shape)
            start += p.numel()

    def step(self, lr: float) -> None:
        """Apply one update with this learning rate and clear the gradients."""
        self.prepare(lr)
        self.apply()

    def prepare(self, lr: float) -> None:
        """Count a step and put its factors where ``apply`` reads them; call it before every replay of a CUDA graph."""
        self.steps += 1
        b1, b2 = self.betas
        factors = (1 / (1 - b2**self.steps), lr / (1 - b1**self.steps), 1 - lr * self.weight_decay)
        self._factors.copy_(torch.tensor(factors, dtype=self.flat.dtype))

    @torch.no_grad()
    def apply(self) -> None:
        """Update in place and clear the gradients: device work only, which a CUDA graph may capture."""
        b1, b2 = self.betas
        g, t = self.grad, self._tmp
        torch.mul(g, g, out=t)
        self.v.mul_(b2).add_(t.mul_(1 - b2))
        self.m.mul_(b1).add_(g.mul_(1 - b1))
        torch.mul(self.v, self._factors[0], out=t)
        t.sqrt_().add_(self.eps)
        torch.div(self.m, t, out=t)
        t.mul_(self._factors[1])
        if self.weight_decay:
            self.flat.mul_(self._factors[2])
        self.flat.sub_(t)
        g.zero_()

    def overwrite(self) -> None:
        """Overwrite parameters, gradients and moments with NaN: nothing of what was trained stays in memory here."""
        for buffer in (self.flat, self.grad, self.m, self.v, self._tmp):
            buffer.fill_(torch.nan)
