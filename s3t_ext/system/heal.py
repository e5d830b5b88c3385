"""Heal a store: dirty slices less their deleted records are clean slices, and missing nodes are trained, best first.

Loads no torch until it trains. It goes on where a killed one stopped: what is clean and what is trained stands in the
ledger and the store, and nothing else is kept.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.ledger.log import Cell
from s3t_ext.plan import Node, NodePath
from s3t_ext.plan.healing import healing_order
from s3t_ext.store.records import Lost
from s3t_ext.system.folder import StoreFolder, announce, digest_of
from s3t_ext.system.lost import Losses, abandoned, listed, losses, named
from s3t_ext.system.settings import Settings
from s3t_ext.system.training.progress import Progress
from s3t_ext.system.unlearn import deleted_in, erase, writing

if TYPE_CHECKING:
    from s3t_ext.system.training.executor import RayTrainer
    from s3t_ext.system.training.train import Trainer

MANY = 16  # nodes in a lane, where memory decides how many: requests and limits are looked at after each call


def heal(
    path: Path | str,
    *,
    budget: int | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    settings: Settings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Make dirty slices clean and train the nodes that a store lacks, most valuable first, while it serves.

    Requests go on meanwhile: what they make stale is not published, and what they make dirty is healed too. It may be
    killed at any moment; the same call goes on, to the same bits.

    Args:
        path: of the store.
        budget: slice-passes to train, a node of depth i costs i; 0: slices are made clean alone; None: no limit.
        minutes: begin no pass after so many; None: no limit.
        dry_run: change nothing; tell what it would bring.
        settings: how training uses machines; it changes no bit.

    Returns:
        healed (slices), dropped (subjects deleted from them), nodes (trained now), slice_passes (spent), depths_before,
        depths_after, left (nodes and slice_passes still to train), lost_slices (neither healed nor trained on: why, by
        "shard-slice"), not_trained_on (given-up slices, which are none of these); for ``dry_run`` what `outlook` gives.

    Raises:
        ValueError: a limit below 0.
        StoreError, LedgerError: as ``fit``; what is pending cannot be erased, or another process writes to the store.
    """
    for name, value in (("budget", budget), ("minutes", minutes)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected at least 0, got {value!r}")
    with StoreFolder(path) as folder:
        if dry_run:
            return {"store": str(path), "dry_run": True, **outlook(folder, budget)}
        end = None if minutes is None else time.monotonic() + 60 * minutes
        with writing(folder) as told:
            before = depths(folder)
            run = _Run(folder, budget, end, settings or Settings(), progress)
            with run:
                run.go()
            lost = {**losses(folder), **run.lost}
            told.update(lost)
        left = missing(folder)
        return {
            "store": str(path),
            "healed": sorted(map(list, run.healed)),
            "dropped": len(run.dropped),
            "nodes": run.published,
            "slice_passes": run.spent,
            "depths_before": before,
            "depths_after": depths(folder),
            "left": {"nodes": len(left), "slice_passes": cost(left)},
            "lost_slices": named(lost),
            "not_trained_on": listed(abandoned(folder)),
        }


def cleanse(folder: StoreFolder, lost: Losses | None = None) -> tuple[set[Cell], set[str]]:
    """Make every dirty slice clean, under the writer's lock: what is left of it is its content from now on.

    Args:
        lost: takes the slices that stay dirty, since their records cannot be read.

    Returns:
        The slices, and the subjects (hashes) that were dropped from them.
    """
    healed, dropped = set[Cell](), set[str]()
    lost = {} if lost is None else lost
    while dirty := folder.ledger.dirty() - lost.keys() - abandoned(folder):
        pending = [request.seq for request in folder.ledger.unerased()]  # erased now, but for what is in a lost slice
        lost |= erase(folder)
        found = {}
        for cell in sorted(dirty - lost.keys()):
            try:
                if back := deleted_in(folder, cell):  # in an older copy of the file that somebody put back
                    folder.records.erase_subjects(*cell, back.values())
                found[cell] = digest_of(folder.records.get(*cell))
            except Lost as error:
                lost[cell] = error
        gone = folder.ledger.heal(found, pending) if found else None
        if gone is not None:  # else a request came in
            healed |= found.keys()
            dropped |= gone
    return healed, dropped


class _Run:
    """One healing under the writer's lock."""

    def __init__(
        self, folder: StoreFolder, budget: int | None, end: float | None, settings: Settings, progress: bool
    ) -> None:
        self.folder, self.budget, self.end, self.settings = folder, budget, end, settings
        self.healed, self.dropped, self.lost = set[Cell](), set[str](), Losses()
        self.published = self.spent = 0
        self.progress = progress
        self._bar: Progress | None = None
        self._trainer: Trainer | RayTrainer | None = None
        self._held = ExitStack()  # of what the trainer holds

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def go(self) -> None:
        """Heal until nothing is missing, or a limit is reached."""
        announce(self.folder)  # what a killed run published
        queue: list[Node] = []
        seen: Mapping[Cell, str | None] = {}
        while True:
            healed, dropped = cleanse(self.folder, self.lost)
            self.healed |= healed
            self.dropped |= dropped
            slices = self.folder.ledger.slices()
            if slices != seen:
                queue, seen = missing(self.folder), slices
            left = None if self.budget is None else self.budget - self.spent
            queue = without(queue, self.lost)
            paid = affordable(queue, left)
            if not paid or (self.end is not None and time.monotonic() >= self.end):
                return
            nodes = next_pass(paid, self._size(paid))
            done = self._train(nodes)
            queue = [node for node in queue if node not in done]

    def _size(self, queue: Sequence[Node]) -> int:
        """Give how many nodes one call of the trainer takes, which is made for the first one."""
        if self._trainer is None:
            from s3t_ext.system.training.executor import trainer_for

            self._trainer = self._held.enter_context(trainer_for(self.folder, self.settings))
            self._bar = Progress(cost(queue), self.progress)
        return (self.settings.nodes_per_pass or MANY) * self._trainer.width

    def _train(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """Train nodes; return those that are out of the queue by that."""
        assert self._trainer
        assert self._bar
        ids = self.folder.identities(self.folder.ledger.slices())
        wanted = {(shard, path[:depth]) for shard, path in nodes for depth in range(1, len(path) + 1)}
        if not wanted <= ids.keys():
            return nodes  # a request came in just now
        try:
            self.published += self._trainer.train({node: ids[node] for node in ids if node in wanted}, False)
        except Lost as error:  # a slice that no request had anybody read; the others are tried again
            self.lost[error.cell] = error
            nodes = [node for node in nodes if self.folder.nodes.has(ids[node])]
            self.published += len(nodes)
        self.spent += cost(nodes)
        announce(self.folder)
        for shard, path in nodes[:1]:
            self._bar.advance(cost(nodes), f"shard {shard} node {'-'.join(map(str, path))}")
        return nodes


def next_pass(queue: Sequence[Node], size: int) -> list[Node]:
    """Take the first nodes of one depth whose parents are trained by then: those of the first node's depth."""
    waiting = set(queue)
    ready = [(shard, path) for shard, path in queue if (shard, path[:-1]) not in waiting]
    return [node for node in ready if len(node[1]) == len(queue[0][1])][:size]


def without(queue: Sequence[Node], lost: Collection[Cell]) -> list[Node]:
    """Leave out the nodes that train on lost slices."""
    return [(shard, path) for shard, path in queue if not any((shard, k) in lost for k in path)]


def affordable(queue: Sequence[Node], budget: int | None) -> list[Node]:
    """Take the nodes, in order, that a budget of slice-passes pays for."""
    chosen, spent = [], 0
    for node in queue:
        spent += len(node[1])
        if budget is not None and spent > budget:
            break
        chosen.append(node)
    return chosen


def cost(nodes: Iterable[Node]) -> int:
    """Add up slice-passes: a node at depth i trains on i slices."""
    return sum(len(path) for _, path in nodes)


def trained_paths(folder: StoreFolder) -> list[set[NodePath]]:
    """Give the live nodes that each shard has."""
    live = folder.trained(folder.ledger.slices())
    found: list[set[NodePath]] = [set() for _ in range(folder.shards)]
    for shard, path in live:
        found[shard].add(path)
    return found


def missing(folder: StoreFolder) -> list[Node]:
    """List the nodes of the plan that shards lack, those on dirty slices too, in the order of healing.

    Of given-up slices none is trained again.
    """
    return without(healing_order(folder.tree, trained_paths(folder)), abandoned(folder))


def depths(folder: StoreFolder) -> list[int]:
    """Give the depth that each shard serves at."""
    return [len(path) for path in folder.best(folder.trained(folder.ledger.slices()))]


def outlook(folder: StoreFolder, budget: int | None = None) -> dict[str, Any]:
    """Tell what healing would bring: it changes nothing.

    Returns:
        slices (dirty ones), nodes and slice_passes (to train, within the budget), depths_before, depths_after, left
        (nodes and slice_passes beyond the budget), lost_slices (as of `heal`, as far as that is known), not_trained_on.
    """
    trained, lost = trained_paths(folder), losses(folder)
    everything = missing(folder)
    queue = without(everything, lost)
    chosen = affordable(queue, budget)
    after = {(shard, path) for shard, paths in enumerate(trained) for path in paths}.union(chosen)
    rest = set(everything) - set(chosen)
    return {
        "slices": len(folder.ledger.dirty() - lost.keys() - abandoned(folder)),
        "nodes": len(chosen),
        "slice_passes": cost(chosen),
        "depths_before": depths(folder),
        "depths_after": [len(path) for path in folder.best(after)],
        "left": {"nodes": len(rest), "slice_passes": cost(rest)},
        "lost_slices": named(lost),
        "not_trained_on": listed(abandoned(folder)),
    }
