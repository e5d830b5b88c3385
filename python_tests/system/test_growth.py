"""New records open new shards: nothing that was trained moves, and the deleted come back by an explicit act alone."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import tiny as t
from points import meeting

import s3t_ext
from s3t_ext.store.files import StoreError
from s3t_ext.system import growth
from s3t_ext.system.backup import backup
from s3t_ext.system.config import Config
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.restore import restore

QUICK = {"shards": 2, "slices": 3, "steps": 1, "batch": 4, "rank": 1}


def more(tiny: t.Tiny, people: list[str], seed: int = 1) -> Table:
    """Give three new records a person."""
    chance = np.random.default_rng(seed)
    names = [(person,) for person in people for _ in range(3)]
    inputs = chance.normal(size=(len(names), *tiny.schema.shape)).astype(np.float32)
    return Table(names, inputs, chance.integers(0, 3, len(names)))


def fit(tiny: t.Tiny, store, table: Table, **settings) -> dict:
    return s3t_ext.fit(store, table, tiny.schema, tiny.base, Config(**QUICK), progress=False, **settings)


STRIDE = 1 if os.environ.get("S3T_LONG") else 3  # of the points on the way
NEW = [f"new {i}" for i in range(12)]


def test_people_are_declared_when_a_store_is_made(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    with pytest.raises(ValueError, match="people declared as 'public' when the store was made, got 2 of 2 who were"):
        fit(mlp, store, mlp.table, declared={"public": {"Volunteer 1", "person 3"}})


def test_new_records_open_new_shards_and_move_nothing(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    before = t.weights(store)
    table = more(mlp, [*NEW, "person 3"])
    with s3t_ext.Service(store) as service:
        report = fit(mlp, store, table, grow=True, grow_shards=1)
        assert (report["generations"], report["trained"], report["dropped"]) == (2, 7, 0)
        service.predict(mlp.table.inputs[:1])
        service.settle()
        answer = service.predict(mlp.table.inputs[:3])
    assert answer.depths == (3, 3, 3), "a running service answers with the new shards too"
    found = t.weights(store)
    assert before.items() <= found.items()
    assert sorted(found.keys() - before.keys())[0] == (2, (0,))
    assert s3t_ext.status(store)["generations"][1] == {"generation": 1, "shards": 1, "depths": [3]}
    assert s3t_ext.verify(store, [mlp.table, table], progress=False)["mismatched"] == 0
    assert fit(mlp, store, table)["trained"] == fit(mlp, store, mlp.table)["trained"] == 0, "either goes on"
    assert fit(mlp, store, table, grow=True, grow_shards=1)["generations"] == 2, "so does a repeated command"
    with pytest.raises(ValueError, match=r"grow_shards: expected 1, as many as this table opened before, .* got 2"):
        fit(mlp, store, table, grow=True, grow_shards=2)
    with pytest.raises(ValueError, match="expected one for each of the store's 2 generations, in order, got 1"):
        t.mismatched(store, mlp.table)
    with pytest.raises(
        StoreError, match=r"that of generation 0 \(shards 0 to 1\), got that of generation 1; give the tables"
    ):
        s3t_ext.verify(store, [table, mlp.table], progress=False)
    with pytest.raises(ValueError, match=r"generation 1 \(shards 2 to 2\), got that of generation 0"):
        t.mismatched(store, mlp.table, mlp.table)
    less = s3t_ext.verify(store, [mlp.table, t.reorder(table, list(range(len(table) - 1)))], progress=False)
    assert less["mismatched"] > 0
    assert (less["missing_rows"], less["other_rows"]) == (1, 0)
    changed = Table(table.subjects, table.inputs + np.float32(0.01), table.labels)
    assert t.mismatched(store, mlp.table, changed) == 7


def test_tables_of_the_same_people_in_the_wrong_order_are_refused(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    later = replace(mlp.table, inputs=mlp.table.inputs + 1)
    fit(mlp, store, later, grow=True)
    s3t_ext.delete(store, [mlp.table.subjects[0][0]])
    with pytest.raises(ValueError, match=r"generation 0 .* got that of generation 1"):
        t.mismatched(store, later, mlp.table)
    assert t.mismatched(store, mlp.table, later) == 0


def test_who_came_with_somebody_deleted_alone_is_no_stranger(mlp, tmp_path) -> None:
    """Their one row was dropped when the store grew: the table is the store's own all the same."""
    store, gone = mlp.fit(tmp_path / "store", **QUICK), mlp.table.subjects[0][0]
    s3t_ext.delete(store, [gone])
    table = more(mlp, NEW)
    table = replace(table, subjects=[(gone, "newcomer"), *table.subjects[1:]])
    fit(mlp, store, table, grow=True)
    assert t.mismatched(store, mlp.table, table) == 0


def test_a_generation_that_is_empty_by_now_keeps_nobody_out(mlp, tmp_path) -> None:
    store, person = mlp.fit(tmp_path / "store", **QUICK), mlp.table.subjects[0][0]
    for seed in (1, 2):
        s3t_ext.delete(store, [person])
        fit(mlp, store, more(mlp, [person], seed), grow=True, grow_shards=1, readmit=[person])
    with StoreFolder(store) as folder:
        assert [generation.shards for generation in folder.ledger.generations] == [2, 1, 1]


def test_a_request_reaches_a_person_in_every_generation(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    person = mlp.table.subjects[0][0]
    table = more(mlp, [*NEW, person])
    fit(mlp, store, table, grow=True)
    receipt = s3t_ext.delete(store, [person])
    assert [row["status"] for row in receipt["subjects"]] == ["deleted", "deleted"]
    assert {row["shard"] // 2 for row in receipt["subjects"]} == {0, 1}
    heal(store, progress=False)
    assert t.mismatched(store, mlp.table, table) == 0
    assert len(t.weights(store)) == 28
    assert not [name for name in subjects(store) if name == person]


def subjects(store) -> set[str]:
    """Name everybody in the records of a store, whatever its ledger says."""
    with StoreFolder(store) as folder:
        cells = [tuple(map(int, path.stem.split("-"))) for path in (store / "records").glob("*.sealed")]
        return {name for cell in cells for names in folder.records.get(*cell).subjects for name in names}


def test_other_records_are_refused_without_the_word(mlp, tmp_path) -> None:
    store, table = mlp.fit(tmp_path / "store", **QUICK), more(mlp, NEW)
    with pytest.raises(ValueError, match=r"got 36 others and 60 missing; new records open new shards: --grow does"):
        fit(mlp, store, table)
    both = Table([*mlp.table.subjects, *table.subjects], np.concatenate([mlp.table.inputs, table.inputs]),
                 np.concatenate([mlp.table.labels, table.labels]))  # fmt: skip
    with pytest.raises(ValueError, match="got all 60 of generation 0 among them; give the new rows only"):
        fit(mlp, store, both, grow=True)
    with pytest.raises(ValueError, match="grow: expected an existing store"):
        fit(mlp, tmp_path / "none", table, grow=True)
    with pytest.raises(ValueError, match="readmit: expected it beside grow only"):
        fit(mlp, store, table, readmit=["person 1"])
    with pytest.raises(ValueError, match="grow_shards: expected an integer of at least 1, got 0"):
        fit(mlp, store, table, grow=True, grow_shards=0)
    with pytest.raises(ValueError, match="shards: expected records in each, got none in"):
        fit(mlp, store, more(mlp, NEW[:1]), grow=True)
    assert s3t_ext.status(store)["shards"] == 2
    assert subjects(store) == {name for names in mlp.table.subjects for name in names}


def test_a_request_during_a_readmission_counts(mlp, tmp_path, monkeypatch) -> None:
    store, person = mlp.fit(tmp_path / "store", **QUICK), mlp.table.subjects[0][0]
    s3t_ext.delete(store, [person])
    table, check = more(mlp, [*NEW, person]), growth._check_readmitted

    def slow(*given) -> None:
        check(*given)
        s3t_ext.delete(store, [person])

    monkeypatch.setattr(growth, "_check_readmitted", slow)
    with pytest.raises(ValueError, match="asked again to be forgotten: nothing was entered"):
        fit(mlp, store, table, grow=True, readmit=[person])
    assert s3t_ext.status(store)["shards"] == 2
    assert person not in subjects(store)


def test_the_deleted_are_dropped_from_new_records_and_come_back_by_an_explicit_act(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    person, other = mlp.table.subjects[0][0], mlp.table.subjects[1][0]
    first = s3t_ext.delete(store, [person, other, "stranger"], "r")
    with pytest.raises(ValueError, match="readmit: expected somebody who was deleted, got 'new 0'"):
        fit(mlp, store, more(mlp, NEW), grow=True, readmit=["new 0"])
    with pytest.raises(ValueError, match="readmit: expected somebody in the table"):
        fit(mlp, store, more(mlp, NEW), grow=True, readmit=[person])
    tables = [mlp.table, more(mlp, [*NEW, person, other, "stranger"]), more(mlp, [*NEW, person], seed=2)]
    assert fit(mlp, store, tables[1], grow=True)["dropped"] == 9
    assert fit(mlp, store, tables[2], grow=True, readmit=[person.upper()])["dropped"] == 0
    assert fit(mlp, store, tables[2], grow=True, readmit=[person])["trained"] == 0, "a repeated command goes on"
    assert {person, other} & subjects(store) == {person}
    heal(store, progress=False)
    assert t.mismatched(store, *tables) == 0
    assert s3t_ext.delete(store, [person, other, "stranger"], "r") == first, "the same request is the same request"
    assert person in subjects(store)
    receipt = s3t_ext.delete(store, [person], "new")
    assert sorted(row["status"] for row in receipt["subjects"]) == ["already deleted", "deleted"]
    assert person not in subjects(store)
    heal(store, progress=False)
    assert t.mismatched(store, *tables) == 0


class _Stopped(Exception):
    """The run ends here."""


def test_a_growth_that_stopped_at_any_point_leaves_no_records_and_goes_on(mlp, ram, capsys) -> None:
    """The ledger does not know the people of a growth that was not entered: whoever comes next clears it away."""
    whole, table = mlp.fit(ram / "whole", **QUICK), more(mlp, [*NEW, "person 3"])
    reference = ram / "reference"
    copy(whole, reference)
    fit(mlp, reference, table, grow=True, grow_shards=1)
    expected, points = t.weights(reference), 0

    def stop(point: str) -> None:
        raise _Stopped

    store = ram / "now" / "store"
    for nth in range(1, 1000, STRIDE):
        shutil.rmtree(store.parent, ignore_errors=True)
        copy(whole, store)
        with meeting(nth, stop) as met, suppress(_Stopped):
            fit(mlp, store, table, grow=True, grow_shards=1)
        if nth % 2 == 1:  # a request comes first
            s3t_ext.delete(store, ["person 3"])
            assert "person 3" not in subjects(store), met[-1]
        fit(mlp, store, table, grow=True, grow_shards=1)
        heal(store, progress=False)
        found = t.weights(store)
        assert found.keys() == expected.keys()
        assert nth % 2 == 1 or found == expected, met[-1]
        if len(met) < nth:
            break
        points += 1
    with capsys.disabled():
        print(f"\ngrowths stopped: {points}")
    assert points > 32 // STRIDE


def copy(store, to) -> None:
    shutil.copytree(store, to)
    for kind in ("key", "anchor"):
        shutil.copy2(store.with_name(f"{store.name}.{kind}"), to.with_name(f"{to.name}.{kind}"))


def test_who_is_deleted_while_new_records_come_in_does_not_come_in(mlp, tmp_path, monkeypatch) -> None:
    store, table = mlp.fit(tmp_path / "store", **QUICK), more(mlp, [*NEW, "person 3"])
    write, asked = growth.write_slices, []

    def overtaken(folder, layout):
        found = write(folder, layout)
        if not asked:
            asked.append(s3t_ext.delete(store, ["person 3"]))
        return found

    monkeypatch.setattr(growth, "write_slices", overtaken)
    assert fit(mlp, store, table, grow=True)["dropped"] == 3
    assert "person 3" not in subjects(store)
    assert t.mismatched(store, mlp.table, table) == 0


def test_a_backup_holds_all_generations(mlp, tmp_path) -> None:
    store, table = mlp.fit(tmp_path / "store", **QUICK), more(mlp, NEW)
    fit(mlp, store, table, grow=True)
    backup(store, tmp_path / "backup")
    receipt = s3t_ext.delete(store, ["new 1"])
    assert [export["export"] for export in receipt["exports"]] == ["backup"]
    expected = t.weights(store)
    shutil.rmtree(store)
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "r.json").write_bytes(s3t_ext.ledger.canonical_json(receipt))
    report = restore(tmp_path / "backup", store, receipts=[tmp_path / "receipts"])
    assert (report["missing"], report["records"]) == (0, 12)
    assert t.weights(store) == expected
    assert "new 1" not in subjects(store)
    heal(store, progress=False)
    assert t.mismatched(store, mlp.table, table) == 0


def test_a_backup_from_before_the_growth_says_that_it_is_too_old(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    backup(store, tmp_path / "old")
    fit(mlp, store, more(mlp, NEW), grow=True)
    backup(store, tmp_path / "new")
    expected = t.weights(store)
    (store / "records" / "3-1.sealed").unlink()
    with pytest.raises(StoreError, match=r"the records of slice 3-1 are missing, and .*old is older than its shards"):
        restore(tmp_path / "old", store)
    assert restore(tmp_path / "new", store)["records"] == 1
    assert t.weights(store) == expected


def test_a_generation_that_was_lost_with_its_ledger_is_gone_and_grows_again(mlp, tmp_path) -> None:
    """The backup is older than the growth: its people are not served, nor left on the disk, and their requests hold."""
    store, table = mlp.fit(tmp_path / "store", **QUICK), more(mlp, NEW)
    backup(store, tmp_path / "backup")
    fit(mlp, store, table, grow=True)
    receipt = s3t_ext.delete(store, ["new 1"])
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "r.json").write_bytes(s3t_ext.ledger.canonical_json(receipt))
    (store / "ledger.sqlite").write_bytes(b"lost")
    restore(tmp_path / "backup", store, receipts=[tmp_path / "receipts"])
    assert s3t_ext.status(store)["shards"] == 2
    assert not subjects(store) & set(NEW)
    assert not s3t_ext.status(store)["dirty"]
    assert fit(mlp, store, table, grow=True)["dropped"] == 3
    assert s3t_ext.status(store)["depths"] == [3, 3, 3, 3]
    assert t.mismatched(store, mlp.table, table) == 0


def test_a_lost_shard_leaves_the_rest_serving_and_says_what_to_do(mlp, tmp_path) -> None:
    store, table = mlp.fit(tmp_path / "store", **QUICK), more(mlp, NEW)
    fit(mlp, store, table, grow=True, grow_shards=1)
    with StoreFolder(store) as folder:
        live = folder.trained(folder.ledger.slices())
    before, name = t.weights(store), live[2, (0, 1)]
    (store / "nodes" / f"{name}.sealed").write_bytes(b"no node")
    with pytest.raises(
        StoreError, match=r"is damaged: .* or remove .*sealed and .*json beside it: then the rest serves, and `s3t"
    ):
        s3t_ext.Service(store)
    for kind in ("sealed", "json"):
        (store / "nodes" / f"{name}.{kind}").unlink()
    with s3t_ext.Service(store) as service:
        assert service.predict(mlp.table.inputs[:1]).depths == (3, 3, 2)
    assert fit(mlp, store, table)["trained"] > 0
    assert t.weights(store) == before
    for file in (store / "records").glob("2-*"):
        file.unlink()
    with pytest.warns(
        UserWarning, match="acknowledged, but not erased yet: .*slice 2-.: `s3t restore BACKUP STORE` brings"
    ):
        s3t_ext.delete(store, ["new 1"])
    with s3t_ext.Service(store) as service:
        assert sum(service.predict(mlp.table.inputs[:1]).depths[:2]) == 6
    assert list(heal(store, progress=False)["lost_slices"]) == ["2-0", "2-1", "2-2"]
