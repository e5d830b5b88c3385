"""What a service knows and holds: the live nodes, those of them in memory, and the paths that answer."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from s3t_ext.ledger import LedgerError
from s3t_ext.plan import Node, StageTree
from s3t_ext.plan.prior import check_prior
from s3t_ext.store.files import StoreError
from s3t_ext.system.folder import Cell, StoreFolder
from s3t_ext.system.network import Network
from s3t_ext.system.serving.paths import Served, by_shard, maximal, rooms, to_hold, weighted
from s3t_ext.system.serving.pools import Adapters, Held, slot_bytes


@dataclass(frozen=True)
class Route:
    """What an answer is computed with: paths, their rows of the routing table (G, columns), the nodes as loaded."""

    served: tuple[Served, ...]
    table: Tensor
    nodes: Mapping[Node, Held]

    @property
    def names(self) -> tuple[str, ...]:
        """The ids of the nodes."""
        return tuple(held.name for held in self.nodes.values())

    @property
    def depth(self) -> int:
        """Of the deepest path."""
        return max((len(path) for _, path, _ in self.served), default=0)


class Derived(Protocol):
    """What was computed by a route, is held by a caller, and may be gone on from."""

    route: Route

    def overwrite(self) -> None:
        """Overwrite all of it, while a pass may read it."""


class LiveNodes:
    """The live nodes of a store and the paths among them that answer, kept up to date while answers are computed.

    A deletion masks slices: what saw them leaves the route at once, and the best of what is left in memory answers.
    What then is missing from memory, or was trained meanwhile, `settle` loads. At rest the nodes that are held and
    those that answer are functions of the live nodes, the memory and the prior.

    Args:
        folder: the store; ``network``: whose pools hold the nodes.
        ensemble, tree, memory, prior: see ``Service``.
    """

    def __init__(
        self,
        folder: StoreFolder,
        network: Network,
        ensemble: str,
        tree: StageTree | None = None,
        memory: int | None = None,
        prior: Sequence[float] | None = None,
    ) -> None:
        self.folder, self.network, self.ensemble, self.memory = folder, network, ensemble, memory
        self.prior = None if prior is None else check_prior(folder.config.slices, prior)
        self._tree = tree or folder.tree
        self._allowed = None if tree is None else frozenset(tree.nodes)
        self._lock = threading.RLock()  # guards all state below
        self._passes = threading.Lock()  # held by every forward pass: pools grow between two of them
        self._settling = threading.Lock()  # one thread loads; taken before the others
        self._worker: threading.Thread | None = None
        self._moved = self._closed = False
        self._ids: dict[Node, str] = {}  # of all live nodes in the store
        self._digests: dict[Cell, str | None] = {}  # of the slices, under which they are live
        self._derived: WeakSet[Derived] = WeakSet()
        self._struck: set[tuple[Cell, str | None]] = set()  # digests that serve no more, whatever the books say
        self._shards = self.folder.shards
        self._pools = Adapters(network, self._room(()))
        self._route()
        self.settle()

    def close(self) -> None:
        """Wait for the thread that loads, and close the store."""
        self._closed = True
        if (worker := self._worker) is not None:
            worker.join()
        self.folder.close()

    @property
    def depths(self) -> tuple[int, ...]:
        """The depth that each shard serves at."""
        with self._lock:
            return by_shard(self._routed.served, self._shards)

    # --- deletions ---------------------------------------------------------------------------------------------------

    def watch(self, derived: Derived) -> None:
        """Overwrite what was derived of a route's nodes when one of them dies; nothing is kept alive by this."""
        with self._lock:
            self._derived.add(derived)

    def _live(self) -> dict[Node, str]:
        """List the live nodes in the store that this service may use."""
        trained = self.folder.trained(self.folder.ledger.slices())
        return {node: n for node, n in trained.items() if self._allowed is None or node[1] in self._allowed}

    def _mask(self, dirty: Set[Cell]) -> None:
        """Route around the nodes that saw these slices as they are now, whether or not the books come to say so."""
        self._struck |= {(cell, self._digests.get(cell)) for cell in dirty}
        self._leave(dirty)

    def _follow(self, digests: Mapping[Cell, str | None]) -> None:
        """Route around the nodes of slices that the books know otherwise: dirty, or healed since, which is another."""
        self._leave({cell for cell, digest in self._digests.items() if digests.get(cell) != digest})
        self._digests = dict(digests)

    def _leave(self, cells: Set[Cell]) -> None:
        for node in [node for node in self._ids if any((node[0], k) in cells for k in node[1])]:
            del self._ids[node]
        self._route()

    def _poison(self) -> None:
        """Overwrite dropped adapters, and what callers hold of them, with NaN: erased, and a test that none is read."""
        for node, held in list(self._pools.held.items()):
            if self._ids.get(node) != held.name:
                self._pools.drop(node)
        for derived in list(self._derived):
            if not self.releasable(derived.route):
                derived.overwrite()

    # --- what answers ------------------------------------------------------------------------------------------------

    def _answering(self, nodes: Collection[Node]) -> list[Node]:
        """Choose the paths that answer where these nodes are at hand."""
        if self.ensemble == "maximal":
            return maximal(nodes)
        return [(shard, path) for shard, path in enumerate(self.folder.best(nodes)) if path]

    def _route(self) -> None:
        """Route to the best of what is in memory; who computes by the old route keeps it as it was."""
        pools = self._pools
        here = {node: held for node, held in pools.held.items() if self._ids.get(node) == held.name}
        served = weighted(self._answering(here))
        slices, width = self.folder.config.slices, self.network.routing.stages  # one column more names heads
        rows = []
        for shard, path, _ in served:
            chain = [here[shard, path[:d]] for d in range(1, len(path) + 1)]
            slots = [held.slot for held in chain] + [-1] * (slices - len(chain))
            rows.append(slots + [chain[-1].head] * (width - slices))
        table = torch.tensor(rows, dtype=torch.int32).view(len(rows), width)  # (G, L or L + 1)
        used = dict.fromkeys((s, path[:d]) for s, path, _ in served for d in range(1, len(path) + 1))
        self._routed = Route(served, table, {node: here[node] for node in used})
        self.network.routing.table = table

    def releasable(self, route: Route) -> bool:
        """Tell whether all nodes of a route are live, and have been in memory since it was taken."""
        with self._lock:
            held = self._pools.held
            return all(self._ids.get(node) == h.name and held.get(node) is h for node, h in route.nodes.items())

    # --- memory ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring to rest what is held in memory and what answers, as the books are now.

        Raises:
            LedgerError, StoreError: the books or a live node cannot be read.
        """
        with self._settling:
            while not self._closed and not self._restock():
                pass

    def _wake(self) -> None:
        """Have a thread settle."""
        with self._lock:
            self._moved = True
            if self._worker is None and not self._closed:
                self._worker = threading.Thread(target=self._work, name="s3t-load", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._moved or self._closed:
                    self._worker = None
                    return
                self._moved = False
            try:
                self.settle()
            except (LedgerError, StoreError) as error:
                warnings.warn(f"what should serve was not loaded, and the rest serves on: {error}", stacklevel=1)

    def _lacks(self) -> bool:
        """Tell whether a live node of the plan is not in memory: in the store it may be, by now."""
        nodes = self.folder.plan_nodes(self._digests)
        planned = (node for node in nodes if self._allowed is None or node[1] in self._allowed)
        return len(self._pools.held) < sum(self.folder.alive(*node, self._digests) for node in planned)

    def _restock(self) -> bool:
        """Look at the books once and load accordingly; False: they moved meanwhile."""
        epoch = self.folder.ledger.fence.read()
        digests, ids = self.folder.ledger.slices(), self._live()
        with self._lock:
            if self.folder.ledger.fence.read() != epoch:
                return False
            self._follow(digests)
            struck = {cell for cell, digest in self._struck if digests.get(cell) == digest}
            self._ids = {n: name for n, name in ids.items() if not any((n[0], k) in struck for k in n[1])}
            self._poison()
            if self.folder.shards != self._shards:
                self._grow()
            wanted = to_hold(self._ids, self._answering(self._ids), self._pools.room, self.prior)
            self._drop(set(self._pools.held) - set(wanted) - set(self._routed.nodes))
        for shard, path in self._answering(wanted):
            if not self._load([(shard, path[:d]) for d in range(1, len(path) + 1)], wanted):
                return False
            with self._lock:
                self._route()  # each shard's path at once, when it is whole
        with self._lock:
            self._drop(set(self._pools.held) - set(wanted))
        if not self._load(wanted, wanted):
            return False
        with self._lock:
            self._route()
        return True

    def _load(self, nodes: Sequence[Node], wanted: Sequence[Node]) -> bool:
        """Load those of the nodes that are not in memory; False: a deletion came between."""
        for node in nodes:
            with self._lock:
                name = self._ids.get(node)
                if name is None:
                    return False
                if node in self._pools.held:
                    continue
            try:
                tensors = self.folder.nodes.get(name)[1]
            except StoreError:
                if self.folder.nodes.has(name):
                    raise  # damaged; otherwise a deletion erased it under our eyes
                return False
            with self._lock:
                if self._ids.get(node) != name:
                    return False
                if not self._pools.has_room(node):
                    self._make_room(node, wanted)
                self._pools.load(node, name, tensors)
        return True

    def _make_room(self, node: Node, wanted: Sequence[Node]) -> None:
        """Drop what is least wanted among the nodes in the pools of this one; what answers only if nothing else is."""
        order = {found: i for i, found in enumerate(wanted)}
        inside = [found for found in self._pools.held if self._pools.together(found, node)]
        least = max(inside, key=lambda n: (n not in self._routed.nodes, order.get(n, len(order)), len(n[1])))
        if least in self._routed.nodes:
            least = max(inside, key=lambda n: (order.get(n, len(order)), len(n[1])))
        self._drop({least})

    def _drop(self, nodes: Set[Node]) -> None:
        for node in nodes:
            self._pools.drop(node)
        if not nodes.isdisjoint(self._routed.nodes):
            self._route()

    def _room(self, given: Sequence[int]) -> list[int]:
        """Share out the memory: slots for each column of pools, at least those that are given already."""
        config, by_depth = self.folder.config, self._tree.stages_by_depth
        wished = [self._shards * by_depth[depth] for depth in range(1, config.slices + 1)]
        needed = [min(n, self._shards + 1) for n in wished] if self.ensemble == "best" else wished
        if config.placement == "stack":
            wished, needed = [sum(wished)], [sum(needed)]
        needed = list(map(max, needed, given)) if given else needed
        return rooms(self.memory, slot_bytes(self.network, config.slices, config.placement), wished, needed)

    def _grow(self) -> None:
        """Make room for shards of a new generation, as far as the memory goes."""
        self._shards = self.folder.shards
        with self._passes:
            try:
                self._pools.grow(self._room(self._pools.room))
            except ValueError as error:
                warnings.warn(f"not all shards are served: {error}", stacklevel=1)
