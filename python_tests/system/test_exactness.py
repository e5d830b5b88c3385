"""Bits: what may change them, and what may not. Every comparison is of SHA-256 over the weights."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import tiny as t
import torch

import s3t_ext
from s3t_ext.models import batches
from s3t_ext.system.data import ingest
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.training import lockstep
from s3t_ext.system.training.lockstep import LockStep

every_placement = pytest.mark.parametrize("placement", ["stack", "layers"])


@every_placement
def test_two_runs_give_the_same_bits(tiny, tmp_path, placement) -> None:
    first = t.weights(tiny.fit(tmp_path / "one", placement=placement))
    assert first == t.weights(tiny.fit(tmp_path / "two", placement=placement))
    assert len(first) == 2 * 7, "subsets of 3 slices, 2 shards"
    assert len(set(first.values())) == len(first), "every node has weights of its own"
    assert first != t.weights(tiny.fit(tmp_path / "three", placement=placement, key=bytes(32)))


@every_placement
def test_threads_and_pass_size_change_no_bit(tiny, tmp_path, placement) -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads, together in ((1, 1), (2, 2), (3, 7), (max(4, before), 14)):
            torch.set_num_threads(threads)
            found.append(t.weights(tiny.fit(tmp_path / f"{threads}", placement=placement, nodes_per_pass=together)))
    finally:
        torch.set_num_threads(before)
    assert all(w == found[0] for w in found)


def test_dropout_follows_node_and_record(mlp, tmp_path, monkeypatch) -> None:
    """Neither the other nodes of a pass nor deleted people move a mask; a mask by place in the pass is seen."""
    plain = t.weights(mlp.fit(tmp_path / "plain"))
    alone = t.weights(mlp.fit(tmp_path / "alone", dropout=0.3, nodes_per_pass=1))
    assert not set(plain.values()) & set(alone.values()), "dropout must do something to every node"
    assert alone == t.weights(mlp.fit(tmp_path / "together", dropout=0.3, nodes_per_pass=7))
    assert not interferes(mlp, tmp_path / "x", victims(mlp, 3), dropout=0.3)
    keyed = LockStep._dropout
    by_place = lambda self, nodes, step, keys: keyed(self, nodes, step, torch.arange(len(keys)))  # noqa: E731
    monkeypatch.setattr(LockStep, "_dropout", by_place)
    assert alone != t.weights(mlp.fit(tmp_path / "by place", dropout=0.3, nodes_per_pass=7))
    one = t.weights(mlp.fit(tmp_path / "one", dropout=0.3, nodes_per_pass=1))
    assert one != t.weights(mlp.fit(tmp_path / "seven", dropout=0.3, nodes_per_pass=7)), "the mutant mixes nodes"


def test_row_order_changes_no_bit(tiny, tmp_path) -> None:
    rows = list(range(len(tiny.table)))
    random.Random(1).shuffle(rows)
    shuffled = t.reorder(tiny.table, rows)
    assert t.weights(tiny.fit(tmp_path / "one")) == t.weights(tiny.fit(tmp_path / "two", shuffled))


def test_plan_changes_no_bit_of_a_node(mlp, tmp_path) -> None:
    subsets = t.weights(mlp.fit(tmp_path / "one"))
    sisa = t.weights(mlp.fit(tmp_path / "two", strategy="sisa"))
    assert sisa.items() <= subsets.items()


# --- non-interference: train(D), then delete X, is train(D without X) on every node that is left ----------------------


def interferes(tiny: t.Tiny, folder, people: set[str], **config) -> set[tuple]:
    """Give the nodes that a deletion leaves alive and whose bits depend on the deleted people."""
    folder.mkdir()
    store = tiny.fit(folder / "all", **config)
    s3t_ext.delete(store, sorted(people))
    kept = t.weights(store)
    fresh = t.weights(tiny.fit(folder / "less", t.without(tiny.table, people), **config))
    assert kept, "nothing left to compare"
    return {node for node in kept if kept[node] != fresh.get(node)}


def victims(tiny: t.Tiny, how_many: int) -> set[str]:
    """Choose people of one slice, so that others stay alive."""
    layout = ingest.lay_out(tiny.table, ingest.Key(t.KEY), 2, 3)
    cell = max(layout.slices, key=lambda c: len({s[0] for s in layout.slices[c].subjects}))
    return set(sorted({s[0] for s in layout.slices[cell].subjects})[:how_many])


@every_placement
@pytest.mark.parametrize("how_many", [1, 100], ids=["one person", "a whole slice"])
def test_deleted_people_leave_no_bit(tiny, tmp_path, placement, how_many) -> None:
    assert not interferes(tiny, tmp_path / "x", victims(tiny, how_many), placement=placement)


def test_only_member_of_a_class_leaves_no_bit(mlp, tmp_path) -> None:
    one = victims(mlp, 1)
    labels = np.array([2 if set(names) <= one else n % 2 for n, names in enumerate(mlp.table.subjects)])
    odd = replace(mlp, table=replace(mlp.table, labels=labels))
    assert not interferes(odd, tmp_path / "x", one)


def test_order_by_position_is_seen_by_row_order(mlp, tmp_path, monkeypatch) -> None:
    """Batches by position in the slice: harmless while slices are sorted by record key, seen once they are not."""
    order = batches.batch_order(b"k" * 16, [b"a", b"b", b"c"], 9)
    again = batches.batch_order(b"k" * 16, [b"c", b"a", b"b"], 9)
    assert [b"abc"[i] for i in order] == [b"cab"[i] for i in again]
    monkeypatch.setattr(lockstep, "batch_order", lambda key, records, rows: np.arange(rows) % max(1, len(records)))
    order = lockstep.batch_order(b"k" * 16, [b"a", b"b", b"c"], 9)
    assert [b"abc"[i] for i in order] != [b"cab"[i] for i in lockstep.batch_order(b"k" * 16, [b"c", b"a", b"b"], 9)]


def test_changing_one_slice_moves_only_nodes_on_it(mlp, tmp_path) -> None:
    layout = ingest.lay_out(mlp.table, ingest.Key(t.KEY), 2, 3)
    person = layout.slices[1, 2].subjects[0][0]
    inputs = mlp.table.inputs.copy()
    inputs[[names == (person,) for names in mlp.table.subjects]] += 1
    before = t.weights(mlp.fit(tmp_path / "one"))
    after = t.weights(mlp.fit(tmp_path / "two", replace(mlp.table, inputs=inputs)))
    assert {node for node in before if before[node] != after[node]} == {n for n in before if n[0] == 1 and 2 in n[1]}


def test_frozen_adapters_are_watched(mlp, tmp_path, monkeypatch) -> None:
    run = LockStep._steps

    def touch(self, *args):
        run(self, *args)
        for layer in self.layers.values():
            layer.a.add_(1e-6)

    monkeypatch.setattr(LockStep, "_steps", touch)
    with pytest.raises(RuntimeError, match="frozen adapters"):
        mlp.fit(tmp_path / "store")


def test_streams_differ_by_shard_path_layer_and_key() -> None:
    key = ingest.Key(t.KEY)
    named = [(0, (0,), "x"), (1, (0,), "x"), (0, (1,), "x"), (0, (0, 1), "x"), (0, (1, 0), "x"), (0, (0,), "y")]
    streams = [lockstep._stream(key, (shard, path), layer) for shard, path, layer in named]
    streams.append(lockstep._stream(key.derive("other"), (0, (0,)), "x"))
    assert len(set(streams)) == len(streams)


def test_every_declared_thing_is_in_the_identity(mlp, tmp_path) -> None:
    """Another key, base, head, step rule or schema: another id."""

    def ids(tiny: t.Tiny, name: str, **config) -> dict:
        with StoreFolder(tiny.fit(tmp_path / f"store {name}", steps=1, strategy="sisa", **config)) as folder:
            slices = dict.fromkeys(folder.ledger.slices(), "a" * 64)  # salts apart
            return folder.identities(slices)

    base = t.make(tmp_path / "other", seed=1).base
    found = [
        ids(mlp, "as is"),
        ids(mlp, "key", key=bytes(32)),
        ids(mlp, "rate", lr=0.02),
        ids(mlp, "placement", placement="layers"),
        ids(replace(mlp, schema=replace(mlp.schema, classes=("red", "green", "azure"))), "classes"),
        ids(replace(mlp, base=base), "base"),
    ]
    assert ids(mlp, "again") == found[0]
    for node in found[0]:
        assert len({each[node] for each in found}) == len(found)
    with StoreFolder(tmp_path / "store as is") as folder:
        folder.head_hash = "0" * 64
        other = folder.identities(dict.fromkeys(folder.ledger.slices(), "a" * 64))
    assert not set(other.values()) & set(found[0].values())


def test_identity_holds_no_provenance(store) -> None:
    with StoreFolder(store) as folder:
        for name in folder.trained(folder.ledger.slices()).values():
            manifest = folder.nodes.manifest(name)
            assert not set(manifest["identity"]) & set(manifest["provenance"])
            assert {"torch", "threads", "cpu"} <= set(manifest["provenance"])
