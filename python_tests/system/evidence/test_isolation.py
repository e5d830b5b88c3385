"""Cross-slice isolation: slices that hold nothing say nothing, and are not drawn."""

from __future__ import annotations

import blobs

from s3t_ext.ledger.identity import Key
from s3t_ext.ledger.partition import place
from s3t_ext.system.evidence.canaries import take
from s3t_ext.system.evidence.isolation import isolate
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import StoreFolder


def test_isolation_changes_only_slices_that_own_a_record(tmp_path) -> None:
    people = blobs.table(120, "person", 2)
    few = [i for i, (name,) in enumerate(people.subjects) if place(Key(bytes([2]) * 32), name, 2, 3)[1] == 1]
    table = take(people, few)  # the other four slices are empty
    (tmp_path / "scratch").mkdir()
    with StoreFolder(blobs.store(tmp_path, table, 2)) as folder:
        rows = isolate(FreshStores(folder, tmp_path / "scratch", False), table, 6, 2)
    assert sorted((row["shard"], row["slice"]) for row in rows) == [(0, 1), (1, 1)]
    assert all(row["moved"] and not row["differing"] for row in rows)
