"""Training and deletion meet: nothing of the deleted is trained, published or comes back."""

from __future__ import annotations

import pytest
import tiny as t

import s3t_ext
from s3t_ext.store.files import StoreError, exclusive


def test_a_deleted_subject_that_comes_back_is_dropped(mlp, store) -> None:
    person = t.people_by_cell(mlp)[0, 0][0]
    s3t_ext.delete(store, [person])
    rows = sum(names == (person,) for names in mlp.table.subjects)
    report = s3t_ext.fit(
        store,
        mlp.table,
        mlp.schema,
        mlp.base,
        s3t_ext.Config(shards=2, slices=3, steps=4, batch=4, rank=3),
        progress=False,
    )
    assert report["dropped"] == rows > 0
    assert report["trained"] == 0
    assert s3t_ext.status(store)["depths"] == [2, 3]


def test_a_deleted_co_subject_that_comes_back_is_dropped(mlp, tmp_path) -> None:
    table = s3t_ext.system.data.tables.Table(
        [(*n, "witness") if i == 0 else n for i, n in enumerate(mlp.table.subjects)],
        mlp.table.inputs,
        mlp.table.labels,
    )
    store = mlp.fit(tmp_path / "store", table)
    s3t_ext.delete(store, ["witness"])
    config = s3t_ext.Config(shards=2, slices=3, steps=4, batch=4, rank=3)
    assert s3t_ext.fit(store, table, mlp.schema, mlp.base, config, progress=False)["dropped"] == 1
    assert s3t_ext.verify(store, table, progress=False)["mismatched"] == 0


def test_a_node_that_a_deletion_makes_stale_while_it_trains_is_not_published(mlp, tmp_path, monkeypatch) -> None:
    from s3t_ext.system.training import train

    person = t.people_by_cell(mlp)[0, 0][0]
    publish, store = train.Trainer._publish, tmp_path / "store"
    stale: list[int] = []
    published: list[tuple] = []

    def overtaken(self, weights, ids):
        if not stale:
            s3t_ext.delete(store, [person])
        stale.append(sum(0 in path and shard == 0 for shard, path in weights))
        count = publish(self, weights, ids)
        published.extend(node for node in weights if node[0] == 0 and 0 in node[1] and self.folder.nodes.has(ids[node]))
        return count

    monkeypatch.setattr(train.Trainer, "_publish", overtaken)
    mlp.fit(store)
    assert stale[0], "the deletion met a node in training"
    assert not published, "not even until the erasure"
    assert len(list((store / "nodes").glob("*.json"))) == len(t.weights(store))
    assert not any(shard == 0 and 0 in path for shard, path in t.weights(store))
    assert s3t_ext.status(store)["pending_erasure"] == 0


def test_a_node_published_in_the_very_moment_of_its_deletion_is_erased(mlp, tmp_path, monkeypatch) -> None:
    """The deletion falls between the last look at the ledger and the write: the blob must not stay behind."""
    from s3t_ext.store.nodes import NodeStore

    person = t.people_by_cell(mlp)[0, 0][0]
    put, store, published = NodeStore.put, tmp_path / "store", []

    def overtaken(self, identity, tensors, provenance):
        if identity["shard"] == 0 and identity["path"] == [0] and self.folder.parent == store:
            s3t_ext.delete(store, [person])
            published.append(identity)
        return put(self, identity, tensors, provenance)

    monkeypatch.setattr(NodeStore, "put", overtaken)
    mlp.fit(store)
    assert published
    assert len(list((store / "nodes").glob("*.json"))) == len(t.weights(store)) == 7 + 3
    assert len(list((store / "nodes").glob("*.sealed"))) == 7 + 3


def test_two_writers_are_refused_and_deletion_still_acknowledged(mlp, store) -> None:
    with exclusive(store):
        with pytest.raises(StoreError, match="is writing to"):
            mlp.fit(store)
        s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])
        assert s3t_ext.status(store)["pending_erasure"] == 1
    mlp.fit(store)
    assert s3t_ext.status(store)["pending_erasure"] == 0
