"""What state a store is in, and whether that is what its operator promised. Loads no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from s3t_ext.ledger.log import STATES
from s3t_ext.store.files import StoreError
from s3t_ext.system.folder import Floor, StoreFolder
from s3t_ext.system.heal import outlook
from s3t_ext.system.lost import given_up


def status(path: Path | str, floor: Floor | None = None) -> dict[str, Any]:
    """Tell a store's state, and what healing would bring.

    Args:
        floor: the least depth to hold it against; None: the declared one.

    Returns:
        depths and mean_depth of the shards, dead_shards, generations (number, shards, and their depths), dirty slices,
        nodes (planned, live, trained, missing), requests (and by state, with those past their deadline, and the next
        deadline of one that is not erased), floor, below (what is below it, a line each), healing (see `outlook`),
        lost_slices (see there), given_up (as `s3t_ext.system.lost.given_up`), locked (why nothing in it can be opened,
        hence served, deleted or trained; empty: its store key is there).
    """
    with StoreFolder(path) as folder:
        slices, healing = folder.ledger.slices(), outlook(folder)
        trained, live = folder.trained(slices), folder.identities(slices)
        depths, requests = healing["depths_before"], folder.ledger.requests()
        floor = floor or folder.floor
        return {
            "store": str(path),
            "shards": len(depths),
            "slices": folder.config.slices,
            "strategy": folder.config.strategy,
            "placement": folder.config.placement,
            "depths": depths,
            "mean_depth": sum(depths) / len(depths),
            "dead_shards": [s for s, d in enumerate(depths) if not d],
            "generations": [
                {"generation": g.number, "shards": g.shards, "depths": depths[g.first : g.first + g.shards]}
                for g in folder.ledger.generations
            ],
            "dirty": sorted(map(list, folder.ledger.dirty())),
            "nodes": {
                "planned": folder.tree.stages * len(depths),
                "live": len(live),
                "trained": len(trained),
                "missing": len(live) - len(trained),
            },
            "requests": len(requests),
            "states": {name: sum(r.state == name for r in requests) for name in STATES},
            "pending_erasure": len(folder.ledger.unerased()),
            "overdue": [r.request_id for r in requests if r.overdue()],
            "next_deadline": min((r.deadline for r in folder.ledger.unerased() if r.deadline), default=None),
            "floor": dataclasses.asdict(floor),
            "below": floor.broken(depths),
            "locked": _locked(folder),
            "lost_slices": healing["lost_slices"],
            "given_up": given_up(folder),
            "healing": {name: healing[name] for name in ("slices", "nodes", "slice_passes", "depths_after")},
        }


def _locked(folder: StoreFolder) -> str:
    try:
        _ = folder.files.key
    except StoreError as error:
        return str(error)
    return ""
