"""Train the nodes of a plan: jobs of one depth, cut in passes of nodes in lock-step, passes side by side in lanes."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import torch

from s3t_ext.ledger.identity import node_identity
from s3t_ext.lora.pinned import pinned
from s3t_ext.plan import Node
from s3t_ext.system.folder import Cell, Slices, StoreFolder
from s3t_ext.system.network import load_network, shell, weights
from s3t_ext.system.settings import Settings as Settings
from s3t_ext.system.training.budget import Budget, find_budget, free_bytes, peak_bytes
from s3t_ext.system.training.lockstep import Held, LockStep, Tensors, node_order
from s3t_ext.system.training.memory import Records
from s3t_ext.system.training.progress import Progress
from s3t_ext.system.training.provenance import differences, provenance
from s3t_ext.system.training.trunk import Trunk

READING = 4  # times its file, what a slice takes in memory while it is read (seen: 4.0)
ONCE = 1.2  # uses of a record's state: with fewer it is not worth its place
LARGE = 2**19  # weights of a network from which on its kernels, not Python, take up a thread


class Stopped(RuntimeError):
    """Another lane failed, or the user stopped the run."""


class Trainer:
    """Train nodes of one store. Each node's bits are a function of its own path and records alone.

    Args:
        folder: open, and locked against other writers by the caller.

    Attributes:
        notes: what was found and used: nodes per pass, lanes, trunks, seconds.
    """

    def __init__(self, folder: StoreFolder, settings: Settings | None = None) -> None:
        self.folder, self.config, self.settings = folder, folder.config, settings or Settings()
        device = self.settings.device
        self.network = load_network(folder, 1, train=True).to(device)
        self.provenance = provenance(self.config.precision, device)
        threads = torch.get_num_threads()
        large = device == "cpu" and weights(self.network) >= LARGE
        count = self.settings.lanes or (threads if large else 1)
        self._team = max(1, threads // count)  # threads of the kernels in each lane
        networks = [self.network, *(shell(self.network) for _ in range(count - 1))]
        self.lanes = [LockStep(folder, network, self.settings.rows) for network in networks]
        self.notes: dict[str, Any] = {"lanes": count, "stages": []}
        self._stop = threading.Event()
        self._budget: Budget | None = None

    def train(self, wanted: Mapping[Node, str], progress: bool = True) -> int:
        """Train those of the wanted nodes (with their ids) that the store lacks; parents must be among them.

        A node that a deletion makes stale while it trains is not published.

        Returns:
            How many nodes were trained and published.
        """
        missing = [node for node, name in wanted.items() if not self.folder.nodes.has(name)]
        if not missing:
            return 0
        self.budget({len(path) for _, path in missing})
        depths = Counter(len(path) for _, path in missing)
        bar = Progress(sum(self.config.steps_at(depth) * n for depth, n in depths.items()), progress, nodes=depths)
        return sum(len(self.job(nodes, wanted, bar)) for nodes in self._jobs(missing))

    @property
    def width(self) -> int:
        """How many passes run side by side."""
        return len(self.lanes)

    def budget(self, depths: Iterable[int]) -> Budget:
        """Find, once, how many nodes train together; fewer lanes are used where memory is short.

        Raises:
            ValueError: memory does not hold one node beside the largest slice while it is read.
        """
        if self._budget is None:
            s = self.settings
            memory = s.memory or free_bytes(s.device) * 3 // 4
            self._budget = find_budget(
                self.lanes[0],
                self.folder.schema,
                sorted(depths),
                memory,
                len(self.lanes),
                s.rows,
                s.nodes_per_pass,
                READING * self.folder.records.largest(),
            )
            self.lanes = self.lanes[: self._budget.lanes]
            for lane in self.lanes:
                lane.rows = self._budget.rows
            self.notes |= {"memory": self._budget._asdict(), "lanes": len(self.lanes)}
        return self._budget

    def _jobs(self, nodes: Sequence[Node]) -> Iterator[list[Node]]:
        """Cut nodes in jobs whose records take half of the memory that is left, together, or are of one shard."""
        shards = sorted({shard for shard, _ in nodes})
        sizes = {s: self._size((s, k) for k in range(self.config.slices)) for s in shards}
        room = self.budget(()).left // 2
        parts: list[list[int]] = [[]]
        for shard in shards:
            if parts[-1] and sum(sizes[s] for s in (*parts[-1], shard)) > room:
                parts.append([])
            parts[-1].append(shard)
        for part in parts:
            yield from jobs([node for node in nodes if node[0] in part])

    def _size(self, cells: Iterable[Cell]) -> int:
        return sum(self.folder.records.size(*cell) for cell in cells)

    def job(self, nodes: Sequence[Node], ids: Mapping[Node, str], bar: Progress) -> list[str]:
        """Train nodes of one depth, whose ancestors are in the store; return the ids of those that were published."""
        published: list[str] = []
        for trained in self.passes(nodes, ids, self.folder.ledger.slices, bar):
            published += self._publish(trained, ids)
            bar.finish(len(nodes[0][1]), len(trained))
        return published

    def passes(
        self, nodes: Sequence[Node], ids: Mapping[Node, str], slices: Callable[[], Slices], bar: Progress
    ) -> Iterator[dict[Node, Tensors]]:
        """Train nodes of one depth, whose ancestors are in the store; give the weights of each pass as it ends.

        They are overwritten when the next ones are asked for.

        Args:
            slices: tells the slices' digests as of now; what depends on a dirty slice is not trained, and not held.
        """
        now = slices()
        alive = [node for node in nodes if self.folder.alive(*node, now)]
        if not alive:
            return
        self.budget({len(path) for _, path in alive})
        with pinned(self._team * len(self.lanes)):
            start = time.perf_counter()
            held = self._hold(alive, now)
            ready = time.perf_counter()
            try:
                for trained in self._run(alive, ids, held, slices, bar):
                    try:
                        yield trained
                    finally:
                        _overwrite(trained)
                    self._flush(held, slices())
            finally:
                if held.trunk:
                    held.trunk.overwrite()
                held.records.close()
        self.notes["stages"].append(
            {
                "depth": len(alive[0][1]),
                "nodes": len(alive),
                "steps": self.config.steps_at(len(alive[0][1])),
                "prepared_s": round(ready - start, 3),
                "trained_s": round(time.perf_counter() - ready, 3),
                "records": held.records.notes(),
                "trunk": held.trunk.notes() if held.trunk else None,
            }
        )
        self.notes["peak_bytes"] = peak_bytes()

    # --- what a job holds --------------------------------------------------------------------------------------------

    def _hold(self, nodes: Sequence[Node], slices: Slices) -> Held:
        """Read the nodes' records, draw their orders, and fill the trunk's cache.

        Records that would take more than half of the memory that is left lie in a file.
        """
        read = partial(self.folder.slice_records, slices=slices)
        cells = {(shard, k) for shard, path in nodes for k in path}
        form = "memory" if self._size(cells) <= self.budget(()).left // 2 else "file"
        records = Records(read, cells, self.folder.schema, form, self.settings.scratch)
        records.measure(self.network)
        orders = {node: node_order(self.folder.key, self.config, node, records) for node in nodes}
        return Held(records, self._trunk(len(nodes[0][1]), records, orders.values()), orders)

    def _trunk(self, depth: int, records: Records, orders: Iterable[np.ndarray]) -> Trunk | None:
        block = self.network.trunk(depth)
        drawn = np.concatenate(list(orders))
        used = np.unique(drawn[drawn >= 0])
        if block == 0 or not len(used) or self.settings.trunk == "off":
            return None
        trunk = Trunk(records, self.network, block, used)
        form = self._form(trunk.bytes, records.bytes, len(drawn) / len(used))
        if not form:
            return None
        trunk.keep(form, self.settings.scratch)
        work = trunk.work()
        parts = [work[i :: len(self.lanes)] for i in range(len(self.lanes))]

        def fill(lane: LockStep, mine: list[tuple[int, int, int]]) -> None:
            with pinned(self._team):
                for part, first, last in mine:
                    trunk.fill(lane.network, part, first, last)

        with ThreadPoolExecutor(len(self.lanes)) as pool:
            list(pool.map(fill, self.lanes, parts))
        return trunk

    def _form(self, size: int, records: int, uses: float) -> str:
        """Choose where states of the trunk are kept, or nowhere: where each is used but once, or there is no room."""
        if self.settings.trunk != "auto":
            return self.settings.trunk
        if uses < ONCE:
            return ""
        if size <= self.budget(()).left - records:
            return "memory"
        return "file" if size <= shutil.disk_usage(self.settings.scratch or tempfile.gettempdir()).free // 2 else ""

    def _flush(self, held: Held, slices: Slices) -> None:
        """Overwrite what is held of slices that a deletion made dirty; nodes that still train on them are stale."""
        dirty = [cell for cell in held.records.keys if slices[cell] is None]
        held.records.overwrite(dirty)
        if held.trunk:
            held.trunk.overwrite(dirty)

    # --- passes in lanes ---------------------------------------------------------------------------------------------

    def _run(
        self,
        nodes: Sequence[Node],
        ids: Mapping[Node, str],
        held: Held,
        slices: Callable[[], Slices],
        bar: Progress,
    ) -> Iterator[dict[Node, Tensors]]:
        """Train passes side by side, of nodes that are alive when they begin; give the weights of each as it ends."""
        self._stop.clear()
        waiting = self._passes(nodes)

        def alive(some: list[Node]) -> list[Node]:
            now = slices()
            return [node for node in some if self.folder.alive(*node, now)]

        if len(self.lanes) == 1:
            for some in waiting:
                yield self._stage(self.lanes[0], alive(some), ids, held, bar)
            return
        idle, running = list(self.lanes), dict[Future, LockStep]()
        with ThreadPoolExecutor(len(self.lanes)) as pool:
            try:
                while waiting or running:
                    while waiting and idle:
                        lane = idle.pop()
                        running[pool.submit(self._stage, lane, alive(waiting.pop(0)), ids, held, bar)] = lane
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        idle.append(running.pop(done))
                        yield done.result()
            except BaseException:
                self._stop.set()
                raise

    def _passes(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """Cut nodes in passes of nearly equal size, as many as lanes or a multiple of that."""
        most = self.budget(()).nodes
        lanes = len(self.lanes)
        count = -(-len(nodes) // most)
        count = min(-(-count // lanes) * lanes, len(nodes))
        edges = [round(i * len(nodes) / count) for i in range(count + 1)]
        return [list(nodes[a:b]) for a, b in itertools.pairwise(edges)]

    def _stage(
        self, lane: LockStep, nodes: Sequence[Node], ids: Mapping[Node, str], held: Held, bar: Progress
    ) -> dict[Node, Tensors]:
        """Train one pass in a lane's thread."""
        if not nodes:
            return {}

        def tell(depth: int, count: int, loss: float) -> None:
            if self._stop.is_set():
                raise Stopped("training was stopped")
            bar.advance(count, f"depth {depth}  loss {loss:6.3f}", depth, loss)

        with pinned(self._team):
            return lane.stage(nodes, ids, held, tell)

    def _publish(self, weights: Mapping[Node, Tensors], ids: Mapping[Node, str]) -> list[str]:
        return publish(self.folder, weights, ids, self.provenance)


def publish(
    folder: StoreFolder, weights: Mapping[Node, Tensors], ids: Mapping[Node, str], here: Mapping[str, Any]
) -> list[str]:
    """Store the nodes that are alive; return their ids.

    Args:
        ids: of the nodes and their parents; ``here``: the provenance of the process that trained them.

    Raises:
        ValueError: the weights of one are not finite.
    """
    slices = folder.ledger.slices()  # as of now: a request during training makes a node stale
    published = []
    for (shard, path), tensors in weights.items():
        if folder.alive(shard, path, slices):
            parent = ids.get((shard, path[:-1]), "")
            identity = folder.identity(shard, path, slices, parent)
            if node_identity(identity) != ids[shard, path]:
                continue  # a slice was deleted from and healed meanwhile
            if not all(np.isfinite(array).all() for array in tensors.values()):
                raise ValueError(
                    f"lr: training diverged in shard {shard}, slices {list(path)}; expected a smaller one than "
                    f"{folder.config.lr}, in a new store: what was declared of {folder.path} stays"
                )
            mixed = differences(folder.nodes.manifest(parent)["provenance"], here) if parent else []
            published.append(folder.nodes.put(identity, tensors, {**here, **({"mixed": mixed} if mixed else {})}))
    return published


def _overwrite(weights: Mapping[Node, Tensors]) -> None:
    """Leave no copy of a pass in memory: one of its nodes may be dead by now, or die later."""
    for array in (array for tensors in weights.values() for array in tensors.values()):
        array.fill(np.nan)


def jobs(nodes: Iterable[Node], parts: int = 1) -> Iterator[list[Node]]:
    """Cut nodes in jobs: those of one depth after those of the one above; ``parts`` jobs of a depth, by shard, are
    independent of one another."""
    order = sorted(nodes, key=lambda node: (len(node[1]), node[1], node[0]))
    for _, group in itertools.groupby(order, key=lambda node: len(node[1])):
        level = list(group)
        shards = sorted({shard for shard, _ in level})
        for part in range(parts):
            mine = set(shards[part::parts])
            if mine:
                yield [node for node in level if node[0] in mine]
