"""Healing: what deletions took is trained again on what they left, and nothing of the deleted comes back."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import tiny as t
from points import meeting

import s3t_ext
from s3t_ext.store.files import StoreError, exclusive
from s3t_ext.system import heal as healing
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.settings import Settings
from s3t_ext.system.training.train import Trainer
from s3t_ext.system.unlearn import erase_pending

QUICK = {"steps": 1, "rank": 1}
STRIDE = 1 if os.environ.get("S3T_LONG") else 9  # of the points on the way


def some(tiny: t.Tiny) -> dict[tuple[int, int], str]:
    """Name somebody of every slice."""
    return {cell: names[0] for cell, names in t.people_by_cell(tiny).items() if names}


def files(store) -> set[str]:
    return {path.name.partition(".")[0] for path in (store / "nodes").iterdir()}


def live(store) -> set[str]:
    with StoreFolder(store) as folder:
        return set(folder.trained(folder.ledger.slices()).values())


def test_healing_gives_what_training_without_them_gives(tiny, tmp_path) -> None:
    """By the front door, and bit for bit in what is served."""
    store, people = tiny.fit(tmp_path / "store"), some(tiny)
    gone = {people[0, 0], people[1, 1], people[1, 2]}
    s3t_ext.delete(store, sorted(gone))
    report = heal(store, progress=False)
    assert (report["healed"], report["dropped"]) == ([[0, 0], [1, 1], [1, 2]], 3)
    assert (report["depths_before"], report["depths_after"]) == ([2, 1], [3, 3])
    assert (report["nodes"], report["left"]) == (10, {"nodes": 0, "slice_passes": 0})
    fresh = tiny.fit(tmp_path / "fresh", t.without(tiny.table, gone))
    assert t.weights(store) == t.weights(fresh)
    assert len(t.weights(store)) == 14
    assert files(store) == live(store)
    with s3t_ext.Service(store) as healed, s3t_ext.Service(fresh) as other:
        found, expected = (service.predict(tiny.table.inputs[:5]) for service in (healed, other))
    assert np.array_equal(found.scores, expected.scores)
    assert t.mismatched(store, tiny.table) == 0


def test_a_budget_buys_the_beginning_of_the_same_order(mlp, tmp_path, monkeypatch) -> None:
    store, people = mlp.fit(tmp_path / "store", **QUICK), some(mlp)
    s3t_ext.delete(store, [people[0, 0], people[1, 1], people[1, 2]])
    foretold = heal(store, dry_run=True, budget=5)
    assert s3t_ext.status(store)["dirty"] == [[0, 0], [1, 1], [1, 2]], "nothing changed"
    with StoreFolder(store) as folder:
        order = healing.missing(folder)
    first = heal(store, budget=5, progress=False)
    assert {key: first[key] for key in ("nodes", "slice_passes", "left", "depths_after")} == {
        key: foretold[key] for key in ("nodes", "slice_passes", "left", "depths_after")
    }
    with StoreFolder(store) as folder:
        assert healing.missing(folder) == order[first["nodes"] :]
    assert heal(store, minutes=0, progress=False)["nodes"] == 0
    rest = heal(store, progress=False)
    assert rest["slice_passes"] == foretold["left"]["slice_passes"]
    assert heal(store, progress=False)["nodes"] == 0
    for name, value in (("budget", -1), ("minutes", -0.5)):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0"):
            heal(store, **{name: value})


def test_a_slice_of_which_nothing_is_left_is_an_empty_slice(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", **QUICK)
    names = t.people_by_cell(mlp)[0, 0]
    s3t_ext.delete(store, names)
    assert heal(store, progress=False)["dropped"] == len(names) > 1
    assert s3t_ext.status(store)["depths"] == [3, 3]
    assert t.mismatched(store, mlp.table) == 0


def test_a_second_request_after_healing_costs_nothing(mlp, tmp_path) -> None:
    """Their records are in no slice any more: nothing becomes dirty, and the receipt says so."""
    store, people = mlp.fit(tmp_path / "store", **QUICK), some(mlp)
    first = s3t_ext.delete(store, [people[0, 0]], "first")
    heal(store, progress=False)
    again = s3t_ext.delete(store, [people[0, 0]], "second")
    assert [row["status"] for row in again["subjects"]] == ["already deleted"]
    assert again["ledger"]["dirty"] == again["shards"] == []
    assert s3t_ext.delete(store, [people[0, 0]], "first") == first
    assert s3t_ext.status(store)["depths"] == [3, 3]


def test_a_deleted_person_in_an_old_copy_of_a_slice_is_dropped(mlp, tmp_path) -> None:
    store, people = mlp.fit(tmp_path / "store"), some(mlp)
    old = (store / "records" / "0-0.sealed").read_bytes()
    s3t_ext.delete(store, [people[0, 0]])
    (store / "records" / "0-0.sealed").write_bytes(old)
    heal(store, progress=False)
    assert t.weights(store) == t.weights(mlp.fit(tmp_path / "fresh", t.without(mlp.table, {people[0, 0]})))
    (store / "records" / "0-0.sealed").write_bytes(old)
    with StoreFolder(store) as folder:
        for name in folder.trained(folder.ledger.slices()).values():
            folder.nodes.erase(name)
    with pytest.raises(StoreError, match="records/0-0 are not those of the ledger"):
        heal(store, progress=False)
    assert not t.weights(store)


def test_a_request_while_a_slice_is_healed_is_waited_for(mlp, tmp_path, monkeypatch) -> None:
    """It comes between the look at the records that are left and the entry in the ledger: they are looked at again."""
    store, people = mlp.fit(tmp_path / "store"), t.people_by_cell(mlp)[0, 0]
    s3t_ext.delete(store, people[:1])
    read, asked = healing.digest_of, []

    def overtaken(records):
        digest = read(records)
        if not asked:
            asked.append(s3t_ext.delete(store, people[1:2]))
        return digest

    monkeypatch.setattr(healing, "digest_of", overtaken)
    assert heal(store, progress=False)["dropped"] == 2
    assert t.weights(store) == t.weights(mlp.fit(tmp_path / "fresh", t.without(mlp.table, set(people[:2]))))
    assert not s3t_ext.status(store)["dirty"]


def test_a_request_at_any_point_of_healing_leaves_nothing_stale(mlp, ram, capsys) -> None:
    """Whoever is deleted while it goes on is out of all that is published, at once and in the end."""
    whole, people = mlp.fit(ram / "whole", **QUICK), some(mlp)
    s3t_ext.delete(whole, [people[0, 0], people[0, 1]])
    asked = {"of the slice that heals": people[0, 0], "of one that is clean": people[0, 2]}
    others = t.people_by_cell(mlp)
    asked["of the slice that heals"] = others[0, 0][1]
    counts: Counter[str] = Counter()
    for what, person in asked.items():
        gone = {people[0, 0], people[0, 1], person}
        expected = t.weights(mlp.fit(ram / what.replace(" ", "-"), t.without(mlp.table, gone), **QUICK))
        for nth in range(1 + len(counts), 1000, STRIDE):
            store = ram / "now" / "store"
            shutil.rmtree(store.parent, ignore_errors=True)
            copy(whole, store)
            served: list[set[str]] = []

            def overtake(point: str, store=store, person=person, served=served) -> None:
                s3t_ext.delete(store, [person])
                served.append(live(store))
                with s3t_ext.Service(store) as service:
                    service.predict(mlp.table.inputs[:1])

            with meeting(nth, overtake) as met:
                heal(store, progress=False)
            assert t.weights(store) == expected or len(met) < nth, met[nth - 1]
            if len(met) < nth:
                break
            counts[what] += 1
            assert files(store) == live(store)
            assert s3t_ext.status(store)["pending_erasure"] == 0
            with StoreFolder(store) as folder:
                dead = {n for r in folder.ledger.requests() for s in folder.ledger.receipt(r.request_id)["shards"]
                        for n in s["dead"]}  # fmt: skip
            assert not dead & (live(store) | served[0]), met[nth - 1]
    with capsys.disabled():
        print(f"\nrequests at points of healing: {dict(counts)}")
    assert min(counts.values()) > 40 // STRIDE


def copy(store, to) -> None:
    """Copy a store, with what belongs to it and lies outside its folder."""
    shutil.copytree(store, to)
    for kind in ("key", "anchor"):
        shutil.copy2(store.with_name(f"{store.name}.{kind}"), to.with_name(f"{to.name}.{kind}"))


class _Stopped(Exception):
    """The run ends here, as by an error; test_kills.py kills it."""


def test_a_healing_that_stopped_at_any_point_goes_on_to_the_same_bits(mlp, ram, capsys) -> None:
    whole, people = mlp.fit(ram / "whole", **QUICK), some(mlp)
    gone = {people[0, 0], people[1, 1]}
    s3t_ext.delete(whole, sorted(gone))
    before = t.weights(whole)
    expected = t.weights(mlp.fit(ram / "fresh", t.without(mlp.table, gone), **QUICK))

    def stop(point: str) -> None:
        raise _Stopped

    store, points = ram / "now" / "store", 0
    for nth in range(1, 1000, STRIDE):
        shutil.rmtree(store.parent, ignore_errors=True)
        copy(whole, store)
        with meeting(nth, stop) as met, suppress(_Stopped):
            heal(store, progress=False)
        assert before.items() <= t.weights(store).items() <= expected.items()
        heal(store, progress=False)
        assert t.weights(store) == expected
        assert files(store) == live(store)
        if len(met) < nth:
            break
        points += 1
    with capsys.disabled():
        print(f"\nhealings stopped: {points}")
    assert points > 40 // STRIDE


def test_a_service_that_missed_a_deletion_and_its_healing_serves_no_dead_node(mlp, store) -> None:
    """The same slices are clean as before: only a counter tells that they are others."""
    with s3t_ext.Service(store) as service:
        before = service.predict(mlp.table.inputs[:3])
        s3t_ext.delete(store, [some(mlp)[0, 0], some(mlp)[1, 0]])
        heal(store, progress=False)
        at_once = service.predict(mlp.table.inputs[:3])
        assert set(at_once.nodes) <= live(store)
        service.settle()
        answer = service.predict(mlp.table.inputs[:3])
    assert answer.depths == (3, 3)
    assert set(answer.nodes) <= live(store)
    assert not set(answer.nodes) & set(before.nodes)
    with s3t_ext.Service(store) as service:
        assert np.array_equal(service.predict(mlp.table.inputs[:3]).scores, answer.scores)


def test_services_see_each_pass_while_it_goes_on(mlp, tmp_path, monkeypatch) -> None:
    store, people = mlp.fit(tmp_path / "store", **QUICK), some(mlp)
    s3t_ext.delete(store, list(people.values()))
    train, seen = Trainer.train, []
    with s3t_ext.Service(store) as service:

        def looking(self, *args):
            count = train(self, *args)
            if seen:
                service.predict(mlp.table.inputs[:1])
            service.settle()
            seen.append(service.depths)
            return count

        monkeypatch.setattr(Trainer, "train", looking)
        heal(store, progress=False, settings=Settings(nodes_per_pass=1))
        service.settle()
        seen.append(service.depths)
    assert seen == sorted(seen, key=sum)
    assert len({sum(depths) for depths in seen}) > 4, "depth came back step by step"
    assert seen[-1] == (3, 3)


def test_healing_is_refused_while_another_process_writes(mlp, store) -> None:
    s3t_ext.delete(store, [some(mlp)[0, 0]])
    with exclusive(store), pytest.raises(StoreError, match="is writing to"):
        heal(store, progress=False)
    assert s3t_ext.status(store)["dirty"] == [[0, 0]]


def test_certificates_cover_what_was_healed(mlp, store) -> None:
    s3t_ext.delete(store, [some(mlp)[0, 0]], "r")
    heal(store, progress=False)
    report = s3t_ext.verify(store, mlp.table, certify=True, progress=False)
    assert (report["certified"], report["nodes"]) == (["r"], 14)
    with StoreFolder(store) as folder:
        erase_pending(folder)
