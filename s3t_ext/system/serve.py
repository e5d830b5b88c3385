"""Serve a store: the paths of all shards as one batch, every answer checked before it is released."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from s3t_ext.ledger import LedgerError
from s3t_ext.lora.pinned import pinned
from s3t_ext.plan import StageTree
from s3t_ext.store.crypt import StoreKey
from s3t_ext.system.config import ENSEMBLE, check_combine
from s3t_ext.system.data.reader import Reader
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import without
from s3t_ext.system.network import load_network
from s3t_ext.system.serving.ensemble import checked, combined, outputs
from s3t_ext.system.serving.live import LiveNodes, Route
from s3t_ext.system.serving.paths import by_shard
from s3t_ext.system.unlearn import cells, delete_from, erase_or_warn

if TYPE_CHECKING:
    from s3t_ext.system.serving.generate import Written


class Refused(RuntimeError):
    """The request cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """A released answer.

    Args:
        labels: (n,) of the declared classes; none where none are declared.
        scores: (n, classes), weights of the paths applied, rows sum to 1 (mean of logits: the logits); of a regression
            (n, targets), in the table's own units; of a causal store (n, vocabulary), for the next token.
        nodes: ids of the nodes it was computed with, all live when it was released; ``depths``: of each shard.
        epoch: number of ledger events that it has seen.
    """

    labels: list[str]
    scores: np.ndarray
    nodes: tuple[str, ...]
    depths: tuple[int, ...]
    epoch: int


class Service(LiveNodes):
    """Answer from a store, delete from it, and see the deletions of other processes.

    A deletion rewrites the routing table and is complete: the next forward pass uses the best of the live nodes in
    memory. Where a limit kept better ones out of it, they are loaded in the background and then answer, as do nodes
    that were trained meanwhile; ``settle`` does so at once. Threads may call all methods at the same time.

    Args:
        path: of a fitted store.
        combine: overrides the store's: ``probabilities``, ``logits`` or ``vote``.
        tree: serve only nodes of this tree (to compare plans that share training); None: all.
        store_key: of a store that no other process opens; None: found.
        ensemble: overrides the store's: ``best``, the deepest live node of each shard, or ``maximal``, all live nodes
            that no live one continues.
        memory: bytes for adapters, at least for the paths that answer and one more; None: room for all nodes.
        prior: probability of a deletion in each slice (L,), which tells what to hold next; None: uniform.
    """

    def __init__(
        self,
        path: Path | str,
        combine: str | None = None,
        tree: StageTree | None = None,
        store_key: StoreKey | None = None,
        *,
        ensemble: str | None = None,
        memory: int | None = None,
        prior: Sequence[float] | None = None,
    ) -> None:
        folder = StoreFolder(path, store_key)
        self.config = folder.config
        self.combine, ensemble = combine or self.config.combine, ensemble or self.config.ensemble
        check_combine(self.combine, folder.schema)
        if ensemble not in ENSEMBLE:
            raise ValueError(f"ensemble: expected one of {ENSEMBLE}, got {ensemble!r}")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise ValueError(f"memory: expected a whole number of bytes or None, got {memory!r}")
        self._refreshing = threading.Lock()  # one thread reads the books for all, and no request waits for it
        self._epoch = -1
        self._failure = ""  # of the ledger: from then on nothing is answered
        try:
            super().__init__(folder, load_network(folder, 1), ensemble, tree, memory, prior)
        except BaseException:
            folder.close()
            raise

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the books ---------------------------------------------------------------------------------------------------

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
            digests = self.folder.ledger.slices()
            with self._lock:
                self._follow(digests)
                self._poison()
                self._epoch = epoch
                if self._lacks():
                    self._wake()

    # --- requests ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray | Sequence[str]) -> Answer:
        """Answer for inputs (n, *shape), as the schema scales them, or texts: n strings, or token ids (n, l).

        Raises:
            ValueError: inputs of another shape or type, or not finite.
            Refused: every shard is dead, or as ``refresh``.
        """
        x = checked(self.folder.schema, self.network.base, self._as_ids(inputs))
        while True:
            route, epoch = self.start()
            answer = self._compute(x, route, epoch)
            self.refresh()
            if self.releasable(route):
                return answer

    def generate(
        self, prompts: np.ndarray | Sequence[str], tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> Written:
        """Go on from prompts, of a causal store: each next token is that of all paths together.

        ``serving.writer.Writer(service).generate`` is transformers' own ``generate``, with all its options.

        Args:
            prompts: n strings, or token ids (n, l), -1 after their end.
            tokens: how many at most are written; None: 64, or as many as the model has positions for.
            temperature: 0: the likeliest token; above: drawn, by ``seed`` and the prompt alone.

        Raises:
            ValueError: the store is not causal, prompts are no ids, or more tokens than the model has positions.
            Refused: every shard is dead, or as ``refresh``.
        """
        from s3t_ext.system.serving.generate import write

        return write(self, self._as_ids(prompts), tokens, temperature, seed)

    def _as_ids(self, inputs: np.ndarray | Sequence[str]) -> np.ndarray:
        """Give the token ids of texts that are given as they are; anything else as it came."""
        if self.folder.schema.is_text and len(inputs) and isinstance(inputs[0], str):
            return self._reader.tokens(list(map(str, inputs)))
        return np.asarray(inputs)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.folder.schema, self.folder.base)

    def start(self) -> tuple[Route, int]:
        """Give the route by which to compute an answer now, and the epoch that it has seen.

        Raises:
            Refused: every shard is dead, or as ``refresh``.
        """
        self.refresh()
        with self._lock:
            route, epoch = self._routed, self._epoch
        self._refuse_if_dead(route)
        return route, epoch

    def accuracy(self, inputs: np.ndarray, labels: np.ndarray) -> float:
        """Give the share of inputs whose answer is the declared class with that index, (n,) integers."""
        answer = self.predict(inputs)
        return float(
            np.mean([self.folder.schema.classes[i] == said for i, said in zip(labels, answer.labels, strict=True)])
        )

    def _compute(self, x: Tensor, route: Route, epoch: int) -> Answer:
        schema, how = self.folder.schema, self.combine
        with self.one_pass():
            values = outputs(self.network, x, route.table, route.depth)  # (G, n, C)
        scores = combined(values, route.served, "mean" if schema.task == "regression" else how)  # (n, C)
        if schema.task == "regression":
            scores = torch.stack([y / t.scale + t.offset for y, t in zip(scores.unbind(1), schema.targets)], 1)
        labels = [schema.classes[i] for i in scores.argmax(-1).tolist()] if schema.classes else []
        return Answer(labels, scores.numpy(), route.names, by_shard(route.served, self._shards), epoch)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Hold the network for a forward pass."""
        with self._passes, pinned():
            yield

    def _refuse_if_dead(self, route: Route) -> None:
        if route.served:
            return
        if not self.folder.ledger.dirty():
            raise Refused("no node is trained yet; run `s3t fit` again, or `s3t heal`, to go on")
        ledger, dead = self.folder.ledger, "every shard is dead: all nodes depend on"
        if without(list(self.folder.plan_nodes(ledger.slices())), ledger.given_up()):
            raise Refused(f"{dead} deleted or lost records; `s3t heal` trains on the rest")
        raise Refused(
            f"{dead} slices that were given up; `s3t restore` brings them back from a backup, then `s3t heal` trains, "
            "or `s3t fit --grow` opens new shards"
        )

    def acknowledge(self, subjects: Sequence[str], request_id: str | None = None) -> dict[str, Any]:
        """Forget people, up to the acknowledgement: mask, durable record, receipt. ``delete`` also erases.

        Raises:
            ValueError: as ``s3t_ext.delete``; what is served is as before.
            StoreError, LedgerError: nothing was acknowledged; the mask stays until the service is opened anew; after a
                LedgerError nothing is answered before that either.
        """
        with self._lock:
            ids, struck = dict(self._ids), set(self._struck)
            try:
                self._check()
                self._mask(cells(self.folder, subjects))
                receipt = delete_from(self.folder, subjects, request_id)
                self._follow(self.folder.ledger.slices())  # all that is acknowledged, whatever the epoch word said
                self._struck = struck  # the books say it now; a digest that healing brings back may serve again
            except ValueError:
                self._ids, self._struck = ids, struck
                self._route()
                raise
            except LedgerError as error:
                self._failure = str(error)
                raise
            self._poison()
            if self._lacks():
                self._wake()
        return receipt

    def delete(self, subjects: Sequence[str], request_id: str | None = None) -> dict[str, Any]:
        """Forget people and return the receipt. See ``s3t_ext.delete``, which does this without a service."""
        receipt = self.acknowledge(subjects, request_id)
        erase_or_warn(self.folder)
        return receipt
