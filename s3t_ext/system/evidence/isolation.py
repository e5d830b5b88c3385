"""Cross-slice isolation: change one slice of the table, retrain, and compare every node that must not move."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from s3t_ext.ledger.partition import place
from s3t_ext.plan import Node
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.canaries import take
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import Cell, StoreFolder
from s3t_ext.system.training.provenance import differences, provenance
from s3t_ext.system.verify import stored_weights


def isolate(stores: FreshStores, records: Table, count: int, seed: int) -> list[dict[str, Any]]:
    """Retrain a store with one slice removed or changed, and compare what did not see it with the store, bit for bit.

    Args:
        stores: made from the store; ``records``: the table less the subjects in the ledger.
        count: how many clean slices to draw, by ``seed``, of those that own a record; every other one is removed, the
            rest get negated inputs and the next label.

    Returns:
        For each slice: shard, slice, change, nodes (compared), differing (shard and path of nodes that moved),
        moved (a node that saw the slice did move: the live control), incomparable (count: provenance differs).
    """
    folder = stores.folder
    slices = folder.ledger.slices()
    live, here = folder.trained(slices), provenance(folder.config.precision)
    comparable = [
        node for node, name in live.items() if not differences(folder.nodes.manifest(name)["provenance"], here)
    ]
    stored = {node: stored_weights(folder, live[node]) for node in comparable}
    owners = _owners(folder, records)
    clean = sorted(cell for cell in set(owners) if slices[cell] is not None)
    found = []
    for number, cell in enumerate(random.Random(f"isolation {seed}").sample(clean, min(count, len(clean)))):
        change = ("removed", "changed")[number % 2]
        apart = [node for node in comparable if not _saw(node, cell)]
        witness = sorted((node for node in comparable if _saw(node, cell)), key=lambda node: len(node[1]))[:1]
        rows = np.array([owner == cell for owner in owners])  # (n,)
        table = _without(records, rows) if change == "removed" else _changed(folder, records, rows)
        weights = stores.train(stores.make(f"isolation-{cell[0]}-{cell[1]}", table), apart + witness)
        found.append(
            {
                "shard": cell[0],
                "slice": cell[1],
                "change": change,
                "nodes": len(apart),
                "differing": [
                    [shard, list(path)] for shard, path in apart if weights[shard, path] != stored[shard, path]
                ],
                "moved": all(weights[node] != stored[node] for node in witness) and bool(witness),
                "incomparable": len(live) - len(comparable),
            }
        )
    return found


def _saw(node: Node, cell: Cell) -> bool:
    return node[0] == cell[0] and cell[1] in node[1]


def _owners(folder: StoreFolder, records: Table) -> list[Cell]:
    """Give the slice of each record."""
    return [place(folder.key, names[0], folder.config.shards, folder.config.slices) for names in records.subjects]


def _without(records: Table, rows: np.ndarray) -> Table:
    return take(records, np.flatnonzero(~rows))


def _changed(folder: StoreFolder, records: Table, rows: np.ndarray) -> Table:
    inputs = records.inputs
    if not folder.schema.is_text:
        inputs = np.where(rows.reshape(-1, *[1] * (inputs.ndim - 1)), -inputs, inputs)
    labels = np.where(rows, (records.labels + 1) % len(folder.schema.classes), records.labels)
    return Table(records.subjects, inputs, labels)
