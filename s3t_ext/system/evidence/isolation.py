"""Cross-slice isolation: change one slice of the table, retrain, and compare every node that must not move."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from s3t_ext.plan import Node
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.canaries import Dated, mislabelled, placed, take
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import Cell, StoreFolder
from s3t_ext.system.training.provenance import differences, provenance
from s3t_ext.system.verify import stored_weights


def isolate(stores: FreshStores, records: Table, count: int, seed: int) -> list[dict[str, Any]]:
    """Retrain a store with one slice removed or changed, and compare what did not see it with the store, bit for bit.

    Args:
        stores: made from the store; ``records``: the table less the subjects in the ledger.
        count: how many clean slices to draw, by ``seed``, of those that own a record; every other one is removed, the
            rest get wrong answers, and negated inputs where these are numbers.

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
    owners = placed(folder, records)
    clean = sorted(cell for cell in set(owners) if slices[cell] is not None)
    found = []
    rng = random.Random(f"isolation {seed}")
    for number, cell in enumerate(rng.sample(clean, min(count, len(clean)))):
        change = ("removed", "changed")[number % 2]
        apart = [node for node in comparable if not _saw(node, cell)]
        witness = sorted((node for node in comparable if _saw(node, cell)), key=lambda node: len(node[1]))[:1]
        rows = np.array([owner == cell for owner in owners])  # (n,)
        table = _without(records, rows) if change == "removed" else _changed(folder, records, rows, rng)
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


def _without(records: Table, rows: np.ndarray) -> Dated:
    return take(records, np.flatnonzero(~rows))


def _changed(folder: StoreFolder, records: Table, rows: np.ndarray, rng: random.Random) -> Dated:
    wrong = mislabelled(records, folder.schema, rng)
    inputs = wrong.inputs if folder.schema.is_text else -wrong.inputs

    def where(changed: np.ndarray, own: np.ndarray) -> np.ndarray:
        return np.where(rows.reshape(-1, *[1] * (own.ndim - 1)), changed, own)

    return Dated(records.subjects, where(inputs, records.inputs), where(wrong.labels, records.labels), wrong.generation)
