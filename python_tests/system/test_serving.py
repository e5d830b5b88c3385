"""Serving and deletion: masked at once, durable, seen by every process, and never a dead node in a released answer."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny as t
import torch

import s3t_ext
from s3t_ext.ledger.identity import Key
from s3t_ext.store.files import StoreError, exclusive
from s3t_ext.system import network, serve, train
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.ingest import lay_out
from s3t_ext.system.serve import Refused, Service


def people_by_cell(tiny: t.Tiny) -> dict[tuple[int, int], list[str]]:
    layout = lay_out(tiny.table, Key(t.KEY), 2, 3)
    return {cell: sorted({s[0] for s in records.subjects}) for cell, records in layout.slices.items()}


def test_answers_are_those_of_each_shards_own_model(mlp, store) -> None:
    """One pass over all shards gives, bit for bit, what each shard's path gives alone, and their weighted mean."""
    with Service(store) as service:
        x = mlp.table.inputs[:7]
        answer = service.predict(x)
        alone = []
        for shard in range(2):
            table = torch.full_like(service.network.routing.table, -1)
            table[shard] = service.network.routing.table[shard]
            with torch.inference_mode(), service.network.routing.batch([7 * (shard == s) for s in range(2)], table):
                alone.append(service.network(torch.from_numpy(x)).softmax(-1))
        assert torch.equal(torch.from_numpy(answer.scores), alone[0] * 0.5 + alone[1] * 0.5)
        assert answer.depths == (3, 3)
        assert np.array_equal(service.predict(x[2:3]).scores, answer.scores[2:3]), "a batch changes no answer"


def test_batch_and_threads_change_no_answer(tiny, tmp_path) -> None:
    """The ViT has an attention (17 tokens, head size 8) whose bits torch's own threads would move."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with Service(tiny.fit(tmp_path / "store")) as service:
            whole = service.predict(tiny.table.inputs[:9]).scores
            for rows in (slice(0, 1), slice(4, 5), slice(2, 7)):
                assert np.array_equal(service.predict(tiny.table.inputs[rows]).scores, whole[rows])
            torch.set_num_threads(1)
            assert np.array_equal(service.predict(tiny.table.inputs[:9]).scores, whole)
            assert torch.get_num_threads() == 1, "the caller's own number is as it was"
    finally:
        torch.set_num_threads(before)


def test_packed_layers_train_and_serve_the_bits_of_plain_ones(tiny, tmp_path, monkeypatch) -> None:
    store, x = tiny.fit(tmp_path / "store"), tiny.table.inputs[:5]

    def packs(model) -> list[tuple[bool, bool]]:
        layers = [m for m in model.modules() if isinstance(m, s3t_ext.MaskedLoRALinear)]
        return [(m.packed is not None, m.packed is not None and m.packed.turned is not None) for m in layers]

    with Service(store) as service:
        assert set(packs(service.network)) == {(True, False)}
        scores = service.predict(x).scores
    with StoreFolder(store) as folder:
        assert packs(train.Trainer(folder).network)[1:] == [(True, True)] * len(service.network.layers)
    monkeypatch.setattr(network, "pack_layers", lambda model, backward: model)
    assert t.weights(tiny.fit(tmp_path / "plain")) == t.weights(store)
    with Service(store) as service:
        assert set(packs(service.network)) == {(False, False)}
        assert np.array_equal(service.predict(x).scores, scores)


def test_combinations_and_depth_weights(mlp, store) -> None:
    person = people_by_cell(mlp)[0, 0][0]
    with Service(store) as service:
        service.delete([person])
        assert service.depths == (2, 3)
        with torch.inference_mode(), service.network.routing.batch([5, 5]):
            logits = service.network(torch.from_numpy(mlp.table.inputs[:5]).repeat(2, 1)).view(2, 5, 3)
    weights = torch.tensor([2 / 5, 3 / 5])[:, None, None]
    votes = torch.nn.functional.one_hot(logits.argmax(-1), 3).float()
    for combine, each in (("probabilities", logits.softmax(-1)), ("logits", logits), ("vote", votes)):
        with Service(store, combine) as service:
            got = torch.from_numpy(service.predict(mlp.table.inputs[:5]).scores)
            torch.testing.assert_close(got, (each * weights).sum(0))


def test_deletion_masks_records_acknowledges_then_erases(mlp, store, monkeypatch) -> None:
    """The order of rule 14, observed from inside."""
    cells = people_by_cell(mlp)
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


def test_deleted_records_and_weights_leave_no_byte(mlp, store) -> None:
    person = people_by_cell(mlp)[0, 1][0]
    mine = [mlp.table.inputs[i].tobytes() for i, names in enumerate(mlp.table.subjects) if names == (person,)]

    def found() -> list[str]:
        canaries = (*mine, person.encode() + b'"')
        files = (p for p in store.rglob("*") if p.is_file())
        return [p.name for p in files if any(canary in p.read_bytes() for canary in canaries)]

    assert found()
    with StoreFolder(store) as folder:
        doomed = [b.read_bytes()[-64:] for b in (folder.path / "nodes").glob("*.safetensors")]
    s3t_ext.delete(store, [person])
    assert not found()
    left = b"".join(p.read_bytes() for p in (store / "nodes").glob("*"))
    assert sum(tail in left for tail in doomed) < len(doomed)


def test_dead_adapters_in_memory_are_nan_and_unread(mlp, store) -> None:
    cells = people_by_cell(mlp)
    with Service(store) as service:
        service.delete([cells[0, 2][0]])
        pools = [layer.a for layer in service.network.layers.values()]
        assert all(pool.isnan().any() for pool in pools)
        assert np.isfinite(service.predict(mlp.table.inputs).scores).all()


def test_a_second_process_sees_the_deletion(mlp, store) -> None:
    person = people_by_cell(mlp)[0, 0][0]
    with Service(store) as service:
        first = service.predict(mlp.table.inputs[:3])
        subprocess.run(
            [sys.executable, "-m", "s3t_ext.cli.main", "delete", str(store), person],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        second = service.predict(mlp.table.inputs[:3])
    assert (first.depths, second.depths) == ((3, 3), (2, 3))
    assert second.epoch > first.epoch
    with StoreFolder(store) as folder:
        assert set(second.nodes) <= set(folder.trained(folder.ledger.slices()).values())


def test_an_answer_overtaken_by_a_deletion_is_not_released(mlp, store, monkeypatch) -> None:
    person = people_by_cell(mlp)[0, 0][0]
    with Service(store) as service:
        compute, calls = service._compute, []

        def overtaken(*args):
            answer = compute(*args)
            if not calls:
                s3t_ext.delete(store, [person])  # by somebody else, between computation and release
            calls.append(answer)
            return answer

        monkeypatch.setattr(service, "_compute", overtaken)
        released = service.predict(mlp.table.inputs[:3])
    assert len(calls) == 2
    assert calls[0].depths == (3, 3)
    assert released is calls[1]
    assert released.depths == (2, 3)


def test_without_the_release_check_a_stale_answer_gets_out(mlp, store, monkeypatch) -> None:
    """The test above, with its guard taken out: it must see the stale answer."""
    monkeypatch.setattr(Service, "refresh", lambda self: None)
    with pytest.raises(AssertionError):
        test_an_answer_overtaken_by_a_deletion_is_not_released(mlp, store, monkeypatch)


def test_threads_predict_while_people_are_deleted(mlp, store) -> None:
    """No released answer uses a node that was dead when its deletion was acknowledged."""
    cells = people_by_cell(mlp)
    stop, errors, released = threading.Event(), [], []
    acknowledged: list[set[str]] = [set()]

    def ask() -> None:
        while not stop.is_set():
            dead_before = acknowledged[-1]
            try:
                answer = service.predict(mlp.table.inputs[:4])
            except Refused:
                return
            released.append(answer.nodes)
            if dead_before & set(answer.nodes):
                errors.append(answer)

    with Service(store) as service:
        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        for cell in ((0, 0), (1, 2), (0, 1), (1, 1), (0, 2)):
            receipt = service.delete([cells[cell][0]])
            dead = {name for shard in receipt["shards"] for name in shard["dead"]}
            acknowledged.append(acknowledged[-1] | dead)
        stop.set()
        for asker in askers:
            asker.join()
        assert service.depths == (0, 1)
    assert released
    assert not errors


def test_all_dead_refuses(mlp, store) -> None:
    with Service(store) as service:
        service.delete([people[0] for people in people_by_cell(mlp).values()])
        assert service.depths == (0, 0)
        with pytest.raises(Refused, match="every shard is dead"):
            service.predict(mlp.table.inputs[:1])


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 5)), np.zeros((0, 6)), np.full((1, 6), np.nan)], ids=["shape", "none", "nan"]
)
def test_bad_inputs_are_refused(store, bad) -> None:
    with Service(store) as service, pytest.raises(ValueError, match="inputs"):
        service.predict(bad)


# --- receipts --------------------------------------------------------------------------------------------------------


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
    person = people_by_cell(mlp)[0, 0][0]
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
    person = people_by_cell(mlp)[0, 0][0]
    before = s3t_ext.status(store)
    told = s3t_ext.delete(store, [person], dry_run=True)
    assert (told["depths_before"], told["depths_after"]) == ([3, 3], [2, 3])
    assert s3t_ext.status(store) == before


def test_a_record_of_two_people_goes_with_either(mlp, tmp_path) -> None:
    table = s3t_ext.system.ingest.Table(
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
    people = [people[0] for people in list(people_by_cell(mlp).values())[:3]]
    states = []
    for number, batches in enumerate(([people], [[p] for p in people], [[p] for p in reversed(people * 2)])):
        store = mlp.fit(tmp_path / str(number))
        for batch in batches:
            s3t_ext.delete(store, batch)
        status = s3t_ext.status(store)
        states.append((t.weights(store), status["depths"], status["dirty"], status["nodes"]))
    assert states[0] == states[1] == states[2]


# --- training and deletion meet --------------------------------------------------------------------------------------


def test_a_deleted_subject_that_comes_back_is_dropped(mlp, store) -> None:
    person = people_by_cell(mlp)[0, 0][0]
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


def test_a_node_that_a_deletion_makes_stale_while_it_trains_is_not_published(mlp, tmp_path, monkeypatch) -> None:
    from s3t_ext.system import train

    person = people_by_cell(mlp)[0, 0][0]
    publish, store = train.Trainer._publish, tmp_path / "store"
    stale: list[int] = []

    def overtaken(self, weights, ids):
        if not stale:
            s3t_ext.delete(store, [person])
        stale.append(sum(0 in path and shard == 0 for shard, path in weights))
        return publish(self, weights, ids)

    monkeypatch.setattr(train.Trainer, "_publish", overtaken)
    mlp.fit(store)
    assert stale[0], "the deletion met a node in training"
    assert len(list((store / "nodes").glob("*.json"))) == len(t.weights(store))
    assert not any(shard == 0 and 0 in path for shard, path in t.weights(store))
    assert s3t_ext.status(store)["pending_erasure"] == 0


def test_a_node_published_in_the_very_moment_of_its_deletion_is_erased(mlp, tmp_path, monkeypatch) -> None:
    """The deletion falls between the last look at the ledger and the write: the blob must not stay behind."""
    from s3t_ext.store.nodes import NodeStore

    person = people_by_cell(mlp)[0, 0][0]
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
    assert len(list((store / "nodes").glob("*.safetensors"))) == 7 + 3


def test_two_writers_are_refused_and_deletion_still_acknowledged(mlp, store) -> None:
    with exclusive(store):
        with pytest.raises(StoreError, match="is writing to"):
            mlp.fit(store)
        s3t_ext.delete(store, [people_by_cell(mlp)[0, 0][0]])
        assert s3t_ext.status(store)["pending_erasure"] == 1
    mlp.fit(store)
    assert s3t_ext.status(store)["pending_erasure"] == 0


def test_two_deleters_at_once_leave_nothing_unerased(mlp, store, monkeypatch) -> None:
    """The second finds the lock taken and goes; the first looks again after it let go."""
    from s3t_ext.system import unlearn

    one, two = (people_by_cell(mlp)[cell][0] for cell in ((0, 0), (1, 1)))
    erase, calls = unlearn.erase, []

    def slow(folder):
        erase(folder)
        if not calls:
            calls.append(1)
            s3t_ext.delete(store, [two])  # while the lock is held

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
    cells = people_by_cell(mlp)
    (store / "records" / "0-0.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="acknowledged, but not erased yet"):
        receipt = s3t_ext.delete(store, [cells[0, 0][0]], "r1")
    assert receipt["subjects"][0]["status"] == "deleted"
    with pytest.warns(UserWarning, match="0-0"):
        s3t_ext.delete(store, [cells[1, 1][0]])
    with StoreFolder(store) as folder:
        assert [r.request_id for r in folder.ledger.unerased()] == ["r1"]
        assert all(cells[1, 1][0] not in names for names in folder.records.get(1, 1).subjects)


def test_a_refused_request_changes_nothing_that_is_served(mlp, store) -> None:
    cells = people_by_cell(mlp)
    with Service(store) as service:
        service.delete([cells[0, 0][0]], "r1")
        with pytest.raises(ValueError, match="request_id"):
            service.delete([cells[1, 1][0]], "r1")
        assert service.depths == (2, 3)
        service.delete([cells[1, 1][0]], "r2")
        assert service.depths == (2, 2)
        assert not set(service._slots) - set(service._ids), "every dead adapter was overwritten"


def test_dead_weights_go_from_the_memory_of_every_process(mlp, store) -> None:
    with Service(store) as service:
        s3t_ext.delete(store, [people_by_cell(mlp)[0, 0][0]])  # by somebody else
        service.predict(mlp.table.inputs[:1])
        layer = next(iter(service.network.layers.values()))
        assert int(layer.a.isnan().any(dim=(1, 2)).sum()) == 4 == 14 - len(service._ids)


def test_subjects_in_memory_are_normalised(mlp, tmp_path) -> None:
    from dataclasses import replace

    shouted = replace(mlp.table, subjects=[(names[0].upper() + " ",) for names in mlp.table.subjects])
    store = mlp.fit(tmp_path / "store", shouted)
    assert s3t_ext.delete(store, ["Person  3"])["subjects"][0]["status"] == "deleted"
    assert t.weights(store).items() <= t.weights(mlp.fit(tmp_path / "other")).items()


@pytest.mark.parametrize("wrong", ["strings", "labels", "lengths", "nan", "shape", "empty"])
def test_bad_tables_in_memory_are_refused(mlp, tmp_path, wrong) -> None:
    table = mlp.table
    x = table.inputs.copy()
    if wrong == "nan":
        x[3, 0] = np.nan
    bad = {
        "strings": s3t_ext.system.ingest.Table([names[0] for names in table.subjects], x, table.labels),
        "labels": s3t_ext.system.ingest.Table(table.subjects, x, table.labels + 2),
        "lengths": s3t_ext.system.ingest.Table(table.subjects, x[:-1], table.labels),
        "nan": s3t_ext.system.ingest.Table(table.subjects, x, table.labels),
        "shape": s3t_ext.system.ingest.Table(table.subjects, x[:, :-1], table.labels),
        "empty": s3t_ext.system.ingest.Table([], x[:0], table.labels[:0]),
    }[wrong]
    with pytest.raises(ValueError, match="table"):
        mlp.fit(tmp_path / "store", bad)
    assert not (tmp_path / "store").exists()


def test_a_string_of_subjects_is_refused(store) -> None:
    for call in (s3t_ext.delete, Service(store).delete):
        with pytest.raises(ValueError, match="subjects"):
            call(*([store, "person 1"] if call is s3t_ext.delete else ["person 1"]))


def test_a_deleted_co_subject_that_comes_back_is_dropped(mlp, tmp_path) -> None:
    table = s3t_ext.system.ingest.Table(
        [(*n, "witness") if i == 0 else n for i, n in enumerate(mlp.table.subjects)],
        mlp.table.inputs,
        mlp.table.labels,
    )
    store = mlp.fit(tmp_path / "store", table)
    s3t_ext.delete(store, ["witness"])
    config = s3t_ext.Config(shards=2, slices=3, steps=4, batch=4, rank=3)
    assert s3t_ext.fit(store, table, mlp.schema, mlp.base, config, progress=False)["dropped"] == 1
    assert s3t_ext.verify(store, table, progress=False)["mismatched"] == 0
