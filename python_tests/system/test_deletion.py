"""Deletion: mask, durable record, acknowledgement, erasure, in this order; receipts."""

from __future__ import annotations

import pytest
import tiny as t

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.store.nodes import NodeStore
from s3t_ext.system import serve
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Service
from s3t_ext.system.unlearn import delete_from


def test_deletion_masks_records_acknowledges_then_erases(mlp, store, monkeypatch) -> None:
    """The order of rule 14, observed from inside."""
    cells = t.people_by_cell(mlp)
    person = cells[1, 2][0]
    seen: list[str] = []
    with Service(store) as service:
        dead_now = {name for node, name in service._ids.items() if node[0] == 1 and 2 in node[1]}
        record, erase = serve.delete_from, serve.erase_or_warn

        def recording(folder, subjects, request_id):
            seen.append("masked" if service.depths == (3, 2) else "not masked")
            receipt = record(folder, subjects, request_id)
            with StoreFolder(store) as other:
                seen.append("durable" if (1, 2) in other.ledger.dirty() else "not durable")
                seen.append("blobs there" if all(other.nodes.has(name) for name in dead_now) else "erased too early")
            return receipt

        monkeypatch.setattr(serve, "delete_from", recording)
        monkeypatch.setattr(serve, "erase_or_warn", lambda folder: (seen.append("erase"), erase(folder)))
        receipt = service.delete([person], "r1")
    assert seen == ["masked", "durable", "blobs there", "erase"]
    assert set(receipt["shards"][0]["dead"]) == dead_now
    with StoreFolder(store) as folder:
        assert not any(folder.nodes.has(name) for name in dead_now)
        assert not folder.ledger.unerased()


def test_receipts(mlp, tmp_path) -> None:
    store = tmp_path / "store"
    s3t_ext.fit(
        store,
        mlp.table,
        mlp.schema,
        mlp.base,
        s3t_ext.Config(shards=2, slices=3, steps=2, batch=4, rank=2),
        key=t.KEY,
        declared={"public": ["Volunteer 1"]},
        progress=False,
    )
    person = t.people_by_cell(mlp)[0, 0][0]
    first = s3t_ext.delete(store, [person], "r1")
    assert [s["status"] for s in first["subjects"]] == ["deleted"]
    assert person not in str(first)
    assert [(s["depth_before"], s["depth_after"]) for s in first["shards"]] == [(3, 2)]
    kept = first["shards"][0]["kept"]
    with StoreFolder(store) as folder:
        assert {k["node"] for k in kept} == {
            n for (s, _), n in folder.trained(folder.ledger.slices()).items() if s == 0
        }
    assert s3t_ext.delete(store, [person], "r1") == first, "the same id, the same receipt"
    with pytest.raises(ValueError, match="request_id"):
        s3t_ext.delete(store, ["somebody else"], "r1")
    again = s3t_ext.delete(store, [person.upper() + "  "], "r2")
    assert [s["status"] for s in again["subjects"]] == ["already deleted"]
    assert again != first
    assert [s["status"] for s in s3t_ext.delete(store, ["nobody"])["subjects"]] == ["not held"]
    public = s3t_ext.delete(store, ["volunteer 1"])
    assert [s["status"] for s in public["subjects"]] == ["held in a declared part, not covered"]


def test_dry_run_tells_and_changes_nothing(mlp, store) -> None:
    person = t.people_by_cell(mlp)[0, 0][0]
    before = s3t_ext.status(store)
    told = s3t_ext.delete(store, [person], dry_run=True)
    assert (told["depths_before"], told["depths_after"]) == ([3, 3], [2, 3])
    assert s3t_ext.status(store) == before


def test_a_record_of_two_people_goes_with_either(mlp, tmp_path) -> None:
    table = s3t_ext.system.data.tables.Table(
        [(*n, "witness") if i == 0 else n for i, n in enumerate(mlp.table.subjects)], mlp.table.inputs, mlp.table.labels
    )
    store = mlp.fit(tmp_path / "store", table)
    receipt = s3t_ext.delete(store, ["Witness"])
    assert [s["status"] for s in receipt["subjects"]] == ["deleted"]
    with StoreFolder(store) as folder:
        left = [names for cell in folder.ledger.slices() for names in folder.records.get(*cell).subjects]
    assert len(left) == len(table) - 1
    assert not any("witness" in names for names in left)


def test_state_is_a_function_of_the_set_of_requests(mlp, tmp_path) -> None:
    people = [people[0] for people in list(t.people_by_cell(mlp).values())[:3]]
    states = []
    for number, batches in enumerate(([people], [[p] for p in people], [[p] for p in reversed(people * 2)])):
        store = mlp.fit(tmp_path / str(number))
        for batch in batches:
            s3t_ext.delete(store, batch)
        status = s3t_ext.status(store)
        states.append((t.weights(store), status["depths"], status["dirty"], status["nodes"]))
    assert states[0] == states[1] == states[2]


def test_a_string_of_subjects_is_refused(store) -> None:
    for call in (s3t_ext.delete, Service(store).delete):
        with pytest.raises(ValueError, match="subjects"):
            call(*([store, "person 1"] if call is s3t_ext.delete else ["person 1"]))


def test_two_deleters_at_once_leave_nothing_unerased(mlp, store, monkeypatch) -> None:
    """The second finds the lock taken and goes; the first looks again after it let go."""
    from s3t_ext.system import unlearn

    one, two = (t.people_by_cell(mlp)[cell][0] for cell in ((0, 0), (1, 1)))
    erase, calls = unlearn.erase, []

    def slow(folder):
        lost = erase(folder)
        if not calls:
            calls.append(1)
            s3t_ext.delete(store, [two])  # while the lock is held
        return lost

    monkeypatch.setattr(unlearn, "erase", slow)
    s3t_ext.delete(store, [one])
    assert calls
    assert s3t_ext.status(store)["pending_erasure"] == 0
    with StoreFolder(store) as folder:
        left = {
            name for cell in folder.ledger.slices() for names in folder.records.get(*cell).subjects for name in names
        }
    assert not {one, two} & left


def test_what_cannot_be_erased_blocks_neither_the_receipt_nor_others(mlp, store) -> None:
    cells = t.people_by_cell(mlp)
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="acknowledged, but not erased yet"):
        receipt = s3t_ext.delete(store, [cells[0, 0][0]], "r1")
    assert receipt["subjects"][0]["status"] == "deleted"
    with pytest.warns(UserWarning, match="0-0"):
        s3t_ext.delete(store, [cells[1, 1][0]])
    with StoreFolder(store) as folder:
        assert [r.request_id for r in folder.ledger.unerased()] == ["r1"]
        assert all(cells[1, 1][0] not in names for names in folder.records.get(1, 1).subjects)


def test_a_receipt_tells_what_was_trained_of_what_died(template, ram, capsys) -> None:
    world = template.copy(ram / "now")
    person, (shard, slice_) = sorted(world.cells.items())[0]
    hit = [name for name, (s, path) in world.nodes.items() if s == shard and slice_ in path]
    absent = set(hit[:2])
    with StoreFolder(world.path) as folder:
        for name in absent:
            folder.nodes.erase(name)
    assert main(["delete", str(world.path), person, "--request-id", "r"]) == 0
    out = capsys.readouterr().out
    assert f"{len(hit) - 2} nodes switched off (2 more of the plan were not trained yet), " in out
    with StoreFolder(world.path) as folder:
        (told,) = folder.ledger.receipt("r")["shards"]
        assert (set(told["dead"]), set(told["untrained"])) == (set(hit), absent)
        assert s3t_ext.status(world.path)["nodes"]["live"] == len(world.nodes) - len(hit)
    assert main(["status", str(world.path)]) == 0
    assert f"of which {len(hit)} are on dirty slices, trained before or not" in capsys.readouterr().out


def test_what_was_trained_is_read_in_the_transaction_that_makes_it_dead(template, ram, monkeypatch) -> None:
    world, has, seen = template.copy(ram / "now"), NodeStore.has, set()
    with StoreFolder(world.path) as folder:

        def looked(nodes: NodeStore, name: str) -> bool:
            seen.add(folder.ledger._database._db.in_transaction)
            return has(nodes, name)

        monkeypatch.setattr(NodeStore, "has", looked)
        delete_from(folder, [min(world.cells)], "r")
    assert seen == {True}
