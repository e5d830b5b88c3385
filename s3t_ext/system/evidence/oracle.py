"""Fresh stores with another's declarations: what would have been trained on another table, or under another key."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from s3t_ext.ledger.identity import Key
from s3t_ext.models.heads import orthonormal
from s3t_ext.plan import Node
from s3t_ext.store.crypt import StoreKey
from s3t_ext.system.creation import admit, creating, write_slices
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.canaries import dated, take
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Service
from s3t_ext.system.training.train import Trainer


class FreshStores:
    """Stores in a scratch folder, sealed by a key in memory alone: what a kill leaves of them cannot be read.

    Args:
        folder: whose declarations, base and key they get, and nothing else; ``scratch``: where they lie.
    """

    def __init__(self, folder: StoreFolder, scratch: Path, progress: bool = True) -> None:
        self.folder, self.scratch, self.progress = folder, scratch, progress
        self._store_key = StoreKey.new()

    def make(self, name: str, table: Table, key: Key | None = None) -> Path:
        """Make a store of as many generations; ``key``: another, from which placement, streams and head are drawn.

        Returns:
            Where the store is: not trained yet.
        """
        at = self.scratch / f"{self.scratch.name}-{name}"  # a name that no other store has
        folder, config, head = self.folder, self.folder.config, self.folder.head()
        if key is not None and len(head):
            head = orthonormal(key.derive("head").mac(), *head.shape).numpy()
        key = key or folder.key
        declared = folder.schema, config, key, folder.base, folder.base_hash, head
        with creating(at, *declared, store_key=self._store_key, probe=folder.probe) as fresh:
            for generation in folder.ledger.generations:
                number, first = generation.number, generation.first
                mine = take(table, np.flatnonzero(dated(table).generation == number))
                layout = lay_out(mine, key, generation.shards, config.slices, generation=number, first=first)
                if number:
                    fresh.ledger.grow(*write_slices(fresh, layout))
                else:
                    admit(fresh, layout, {})
        return at

    def open(self, at: Path) -> StoreFolder:
        """Open one of the stores."""
        return StoreFolder(at, self._store_key)

    def serve(self, at: Path) -> Service:
        """Serve one of the stores."""
        return Service(at, store_key=self._store_key)

    def train(self, at: Path, nodes: Collection[Node] | None = None) -> dict[Node, str]:
        """Train nodes, with all that lead to them; by default those that serve while nothing is deleted.

        Returns:
            The hashes of the nodes' weights.
        """
        with self.open(at) as folder:
            ids = folder.identities(folder.ledger.slices())
            if nodes is None:
                nodes = list(enumerate(folder.best(ids)))
            wanted = {(shard, path[:depth]) for shard, path in nodes for depth in range(1, len(path) + 1)}
            Trainer(folder).train({node: ids[node] for node in ids if node in wanted}, self.progress)
            return {node: folder.nodes.manifest(ids[node])["weights"] for node in nodes}
