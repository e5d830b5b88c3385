"""A small store that is fitted once and copied, and the slice of it that tests lose."""

from __future__ import annotations

import shutil
from pathlib import Path

from s3t_ext.system import verify
from s3t_ext.system.folder import StoreFolder

QUICK = {"steps": 1, "rank": 1}
LOST, OTHER = (0, 0), (1, 1)


def copy(store: Path, place: Path) -> Path:
    """Copy a store, with its key and anchor, into a folder."""
    shutil.copytree(store, place / "store")
    for kind in ("key", "anchor"):
        shutil.copy(store.with_name(f"store.{kind}"), place)
    return place / "store"


def states(store) -> dict[str, str]:
    with StoreFolder(store) as folder:
        return {request.request_id: request.state for request in folder.ledger.requests()}


def certified(mlp, store, monkeypatch) -> dict:
    """Verify and certify without the fresh process, and its time."""

    def here(module, task, scratch):
        return verify.compare(str(store), [mlp.table], "2", 0, False, task["scratch"])

    monkeypatch.setattr(verify, "in_fresh_process", here)
    return verify.verify(store, mlp.table, 2, certify=True, progress=False)
