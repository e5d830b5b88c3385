"""Layers of a converted PEFT model: linear ones with named adapters, and modules of which adapters bring copies."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.lora.nn import MaskedLoRALinear
from s3t_ext.lora.routing import Routing

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names

PASS = threading.local()  # PASS.names: the adapter of each sample of the forward pass that this thread is in, or None


class AdaptersLinear(MaskedLoRALinear):
    """Apply a linear layer and adapters of several ranks, scales and rates of dropout.

    Args:
        lora: PEFT's layer; ``routing``: the model's table (1, N).
        names: of the model's adapters in the order of the ids; the last ``trainable`` of them are trained.
        mode: see ``masked_lora_linear``.
    """

    def __init__(self, lora: Any, routing: Routing, names: Sequence[str], trainable: int, mode: str) -> None:
        base = lora.get_base_layer()
        super().__init__(_linear(base), routing, slice(0, len(names)), max(lora.r.values(), default=1), 1.0, mode)
        pairs = [(lora.lora_A[n].weight, lora.lora_B[n].weight) if n in lora.lora_A else None for n in names]
        self.names = tuple(names)
        self.ranks = [len(pair[0]) if pair else 0 for pair in pairs]  # 0: the adapter is not in this layer
        self._rates = [getattr(lora.lora_dropout[n], "p", 0.0) if rank else 0.0 for n, rank in zip(names, self.ranks)]
        self._rate: float | None = 0.0  # of the active adapters; None where there is no one rate
        scales = [lora.scaling[name] if rank else 0.0 for name, rank in zip(names, self.ranks)]
        where, dtype = base.weight.device, base.weight.dtype
        self.scale = torch.tensor(scales, dtype=torch.float32, device=where)  # (N,); no buffer: half() would round it
        if {pair[0].dtype for pair in pairs if pair} != {dtype}:
            dtype = torch.promote_types(dtype, torch.float32)
        a = torch.zeros(len(names), self.rank, self.in_features, dtype=dtype, device=where)  # (N, r, K)
        b = torch.zeros(len(names), self.rank, self.out_features, dtype=dtype, device=where)  # (N, r, O)
        for n, pair in enumerate(pairs):
            if pair:
                a[n, : self.ranks[n]], b[n, : self.ranks[n]] = pair[0].detach(), pair[1].detach().t()
        first = len(names) - trainable
        self.a = nn.Parameter(a[:first].clone(), requires_grad=False)  # (N - M, r, K)
        self.b = nn.Parameter(b[:first].clone(), requires_grad=False)  # (N - M, r, O)
        self.train_pool = (a[first:].clone(), b[first:].clone()) if trainable else None  # (M, r, K), (M, r, O)

    @property
    def train_pool(self) -> tuple[Tensor, Tensor] | None:
        """The trainable adapters, parameters ``a1`` and ``b1``."""
        a1, b1 = self._parameters.get("a1"), self._parameters.get("b1")
        return None if a1 is None or b1 is None else (a1, b1)

    @train_pool.setter
    def train_pool(self, pool: tuple[Tensor, Tensor] | None) -> None:
        self.a1: nn.Parameter | None = None if pool is None else nn.Parameter(pool[0])
        self.b1: nn.Parameter | None = None if pool is None else nn.Parameter(pool[1])

    def choose_dropout(self, ids: Sequence[int]) -> None:
        """Find the one rate of dropout in training of the active adapters."""
        live = [n for n in ids if self.ranks[n]]
        trained = [n for n in live if n >= len(self.a)] if self.train_pool is not None else live
        rates = {self._rates[n] for n in trained} or {0.0}
        kept = all(self._rates[n] == 0 for n in live if n not in trained)  # the op drops for trainable adapters only
        self._rate = rates.pop() if kept and len(rates) == 1 else None

    def dropout(self, x: Tensor) -> tuple[float, Tensor, Tensor] | None:
        if not self.training or self._rate == 0.0:
            return None
        if self._rate is None:
            raise NotImplementedError(
                "lora_dropout: active adapters with different rates in one layer, or frozen ones with a rate beside "
                "trainable ones, are not supported in training; give them one rate, or activate fewer at once"
            )
        groups, rows = self._routing[0].table.shape[0], x.shape[:-1].numel()
        seeds = torch.randint(-(2**63), 2**63 - 1, (groups,), device=x.device)  # (G,)
        return self._rate, seeds, torch.arange(rows, device=x.device)  # rows: (T,)

    def extra_repr(self) -> str:
        here = [name for name, rank in zip(self.names, self.ranks) if rank]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"adapters={len(here)} ({', '.join(here)}), mode={self.mode}, packed={self.packed is not None}"
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.scale = torch.as_tensor(self.scale, device=self.a.device)
        return self


class SavedModules(nn.Module):
    """Stand for a module of which some adapters bring a copy of their own (PEFT's ``modules_to_save``).

    Args:
        original: the base model's; ``saved``: the copies by the name of their adapter.
    """

    def __init__(self, original: nn.Module, saved: nn.ModuleDict) -> None:
        super().__init__()
        self.original_module, self.modules_to_save, self.active = original, saved, BASE  # named as in PEFT

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.of(self.active), name)

    def of(self, name: str) -> nn.Module:
        """Give an adapter's copy, or the original where it has none."""
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module  # noqa: SIM401

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = getattr(PASS, "names", None)
        if names is None:
            return self.of(self.active)(*args, **kwargs)
        rows: dict[nn.Module, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(self.of(name), []).append(i)
        if len(rows) == 1:
            return next(iter(rows))(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            kind = type(self.original_module).__name__
            raise NotImplementedError(
                f"adapter_names: several adapters' copies of {kind}, which takes more than one tensor, in one batch "
                "are not supported; call the model once for each adapter"
            )
        parts = torch.cat([module(args[0][i]) for module, i in rows.items()])
        order = torch.tensor([i for some in rows.values() for i in some])
        return parts[order.argsort().to(parts.device)]


def _linear(base: Any) -> nn.Linear:
    """Give a base layer as ``nn.Linear``; transformers' Conv1D keeps its weight as (K, O)."""
    if isinstance(base, nn.Linear):
        return base
    inputs, outputs = base.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(base.weight.detach().t().contiguous(), requires_grad=False)  # (O, K)
    linear.bias = base.bias
    return linear
