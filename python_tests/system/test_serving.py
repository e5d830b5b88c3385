"""Serving: masked at once, seen by every process, and never a dead node in a released answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny as t
import torch

import s3t_ext
from s3t_ext.ledger import LedgerError
from s3t_ext.models import attention
from s3t_ext.system import network
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.training import train


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


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_and_threads_change_no_answer(tiny, tmp_path, compiled, monkeypatch) -> None:
    """The ViT's attention (17 tokens, head size 8) is one that torch's threads move on some processors where no kernel
    of ours does it; on all of them torch has one thread inside."""
    if not compiled:
        monkeypatch.setattr(attention, "attends", lambda x: False)
    seen = set()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with Service(tiny.fit(tmp_path / "store")) as service:
            first = next(iter(service.network.layers.values()))
            first.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
            whole = service.predict(tiny.table.inputs[:9]).scores
            for rows in (slice(0, 1), slice(4, 5), slice(2, 7)):
                assert np.array_equal(service.predict(tiny.table.inputs[rows]).scores, whole[rows])
            torch.set_num_threads(1)
            assert np.array_equal(service.predict(tiny.table.inputs[:9]).scores, whole)
            assert torch.get_num_threads() == 1, "the caller's own number is as it was"
        assert seen == {1}
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
    person = t.people_by_cell(mlp)[0, 0][0]
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


def test_dead_adapters_in_memory_are_nan_and_unread(mlp, store) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store) as service:
        service.delete([cells[0, 2][0]])
        pools = [layer.a for layer in service.network.layers.values()]
        assert all(pool.isnan().any() for pool in pools)
        assert np.isfinite(service.predict(mlp.table.inputs).scores).all()


def test_dead_weights_go_from_the_memory_of_every_process(mlp, store) -> None:
    with Service(store) as service:
        s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])  # by somebody else
        service.predict(mlp.table.inputs[:1])
        layer = next(iter(service.network.layers.values()))
        assert int(layer.a.isnan().any(dim=(1, 2)).sum()) == 4 == 14 - len(service._ids)


def test_a_second_process_sees_the_deletion(mlp, store) -> None:
    person = t.people_by_cell(mlp)[0, 0][0]
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
    person = t.people_by_cell(mlp)[0, 0][0]
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
    cells = t.people_by_cell(mlp)
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


def test_a_refused_request_changes_nothing_that_is_served(mlp, store) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store) as service:
        service.delete([cells[0, 0][0]], "r1")
        with pytest.raises(ValueError, match="request_id"):
            service.delete([cells[1, 1][0]], "r1")
        assert service.depths == (2, 3)
        service.delete([cells[1, 1][0]], "r2")
        assert service.depths == (2, 2)
        assert not set(service._pools.held) - set(service._ids), "every dead adapter was overwritten"


def test_a_request_waits_for_no_thread_that_reads_the_books(mlp, store, monkeypatch) -> None:
    cells = t.people_by_cell(mlp)
    reading, go_on = threading.Event(), threading.Event()
    with Service(store) as service:
        slices = service.folder.ledger.slices

        def slow():
            found = slices()
            if threading.current_thread() is asker:
                reading.set()
                go_on.wait(5)
            return found

        monkeypatch.setattr(service.folder.ledger, "slices", slow)
        s3t_ext.delete(store, [cells[0, 0][0]])  # by somebody else: the next request reads the books
        asker = threading.Thread(target=service.predict, args=[mlp.table.inputs[:1]])
        asker.start()
        assert reading.wait(60)
        service.acknowledge([cells[1, 1][0]])
        assert asker.is_alive(), "it waited until the books were read"
        assert service.depths == (2, 2)
        go_on.set()
        asker.join()
        assert service.depths == (2, 2)


def test_an_acknowledgement_masks_all_that_was_acknowledged(mlp, store) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store) as service:
        s3t_ext.delete(store, [cells[0, 0][0]])  # by somebody else, and no request has read the epoch word since
        service.acknowledge([cells[1, 1][0]])
        assert service.depths == (2, 2)


def replace_epoch(store) -> None:
    shutil.copy(store / "epoch", store / "copy")
    (store / "copy").replace(store / "epoch")


def replace_store(store) -> None:
    shutil.copytree(store.rename(store.with_name("moved")), store)


@pytest.mark.parametrize("replace", [replace_epoch, replace_store])
def test_a_store_replaced_under_a_service_is_refused(mlp, store, replace) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store) as service:
        service.predict(mlp.table.inputs[:1])
        replace(store)
        s3t_ext.delete(store, [cells[0, 0][0]])  # by somebody else, who raises the new file
        for _ in range(2):
            with pytest.raises(Refused, match=r"opened anew: .*epoch .* moved or replaced under the service"):
                service.predict(mlp.table.inputs[:1])
            with pytest.raises(LedgerError, match="moved or replaced under the service; open it again"):
                service.delete([cells[1, 1][0]])
    with Service(store) as service:
        assert service.depths == (2, 3)


def test_a_store_replaced_while_an_answer_is_computed_is_refused(mlp, store, monkeypatch) -> None:
    with Service(store) as service:
        compute = service._compute
        monkeypatch.setattr(service, "_compute", lambda *args: (compute(*args), replace_epoch(store))[0])
        with pytest.raises(Refused, match="moved or replaced"):
            service.predict(mlp.table.inputs[:1])


def test_after_a_failure_of_the_ledger_nothing_is_answered(mlp, store, monkeypatch) -> None:
    cells, x = t.people_by_cell(mlp), mlp.table.inputs[:1]

    def fail(*_):
        raise LedgerError("disk I/O error")

    with Service(store) as writing, Service(store) as reading:
        with monkeypatch.context() as broken:
            broken.setattr(writing.folder.ledger, "delete", fail)
            with pytest.raises(LedgerError, match="disk I/O error"):
                writing.delete([cells[0, 0][0]])
        s3t_ext.delete(store, [cells[0, 0][0]])
        with monkeypatch.context() as broken:
            broken.setattr(reading.folder.ledger, "slices", fail)
            with pytest.raises(Refused, match="disk I/O error"):
                reading.predict(x)
        for service in (writing, reading):
            with pytest.raises(Refused, match="nothing is answered until the service is opened anew: disk I/O error"):
                service.predict(x)
            with pytest.raises(LedgerError, match="disk I/O error"):
                service.delete([cells[0, 0][0]])


def test_all_dead_refuses(mlp, store) -> None:
    with Service(store) as service:
        service.delete([people[0] for people in t.people_by_cell(mlp).values()])
        assert service.depths == (0, 0)
        with pytest.raises(Refused, match="every shard is dead"):
            service.predict(mlp.table.inputs[:1])


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 5)), np.zeros((0, 6)), np.full((1, 6), np.nan)], ids=["shape", "none", "nan"]
)
def test_bad_inputs_are_refused(store, bad) -> None:
    with Service(store) as service, pytest.raises(ValueError, match="inputs"):
        service.predict(bad)
