"""One table says which adapters the samples of a forward pass read; every adapted layer of a model looks here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # steps of it reach every 64-bit number: keys of a sample's rows do not meet


class _Pass(NamedTuple):
    """What every layer of one forward pass reads: a snapshot."""

    ids: Tensor  # (G, L)
    edges: Tensor  # (G + 1,), in samples
    samples: int
    dropout: tuple[float, Tensor, Tensor] | None  # p, seeds (G, adapted layers), keys (samples,)
    views: dict


class _Thread(threading.local):
    """The pass that a thread is in."""

    active: _Pass | None = None  # of the class: to find nothing in a thread's own takes twice as long


class Routing(nn.Module):
    """Hold the table (G, L) of adapter ids that all adapted layers of a model read.

    Row g lists, for the samples of group g, the pool index of the live adapter of each stage, or -1. Rewriting it in
    place is all that a deletion does to a model: the next forward pass sees it. A pass that runs meanwhile may read
    some of both, unless it is inside ``batch``, which reads a snapshot.

    Args:
        groups: G; ``stages``: L, the number of columns.
    """

    table: Tensor

    def __init__(self, groups: int, stages: int) -> None:
        super().__init__()
        self.stages = stages
        self.register_buffer("table", torch.full((groups, stages), -1, dtype=torch.int32), persistent=False)  # (G, L)
        self._thread = _Thread()  # and no context variable: torch.compile cannot read those
        self._captured: list[Tensor] = []  # what CUDA graphs read by address and nobody else may hold

    def add_column(self) -> int:
        """Append a column to the table, all masked, for what is no stage; return its number."""
        self.table = torch.nn.functional.pad(self.table, (0, 1), value=-1)  # (G, L + 1)
        self.stages += 1
        return self.stages - 1

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_thread": None}  # it can be neither copied nor pickled

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._thread = _Thread()

    @property
    def _active(self) -> _Pass | None:
        """The pass that this thread is in."""
        return self._thread.active

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
        lay = _edges.__wrapped__ if torch._C._len_torch_dispatch_stack() else _edges  # a tracer's are not kept
        edges = lay(tuple(counts), ids.device)  # (G + 1,)
        if _captures(edges):
            self._captured.append(edges)
        outer = self._active
        self._thread.active = _Pass(ids, edges, sum(counts), dropout, {})
        try:
            yield
        finally:
            self._thread.active = outer

    @contextmanager
    def tokens(self, starts: Tensor) -> Iterator[None]:
        """Take every row as a sample of its own inside the block: sample i of the pass owns the next rows of all.

        Args:
            starts: (samples + 1,) int64, ascending from 0: sample i owns the rows starts[i] to starts[i + 1] - 1 of a
                tensor that has rows of all samples, and no padding, one after the other. In a pass without ``batch``
                nothing needs to be known.

        Notes:
            Dropout is that of the same samples with padding behind them.
        """
        outer = self._active
        if outer is None:
            yield
            return
        if len(starts) != outer.samples + 1:
            raise ValueError(f"starts: expected {outer.samples + 1} numbers, one more than samples, got {len(starts)}")
        rows, dropout = int(starts[-1]), outer.dropout
        if dropout is not None:
            p, seeds, keys = dropout
            lengths = starts.diff()  # (samples,)
            within = torch.arange(rows, device=keys.device) - starts[:-1].repeat_interleave(lengths)  # (T,)
            dropout = (p, seeds, keys.repeat_interleave(lengths) + within * _ODD)
        self._thread.active = _Pass(outer.ids, starts[outer.edges], rows, dropout, {})
        try:
            yield
        finally:
            self._thread.active = outer

    def view(self, columns: slice, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the ids (G, P) of some columns and the offsets (G + 1,) in rows of x, samples first."""
        active = self._thread.active
        if active is None:
            table: Any = self._buffers["table"]  # by attribute it is half a microsecond of search
            return (table if columns.start == 0 and columns.stop == self.stages else table[:, columns]), None
        shape = x.shape
        if shape[0] != active.samples:
            raise ValueError(f"x: expected {active.samples} samples as given to Routing.batch, got {shape[0]}")
        rows = shape[1:-1].numel()  # of a sample
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
