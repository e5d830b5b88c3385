"""Mutants of what a service holds, writes and gives away: rules 10, 11 and 14. See mutants.py."""

from __future__ import annotations

from typing import Any

import test_export
import test_report

from s3t_ext.ledger import Ledger
from s3t_ext.system import export, report
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Service
from s3t_ext.system.serving import live, writer
from s3t_ext.system.serving.pools import Adapters
from s3t_ext.system.training import executor


def evicted_stays(patch) -> None:
    """Rule 10: what leaves the memory's books stays in memory."""

    def drop(self, node):
        held = self.held.pop(node)
        self._free[self._column(len(node[1]) - 1)].append(held.slot)

    patch.setattr(Adapters, "drop", drop)


def dirty_for_epoch(patch) -> None:
    """Rule 14: what is served is looked at where the dirty slices are others than at the last look."""
    catch_up, seen = Service._catch_up, dict[int, frozenset]()

    def by_dirty(self):
        dirty = self.folder.ledger.dirty()
        if dirty != seen.get(id(self), frozenset()):
            seen[id(self)] = dirty
            catch_up(self)

    patch.setattr(Service, "_catch_up", by_dirty)


def keys_stay(patch) -> None:
    """Rule 10: keys and values of an answer are dropped, not overwritten."""
    patch.setattr(writer, "_overwrite", lambda *tensors: None)


def caches_stay(patch) -> None:
    """Rule 10: keys and values that a caller holds outlive those whom they tell of."""
    patch.setattr(writer.PathCache, "overwrite", lambda self: None)


def exported_first(patch) -> None:
    """Rule 10: a copy is entered in the ledger when it is there."""
    _registered_late(patch, "export", export, test_export)


def reported_first(patch) -> None:
    """Rule 10: and a page, which tells of records too."""
    _registered_late(patch, "report", report, test_report)


def _registered_late(patch, name, *modules) -> None:
    register, give, waiting = Ledger.export, getattr(modules[0], name), []

    def given(*args):
        report = give(*args)
        for ledger, *rest in waiting:
            register(Ledger.open(ledger.path), *rest)
        return report

    patch.setattr(Ledger, "export", lambda self, *rest: waiting.append((self, *rest)))
    for module in modules:
        patch.setattr(module, name, given)


class ByDirty(StoreFolder):
    """Rule 2: a node is what it was as long as no slice under it is dirty, healed ones too."""

    def identities(self, slices):
        known = self.__dict__.setdefault("known", super().identities(slices))
        return {node: name for node, name in known.items() if self.alive(*node, slices)}


def exported_by_dirty(patch) -> None:
    patch.setattr(export, "StoreFolder", ByDirty)


def ledger_in_worker(patch) -> None:
    """Rule 14: a worker on another machine asks the books itself, over a network that carries none of their locks."""
    job = executor.remote_job

    def asking(path, nodes, ids, slices, settings):
        with StoreFolder(path) as folder:
            return job(path, nodes, ids, folder.ledger.slices(), settings)

    patch.setattr(executor, "remote_job", asking)


def held_by_history(patch) -> None:
    """Rule 11: beside the paths that answer stays what is in memory already."""
    choose, restock, current = live.to_hold, live.LiveNodes._restock, list[Any]()

    def kept(nodes, answering, room, prior):
        order = [(shard, path[:d]) for shard, path in answering for d in range(1, len(path) + 1)]
        order += [node for node in current[-1]._pools.held if node in nodes] + choose(nodes, answering, room, prior)
        chosen = []
        for shard, path in order:
            whole = len(path) == 1 or (shard, path[:-1]) in chosen
            if whole and (shard, path) not in chosen and len(chosen) < sum(room):
                chosen.append((shard, path))
        return chosen

    patch.setattr(live.LiveNodes, "_restock", lambda self: (current.append(self), restock(self))[1])
    patch.setattr(live, "to_hold", kept)


def loaded_anew(patch) -> None:
    """Rule 14: an answer is released when its nodes are in memory again."""

    def releasable(self, route):
        with self._lock:
            return set(route.names) <= set(self._ids.values())

    patch.setattr(Service, "releasable", releasable)


def written_on(patch) -> None:
    """Rule 14: an answer in words is checked when it begins."""
    patch.setattr(writer.Writer, "valid", lambda self, route: True)


def healed_is_same(patch) -> None:
    """Rule 14: a slice that is clean is the slice that it was."""

    def follow(self, digests):
        self._leave({cell for cell, digest in self._digests.items() if digests.get(cell) is None})
        self._digests = dict(digests)

    patch.setattr(Service, "_follow", follow)
