"""AdamW over stacks of adapters, in operations that round once: the bits of one node do not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 2**15  # numbers that go through all operations of a step together: five such blocks stay in a core's cache


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
        self.gradients: list[Tensor] = []  # of each parameter: views of grad
        start = 0
        for p in parameters:
            p.data = self.flat[start : start + p.numel()].view(p.shape)
            self.gradients.append(self.grad[start : start + p.numel()].view(p.shape))
            p.grad = self.gradients[-1]
            start += p.numel()
        size = _BLOCK if self.flat.is_cpu else max(start, 1)
        self._blocks = list(zip(*(t.split(size) for t in (self.flat, self.grad, self.m, self.v, self._tmp))))

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
        of_v, of_step, of_decay = self._factors.unbind()
        for p, g, m, v, t in self._blocks:
            torch.mul(g, g, out=t)
            v.mul_(b2).add_(t.mul_(1 - b2))
            m.mul_(b1).add_(g.mul_(1 - b1))
            torch.mul(v, of_v, out=t)
            t.sqrt_().add_(self.eps)
            torch.div(m, t, out=t)
            t.mul_(of_step)
            if self.weight_decay:
                p.mul_(of_decay)
            p.sub_(t)
            g.zero_()

    def overwrite(self) -> None:
        """Overwrite parameters, gradients and moments with NaN: nothing of what was trained stays in memory here."""
        for buffer in (self.flat, self.grad, self.m, self.v, self._tmp):
            buffer.fill_(torch.nan)


@torch.no_grad()
def clip_by_node(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale each node's gradients, in place, so that their norm is at most ``limit``: ``g_j *= min(1, limit / |g_j|)``.

    Args:
        gradients: (M, ...) each, fp32: row j of all of them together is the gradient of node j.

    Notes:
        Sums are by halves, elementwise: a node's bits depend neither on the others nor on their number, as those of a
        reduction over many rows do.
    """
    squares = torch.cat([g.flatten(1) for g in gradients], 1).square_()  # (M, S)
    while squares.shape[1] > 1:
        half = -(-squares.shape[1] // 2)
        squares[:, : squares.shape[1] - half] += squares[:, half:]
        squares = squares[:, :half]
    norms = squares[:, 0].sqrt()  # (M,)
    factors = torch.where(norms > limit, limit / norms, 1.0)
    for g in gradients:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))
