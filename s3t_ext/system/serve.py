"""Serve a store: the live nodes of all shards as one batch, every answer checked before it is released."""

from __future__ import annotations

import threading
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s3t_ext.ledger import LedgerError
from s3t_ext.lora.pinned import pinned
from s3t_ext.plan import Path as NodePath
from s3t_ext.plan import StageTree
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import StoreError
from s3t_ext.system.folder import Cell, StoreFolder
from s3t_ext.system.network import Network, load_network, stack_pool
from s3t_ext.system.train import Node
from s3t_ext.system.unlearn import cells, delete_from, erase_or_warn


class Refused(RuntimeError):
    """The request cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """A released answer.

    Args:
        labels: (n,) of the declared classes; ``scores``: (n, classes), weights of the shards applied, rows sum to 1
            (mean of logits: the logits).
        nodes: ids of the nodes it was computed with, all live when it was released; ``depths``: of each shard.
        epoch: number of ledger events that it has seen.
    """

    labels: list[str]
    scores: np.ndarray
    nodes: tuple[str, ...]
    depths: tuple[int, ...]
    epoch: int


class Service:
    """Answer from a store, delete from it, and see the deletions of other processes.

    All live nodes are resident, so a deletion rewrites rows of the routing table and is complete: the next forward
    pass uses the best live path of every shard. Threads may call ``predict`` and ``delete`` at the same time.

    Args:
        path: of a fitted store.
        combine: overrides the store's: ``probabilities``, ``logits`` or ``vote``.
        tree: serve only nodes of this tree (to compare plans that share training); None: all.
        store_key: of a store that no other process opens; None: found.
    """

    def __init__(
        self,
        path: Path | str,
        combine: str | None = None,
        tree: StageTree | None = None,
        store_key: StoreKey | None = None,
    ) -> None:
        self.folder = StoreFolder(path, store_key)
        self.config = self.folder.config
        self.combine = combine or self.config.combine
        if self.combine not in ("probabilities", "logits", "vote"):
            raise ValueError(f"combine: expected 'probabilities', 'logits' or 'vote', got {combine!r}")
        self.network: Network = load_network(self.folder, self.config.shards)
        self._lock = threading.RLock()  # guards the books' view: _ids, _slots, _paths, _epoch and the table
        self._refreshing = threading.Lock()  # one thread reads the books for all, and no request waits for it
        self._allowed = None if tree is None else frozenset(tree.nodes)
        self._epoch = -1
        self._failure = ""  # of the ledger: from then on nothing is answered
        self._ids: dict[Node, str] = {}
        self._slots: dict[Node, int] = {}
        self._paths: list[NodePath] = [()] * self.config.shards
        self._load()

    def close(self) -> None:
        self.folder.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def depths(self) -> tuple[int, ...]:
        """The depth that each shard serves at."""
        with self._lock:
            return tuple(map(len, self._paths))

    def _load(self) -> None:
        """Make all live nodes resident and route every shard to its best one."""
        while True:
            epoch = self.folder.ledger.fence.read()
            self._ids = self._live()
            try:
                weights = {node: self.folder.nodes.get(name)[1] for node, name in self._ids.items()}
                break
            except StoreError:
                if self.folder.ledger.fence.read() == epoch:
                    raise  # damaged; otherwise a deletion erased it under our eyes: look again
        stack = self.config.placement == "stack"
        by_stage: dict[int, int] = {}
        for node in weights:
            column = 0 if stack else len(node[1])
            self._slots[node] = by_stage.get(column, 0)
            by_stage[column] = self._slots[node] + 1
        for name, layer in self.network.layers.items():
            rows = [w for node, w in weights.items() if len(node[1]) - 1 in layer.stages]
            layer.a, layer.b = (stack_pool([w[f"{name}.{part}"] for w in rows], layer, part) for part in "ab")
        self._route()
        self._epoch = epoch

    def _live(self) -> dict[Node, str]:
        """List the live nodes in the store that this service may use."""
        trained = self.folder.trained(self.folder.ledger.slices())
        return {node: n for node, n in trained.items() if self._allowed is None or node[1] in self._allowed}

    def _route(self) -> None:
        """Rewrite the table to the best resident live node of every shard; who holds the old one keeps it as it was."""
        self._paths = self.folder.best(self._ids)
        rows = [[-1] * self.config.slices for _ in self._paths]
        for shard, path in enumerate(self._paths):
            for i in range(len(path)):
                rows[shard][i] = self._slots[shard, path[: i + 1]]
        self._table = torch.tensor(rows, dtype=torch.int32)  # (m, L)
        self.network.routing.table.copy_(self._table)

    def _mask(self, dirty: Set[Cell]) -> None:
        """Drop the nodes that these slices make dead, and route around them."""
        for node in [node for node in self._ids if any((node[0], k) in dirty for k in node[1])]:
            del self._ids[node]
        self._route()

    def _poison(self) -> None:
        """Overwrite dropped adapters in memory with NaN: erased, and a standing test that nothing reads them."""
        for shard, path in [node for node in self._slots if node not in self._ids]:
            slot = self._slots.pop((shard, path))
            for layer in self.network.layers.values():
                if len(path) - 1 in layer.stages:
                    layer.a[slot].fill_(torch.nan)
                    layer.b[slot].fill_(torch.nan)

    def refresh(self) -> None:
        """See the deletions of other processes. ``predict`` calls it before it releases an answer.

        Raises:
            Refused: the ledger failed, now or before, or is another one than was opened.
        """
        try:
            self._check()
            self._catch_up()
        except LedgerError as error:
            self._failure = str(error)
            raise Refused(f"nothing is answered until the service is opened anew: {error}") from error

    def _check(self) -> None:
        if self._failure:
            raise LedgerError(self._failure)
        self.folder.ledger.fence.check()

    def _catch_up(self) -> None:
        if self.folder.ledger.fence.read() == self._epoch:
            return
        with self._refreshing:
            epoch = self.folder.ledger.fence.read()
            if epoch == self._epoch:
                return
            dirty = self.folder.ledger.dirty()
            with self._lock:
                self._mask(dirty)
                self._poison()
                self._epoch = epoch

    # --- requests ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray) -> Answer:
        """Answer for inputs (n, *shape), as the schema scales them: all shards in one forward pass.

        Raises:
            ValueError: inputs of another shape, or not finite.
            Refused: every shard is dead, or as ``refresh``.
        """
        x = np.asarray(inputs, np.float32)
        shape = self.folder.schema.shape
        if x.shape[1:] != shape or not len(x) or not np.isfinite(x).all():
            raise ValueError(
                f"inputs: expected finite numbers of shape (n, {', '.join(map(str, shape))}), n >= 1, got "
                f"shape {x.shape}"
            )
        while True:
            self.refresh()
            with self._lock:
                paths, epoch = list(self._paths), self._epoch
                used = [self._ids[s, path[:d]] for s, path in enumerate(paths) for d in range(1, len(path) + 1)]
                table = self._table
            answer = self._compute(torch.from_numpy(x), paths, table, tuple(used), epoch)
            self.refresh()
            with self._lock:
                if set(used) <= set(self._ids.values()):
                    return answer

    def accuracy(self, inputs: np.ndarray, labels: np.ndarray) -> float:
        """Give the share of inputs whose answer is the declared class with that index, (n,) integers."""
        answer = self.predict(inputs)
        return float(
            np.mean([self.folder.schema.classes[i] == said for i, said in zip(labels, answer.labels, strict=True)])
        )

    def _compute(
        self, x: Tensor, paths: Sequence[NodePath], table: Tensor, used: tuple[str, ...], epoch: int
    ) -> Answer:
        live = [shard for shard, path in enumerate(paths) if path]
        if not live:
            if not self.folder.ledger.dirty():
                raise Refused("no node is trained yet; run `s3t fit` again to go on")
            raise Refused(
                "every shard is dead: all trained nodes depend on deleted records; fit a new store on the rest"
            )
        counts = [len(x) if path else 0 for path in paths]
        with pinned(), self.network.routing.batch(counts, table):
            logits = self.network(x.repeat(len(live), *[1] * (x.dim() - 1))).view(len(live), len(x), -1)  # (m', n, C)
        total = sum(map(len, paths))
        scores = torch.zeros_like(logits[0])  # (n, C)
        for row, shard in zip(logits, live, strict=True):  # in a fixed order
            scores += self._vote(row) * (len(paths[shard]) / total)
        labels = [self.folder.schema.classes[i] for i in scores.argmax(-1).tolist()]
        return Answer(labels, scores.numpy(), used, tuple(map(len, paths)), epoch)

    def _vote(self, logits: Tensor) -> Tensor:
        if self.combine == "logits":
            return logits
        if self.combine == "vote":
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return logits.softmax(-1)

    def acknowledge(self, subjects: Sequence[str], request_id: str | None = None) -> dict[str, Any]:
        """Forget people, up to the acknowledgement: mask, durable record, receipt. ``delete`` also erases.

        Raises:
            ValueError: as ``s3t_ext.delete``; what is served is as before.
            StoreError, LedgerError: nothing was acknowledged; the mask stays until the service is opened anew; after a
                LedgerError nothing is answered before that either.
        """
        with self._lock:
            ids = dict(self._ids)
            try:
                self._check()
                self._mask(cells(self.folder, subjects))
                receipt = delete_from(self.folder, subjects, request_id)
                self._mask(self.folder.ledger.dirty())  # all that is acknowledged, whatever the epoch word said
            except ValueError:
                self._ids = ids
                self._route()
                raise
            except LedgerError as error:
                self._failure = str(error)
                raise
            self._poison()
        return receipt

    def delete(self, subjects: Sequence[str], request_id: str | None = None) -> dict[str, Any]:
        """Forget people and return the receipt. See ``s3t_ext.delete``, which does this without a service."""
        receipt = self.acknowledge(subjects, request_id)
        erase_or_warn(self.folder)
        return receipt
