"""Adapter layers: every ``nn.Linear`` of a model over pools of slice adapters, steered by one routing table."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s3t_ext.lora.ops import masked_lora_linear

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # steps of it reach every 64-bit number: keys of a sample's rows do not meet


class _Pass(NamedTuple):
    """What every layer of one forward pass reads: a snapshot."""

    ids: Tensor  # (G, L)
    edges: Tensor  # (G + 1,), in samples
    samples: int
    dropout: tuple[float, Tensor, Tensor] | None  # p, seeds (G, adapted layers), keys (samples,)
    views: dict


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
        self._thread = threading.local()  # and no context variable: torch.compile cannot read those
        self._captured: list[Tensor] = []  # what CUDA graphs read by address and nobody else may hold

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_thread": None}  # it can be neither copied nor pickled

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._thread = threading.local()

    @property
    def _active(self) -> _Pass | None:
        """The pass that this thread is in."""
        return getattr(self._thread, "active", None)

    @contextmanager
    def batch(
        self,
        counts: Sequence[int],
        table: Tensor | None = None,
        dropout: tuple[float, Tensor, Tensor] | None = None,
    ) -> Iterator[None]:
        """Route one forward pass: group g owns the next ``counts[g]`` samples of the batch.

        The pass reads one snapshot of the table, taken here, so that no answer mixes two states of it. Under capture by
        a CUDA graph the snapshot is taken by every replay; run a pass of the same counts before the capture.

        Args:
            counts: G numbers of samples; zero is allowed.
            table: (G, L) int32 to use in place of the model's own (training routes nodes, not shards).
            dropout: (p, seeds (G, adapted layers) int64, keys (samples,) int64) of the trainable adapters, see
                ``masked_lora``; a column of seeds for each of ``adapted_layers`` in turn, a key for each sample.
        """
        ids = (self.table if table is None else table).clone()  # (G, L)
        if len(counts) != len(ids):
            raise ValueError(f"counts: expected {len(ids)} numbers, one for each group, got {len(counts)}")
        edges = _edges(tuple(counts), ids.device)  # (G + 1,)
        if _captures(edges):
            self._captured.append(edges)
        outer = self._active
        self._thread.active = _Pass(ids, edges, sum(counts), dropout, {})
        try:
            yield
        finally:
            self._thread.active = outer

    def view(self, columns: slice, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the ids (G, P) of some columns and the offsets (G + 1,) in rows of x, samples first."""
        active = self._active
        if active is None:
            return self.table[:, columns], None
        if x.shape[0] != active.samples:
            raise ValueError(f"x: expected {active.samples} samples as given to Routing.batch, got {x.shape[0]}")
        rows = x.shape[:-1].numel() // max(active.samples, 1)
        key = (columns.start, columns.stop, rows)
        if key not in active.views:
            active.views[key] = (active.ids[:, columns], (active.edges * rows).to(torch.int32))  # (G, P), (G + 1,)
        return active.views[key]

    def dropout(self, number: int, x: Tensor) -> tuple[float, Tensor, Tensor] | None:
        """Give (p, seeds (G,), keys of the rows of x (T,)) for an adapted layer, or None."""
        active = self._active
        if active is None or active.dropout is None:
            return None
        p, seeds, keys = active.dropout
        rows = x.shape[:-1].numel() // max(active.samples, 1)
        if rows not in active.views:
            within = torch.arange(rows, device=keys.device) * _ODD  # (rows of a sample,)
            active.views[rows] = (keys[:, None] + within).flatten()  # (T,)
        return p, seeds[:, number].contiguous(), active.views[rows]


def _captures(t: Tensor) -> bool:
    """Tell whether a CUDA graph is being captured on the device of a tensor."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


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
        rank: r; ``scale``: alpha / r in LoRA's terms, one number or one for each adapter.
        mode: ``exact`` or ``fast``, see ``masked_lora_linear``.
        number: of the layer among the model's adapted layers; names its column of dropout seeds.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        routing: Routing,
        columns: slice,
        rank: int,
        scale: float | Tensor,
        mode: str = "exact",
        number: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().contiguous(), requires_grad=False)  # (O, K)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)  # (O,)
        self.columns, self.rank, self.scale, self.mode, self.number = columns, rank, scale, mode, number
        self._routing = (routing,)  # in a tuple: the table belongs to the model, not to each layer
        self.train_pool: tuple[Tensor, Tensor] | None = None
        for name, width in (("a", self.in_features), ("b", self.out_features)):  # (N, r, K), (N, r, O)
            pool = self.weight.new_empty(0, rank, width, dtype=torch.float32)
            self.register_buffer(name, pool, persistent=False)

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
            dropout=self.dropout(x),
            mode=self.mode,
        )  # (T, O)
        return y.view(*x.shape[:-1], self.out_features)

    def dropout(self, x: Tensor) -> tuple[float, Tensor, Tensor] | None:
        """Give what ``masked_lora_linear`` takes as ``dropout`` in this pass, or None."""
        return None if self.train_pool is None else self._routing[0].dropout(self.number, x)

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
        Routing: the table, with all slots masked, on the device of the first layer; move it along with the model.

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
    routing = Routing(groups, stages).to(next(iter(linears.values())).weight.device)
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
            number = sum(len(layer.stages) > 0 for layer in made.values())
            made[linear] = MaskedLoRALinear(linear, routing, columns, rank, scale, mode, number)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linear])
    return routing


def adapted_layers(model: nn.Module) -> dict[str, MaskedLoRALinear]:
    """List a model's layers that hold adapters, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLoRALinear) and len(m.stages)}
