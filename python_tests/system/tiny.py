"""A system small enough to train in a second: 3 classes, 2 shards of 3 slices, a little MLP or ViT."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from s3t_ext.ledger.identity import Key
from s3t_ext.models.folder import build, save_model
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.config import Config
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.fit import fit
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.scratch import hand_over
from s3t_ext.system.settings import Settings
from s3t_ext.system.verify import compare

KEY = bytes(range(32))
MODELS = {
    "mlp": ({"shape": [6], "width": 16, "depth": 3}, (6,)),
    "vit": (
        {"shape": [1, 8, 8], "patch": 2, "width": 16, "depth": 3, "heads": 2},
        (1, 8, 8),
    ),  # attention that threads move
}


@dataclass(frozen=True)
class Tiny:
    """A table, its schema and a base model's folder."""

    table: Table
    schema: Schema
    base: Path

    def fit(
        self,
        store: Path,
        table: Table | None = None,
        key: bytes | None = KEY,
        nodes_per_pass: int = 3,
        settings: Settings | None = None,
        **config,
    ) -> Path:
        declared = {"shards": 2, "slices": 3, "steps": 4, "batch": 4, "rank": 3, **config}
        fit(
            store,
            self.table if table is None else table,
            self.schema,
            self.base,
            Config(**declared),
            key=key,
            settings=settings or Settings(nodes_per_pass=nodes_per_pass),
            progress=False,
        )
        return store


def make(folder: Path, architecture: str = "mlp", rows: int = 60, people: int = 25, seed: int = 0) -> Tiny:
    arguments, shape = MODELS[architecture]
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_model(folder / "base", build(architecture, arguments), architecture, arguments)
    table = Table(
        [(f"person {i % people}",) for i in range(rows)],
        rng.normal(size=(rows, *shape)).astype(np.float32),
        rng.integers(0, 3, rows),
    )
    return Tiny(table, Schema(classes=("red", "green", "blue"), shape=shape), folder / "base")


def weights(store: Path) -> dict[tuple, str]:
    """Give the hash of the weights of every live node, by (shard, path): what must be equal bit for bit."""
    with StoreFolder(store) as folder:
        return {
            node: weights_hash(folder.nodes.get(name)[1])
            for node, name in folder.trained(folder.ledger.slices()).items()
        }


def without(table: Table, people: set[str]) -> Table:
    rows = [i for i, names in enumerate(table.subjects) if not people & set(names)]
    return reorder(table, rows)


def reorder(table: Table, rows: list[int]) -> Table:
    return Table([table.subjects[i] for i in rows], table.inputs[rows], table.labels[rows])


def people_by_cell(tiny: Tiny) -> dict[tuple[int, int], list[str]]:
    layout = lay_out(tiny.table, Key(KEY), 2, 3)
    return {cell: sorted({s[0] for s in records.subjects}) for cell, records in layout.slices.items()}


def mismatched(store: Path, *tables: Table) -> int:
    """Verify in this process, which is quicker than the fresh one of `s3t_ext.verify`, and count what differs."""
    with tempfile.TemporaryDirectory(dir=store.parent) as folder, StoreFolder(store) as opened:
        handed = [hand_over(table, opened.schema, opened.base) for table in tables]
        report = compare(str(store), handed, "all", 0, False, str(Path(folder) / "fresh"))
    assert report["nodes"] == report["live"] > 0
    return report["mismatched"]
