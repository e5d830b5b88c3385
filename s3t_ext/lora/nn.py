"""Adapter layers: every ``nn.Linear`` of a model over pools of slice adapters, steered by one routing table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor, nn

from s3t_ext.lora.ops import masked_lora_linear

_Snapshot = tuple[Tensor, Tensor, int, dict]  # ids (G, L), offsets in samples (G + 1,), samples, views by layer


class Routing(nn.Module):
    """Hold the table (G, L) of adapter ids that all adapted layers of a model read.

    Row g lists, for the samples of group g, the pool index of the live adapter of each stage, or -1. Rewriting it in
    place is all that a deletion does to a model: the next forward pass sees it.

    Args:
        groups: G; ``stages``: L, the number of columns.
    """

    table: Tensor

    def __init__(self, groups: int, stages: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((groups, stages), -1, dtype=torch.int32), persistent=False)  # (G, L)
        self._active: ContextVar[_Snapshot | None] = ContextVar("routing", default=None)

    @contextmanager
    def batch(self, counts: Sequence[int], table: Tensor | None = None) -> Iterator[None]:
        """Route one forward pass: group g owns the next ``counts[g]`` samples of the batch.

        The pass reads one snapshot of the table, taken here, so that no answer mixes two states of it.

        Args:
            counts: G numbers of samples; zero is allowed.
            table: (G, L) int32 to use in place of the model's own (training routes nodes, not shards).
        """
        ids = (self.table if table is None else table).clone()  # (G, L)
        if len(counts) != len(ids):
            raise ValueError(f"counts: expected {len(ids)} numbers, one for each group, got {len(counts)}")
        token = self._active.set((ids, _edges(tuple(counts), ids.device), sum(counts), {}))
        try:
            yield
        finally:
            self._active.reset(token)

    def view(self, columns: slice, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the ids (G, P) of some columns and the offsets (G + 1,) in rows of x, samples first."""
        active = self._active.get()
        if active is None:
            return self.table[:, columns], None
        ids, edges, samples, views = active
        if x.shape[0] != samples:
            raise ValueError(f"x: expected {samples} samples as given to Routing.batch, got {x.shape[0]}")
        rows = x.shape[:-1].numel() // max(samples, 1)
        key = (columns.start, columns.stop, rows)
        if key not in views:
            views[key] = (ids[:, columns], (edges * rows).to(torch.int32))  # (G, P), (G + 1,)
        return views[key]


@lru_cache(maxsize=64)
def _edges(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Lay groups of these sizes one after the other. Kept: a CUDA graph may not copy numbers from the host."""
    return torch.tensor([0, *itertools.accumulate(counts)], device=device)  # (G + 1,)


class MaskedLoRALinear(nn.Module):
    """Apply a frozen linear layer and, in the same pass, the live adapters of each sample's group.

    ``y = W x + bias + scale * sum_p (x a[n_p].T) b[n_p]``, n_p from the routing table's ``columns``.

    Args:
        linear: the layer to take over; its weight and bias are frozen.
        routing: the model's table; ``columns``: the stages that this layer adapts (none: the plain layer, exact).
        rank: r; ``scale``: alpha / r in LoRA's terms.
        mode: ``exact`` or ``fast``, see ``masked_lora_linear``.
    """

    def __init__(
        self, linear: nn.Linear, routing: Routing, columns: slice, rank: int, scale: float, mode: str = "exact"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().contiguous(), requires_grad=False)  # (O, K)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)  # (O,)
        self.columns, self.rank, self.scale, self.mode = columns, rank, scale, mode
        self._routing = (routing,)  # in a tuple: the table belongs to the model, not to each layer
        self.train_pool: tuple[Tensor, Tensor] | None = None
        self.a = self.weight.new_empty(0, rank, self.in_features, dtype=torch.float32)  # (N, r, K)
        self.b = self.weight.new_empty(0, rank, self.out_features, dtype=torch.float32)  # (N, r, O)

    @property
    def stages(self) -> range:
        """The stages (columns of the table, from 0) whose adapters live in this layer."""
        return range(self.columns.start, self.columns.stop)

    def forward(self, x: Tensor) -> Tensor:
        ids, offsets = self._routing[0].view(self.columns, x)
        rows = x.reshape(-1, self.in_features)  # (T, K)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()  # what nn.Linear takes, this takes
        y = masked_lora_linear(
            rows,
            self.weight,
            self.bias,
            self.a,
            self.b,
            ids,
            offsets,
            scale=self.scale,
            train=self.train_pool,
            mode=self.mode,
        )  # (T, O)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"adapters={len(self.a)}, stages={list(self.stages)}, mode={self.mode}"
        )


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Tell whether a module's dotted name is meant by ``targets``, in the sense of PEFT's ``target_modules``.

    ``"all-linear"`` means every linear layer, another string is a regular expression for the whole name, and in a list
    an item means a whole name or its last whole components.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def adapt(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    stages: int,
    groups: int = 1,
    rank: int = 8,
    scale: float = 2.0,
    stage_of: Mapping[str, int] | None = None,
    mode: str = "exact",
) -> Routing:
    """Replace the linear layers of a model, in place, by ``MaskedLoRALinear`` over one routing table.

    Args:
        targets: which layers get adapters, see ``matches``. All other ``nn.Linear`` become frozen layers of the same
            kind without adapters, so that the whole model keeps the promise of mode ``exact``.
        stages: L; ``groups``: G, rows of the table.
        stage_of: placement ``layers``: the stage (from 0) that owns each target; None: placement ``stack``, every
            target holds adapters of all stages.

    Returns:
        Routing: the table, with all slots masked.

    Raises:
        ValueError: no linear layer matches ``targets``, a target has no stage in ``stage_of``, or a linear layer is of
            a subclass of ``nn.Linear``.
    """
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"model: expected plain nn.Linear layers, got {type(linear).__name__} at {name!r}, whose owner may "
                "read its weight and pass the adapters by; use a model with plain layers"
            )
    wanted = [name for name in linears if matches(name, targets)]
    if not wanted:
        raise ValueError(
            f"targets: expected a pattern for some of the model's linear layers {sorted(linears)[:8]}, got {targets!r}"
        )
    routing = Routing(groups, stages)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made: dict[nn.Linear, MaskedLoRALinear] = {}  # a layer under two names stays one layer
    for name, linear in linears.items():
        columns = slice(0, 0)
        if name in wanted and stage_of is None:
            columns = slice(0, stages)
        elif name in wanted and stage_of is not None:
            if name not in stage_of:
                raise ValueError(f"stage_of: expected a stage for every target, got none for {name!r}")
            columns = slice(stage_of[name], stage_of[name] + 1)
        if linear not in made:
            made[linear] = MaskedLoRALinear(linear, routing, columns, rank, scale, mode)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linear])
    return routing


def adapted_layers(model: nn.Module) -> dict[str, MaskedLoRALinear]:
    """List a model's layers that hold adapters, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLoRALinear) and len(m.stages)}
