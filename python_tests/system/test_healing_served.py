"""A service beside healing: what is trained anew answers without a stop, and what died never answers again."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import tiny as t
from test_residency import least, rest, used

import s3t_ext
from s3t_ext.store.files import StoreError
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.settings import Settings
from s3t_ext.system.training.train import Trainer


def some(mlp, cell=(0, 0)) -> str:
    return t.people_by_cell(mlp)[cell][0]


def until(reached, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.002)


def live(store) -> set[str]:
    with StoreFolder(store) as folder:
        return set(folder.trained(folder.ledger.slices()).values())


@pytest.mark.parametrize("limit", [False, True])
def test_what_is_healed_answers_without_a_stop(mlp, store, limit) -> None:
    x, stop = mlp.table.inputs[:3], threading.Event()
    released, errors = [], []

    def ask() -> None:
        try:
            while not stop.is_set():
                released.append(service.predict(x))
        except BaseException as error:
            errors.append(error)

    with Service(store, memory=least(store) if limit else None) as service:
        dead = set(service.predict(x).nodes)
        receipt = service.delete([some(mlp), some(mlp, (1, 2))])
        dead &= {name for shard in receipt["shards"] for name in shard["dead"]}
        asker = threading.Thread(target=ask)
        asker.start()
        report = heal(store, progress=False)
        until(lambda: service.depths == (3, 3))
        until(lambda: released[-1].depths == (3, 3))
        stop.set()
        asker.join()
        assert not errors
        assert report["nodes"] == 8
        assert dead
        assert not any(dead & set(answer.nodes) for answer in released)
        assert not service._pools.held.keys() - service._ids.keys()
        service.settle()
        held = rest(service, x)
    with Service(store, memory=least(store) if limit else None) as fresh:
        assert rest(fresh, x) == held, "at rest it is what a new service is"
    assert set(held[3]) <= live(store)


def test_an_answer_overtaken_by_a_deletion_and_its_healing_is_not_released(mlp, store, monkeypatch) -> None:
    x, answers = mlp.table.inputs[:3], []
    with Service(store) as service:
        compute = service._compute

        def overtaken(*args):
            answers.append(compute(*args))
            if len(answers) == 1:
                s3t_ext.delete(store, [some(mlp)])
                other = threading.Thread(target=heal, args=[store], kwargs={"progress": False})
                other.start()
                other.join()
            return answers[-1]

        monkeypatch.setattr(service, "_compute", overtaken)
        released = service.predict(x)
        assert len(answers) > 1
        assert set(released.nodes) <= live(store)


def test_a_node_that_dies_while_it_is_loaded_is_not_served(mlp, store, monkeypatch) -> None:
    x = mlp.table.inputs[:3]
    s3t_ext.delete(store, [some(mlp)])
    with Service(store) as service:
        heal(store, progress=False)
        get, calls = service.folder.nodes.get, []

        def slow(name):
            found = get(name)
            calls.append(name)
            if len(calls) == 2:
                s3t_ext.delete(store, [some(mlp, (0, 1))])
            return found

        monkeypatch.setattr(service.folder.nodes, "get", slow)
        service.settle()
        assert service.depths == (2, 3)
        assert set(service.predict(x).nodes) <= live(store)
        held = rest(service, x)
    with Service(store) as fresh:
        assert rest(fresh, x) == held


def test_a_mask_without_a_record_outlives_healing_of_others(mlp, store, monkeypatch) -> None:
    """A request that could not be recorded stays masked, whatever else is loaded."""
    with Service(store) as service:
        with monkeypatch.context() as broken:
            broken.setattr("s3t_ext.system.serve.delete_from", lambda *_: (_ for _ in ()).throw(StoreError("no disk")))
            with pytest.raises(StoreError, match="no disk"):
                service.acknowledge([some(mlp, (1, 1))])
        assert service.depths == (3, 2)
        s3t_ext.delete(store, [some(mlp)])
        heal(store, progress=False)
        service.settle()
        assert service.depths == (3, 2)
    with Service(store) as service:
        assert service.depths == (3, 3)


def others(mlp):
    """Make a table of other people."""
    table = t.reorder(mlp.table, list(range(30)))
    return type(table)([(f"new {names[0]}",) for names in table.subjects], table.inputs[::-1].copy(), table.labels)


def test_new_shards_are_served_as_their_nodes_come(mlp, store) -> None:
    x, table = mlp.table.inputs[:3], others(mlp)
    with Service(store) as service, Service(store, memory=least(store)) as small:
        bytes_before = used(small)
        before, seen = service.predict(x), []
        publish = Trainer._publish

        def watched(self, *args):
            seen.append(service.predict(x).depths)
            return publish(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_publish", watched)
            s3t_ext.fit(
                store,
                table,
                mlp.schema,
                mlp.base,
                service.config,
                grow=True,
                settings=Settings(nodes_per_pass=3),
                progress=False,
            )
        until(lambda: service.predict(x).depths == (3, 3, 3, 3))
        assert seen[0][:2] == (3, 3), "the old ones answer all the while"
        after = service.predict(x)
        assert set(before.nodes) < set(after.nodes)
        with pytest.warns(UserWarning, match="not all shards are served: memory: expected at least"):
            small.settle()
        assert used(small) == bytes_before
        assert sum(small.depths) > 0
        assert np.isfinite(small.predict(x).scores).all()
        held = rest(small, x)
        small.settle()
        assert rest(small, x) == held
        service.delete(["new person 1"])
        assert sum(service.predict(x).depths) < 12
        service.settle()
        kept = rest(service, x)
    with Service(store) as fresh:
        assert rest(fresh, x) == kept


def test_nothing_answers_when_all_is_dead_until_it_is_healed(mlp, store) -> None:
    x = mlp.table.inputs[:1]
    with Service(store) as service:
        service.delete([people[0] for people in t.people_by_cell(mlp).values()])
        with pytest.raises(Refused, match="every shard is dead"):
            service.predict(x)
        heal(store, progress=False)
        with suppress(Refused):  # it sees that it is behind, and loads; it may have begun to
            service.predict(x)
        until(lambda: service.depths == (3, 3))
        assert len(service.predict(x).nodes) == 6


def test_a_slice_whose_digest_comes_back_serves_again(tmp_path) -> None:
    """B asks after A, with whom B's only record went: the slice is dirty once more, and heals to what it was."""
    mlp = t.make(tmp_path)
    subjects = [("both a", "both b"), *mlp.table.subjects[1:]]
    table = type(mlp.table)(subjects, mlp.table.inputs, mlp.table.labels)
    store = mlp.fit(tmp_path / "store", table)
    with Service(store) as service:
        service.delete(["both a"])
        heal(store, progress=False)
        service.settle()
        digests = service.folder.ledger.slices()
        service.delete(["both b"])
        heal(store, progress=False)
        assert service.folder.ledger.slices() == digests
        service.settle()
        held = rest(service, mlp.table.inputs[:3])
    with Service(store) as fresh:
        assert rest(fresh, mlp.table.inputs[:3]) == held
