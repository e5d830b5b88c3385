"""What is held in memory: within its limit, loaded in the background, and at rest a function of the dirty slices."""

from __future__ import annotations

import itertools
import shutil
import time

import numpy as np
import pytest
import tiny as t
import torch
import untrained as u

import s3t_ext
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system.serve import Service


def least(store, ensemble: str = "best") -> int:
    """Give the least memory with which a store is served."""
    with pytest.raises(ValueError, match="memory: expected at least") as told:
        Service(store, memory=1, ensemble=ensemble)
    return int(str(told.value).split("at least ")[1].split()[0])


def used(service: Service) -> int:
    return sum(pool.nbytes for layer in service.network.layers.values() for pool in (layer.a, layer.b))


def copy(store, to):
    shutil.copytree(store, to / "store")
    for kind in ("key", "anchor"):
        shutil.copy2(outside(store, kind), outside(to / "store", kind))
    return to / "store"


def rest(service: Service, inputs: np.ndarray) -> tuple:
    """Give all that is held and answers."""
    nodes = frozenset((node, held.name) for node, held in service._pools.held.items())
    filled = [int((~layer.a.isnan().any(dim=(1, 2))).sum()) for layer in service.network.layers.values()]
    answer = service.predict(inputs)
    return nodes, tuple(filled), service._routed.served, answer.nodes, answer.depths, answer.scores.tobytes()


@pytest.mark.parametrize("placement", ["stack", "layers"])
def test_memory_has_a_limit_and_the_ideal_path_follows(mlp, tmp_path, placement, monkeypatch) -> None:
    store = mlp.fit(tmp_path / "store", placement=placement)
    cells, x = t.people_by_cell(mlp), mlp.table.inputs[:5]
    memory = least(store)
    monkeypatch.setattr(Service, "_wake", lambda self: None)
    with Service(store) as whole, Service(store, memory=memory) as service:
        assert used(service) <= memory < used(whole)
        assert service.depths == (3, 3)
        assert service.predict(x).scores.tobytes() == whole.predict(x).scores.tobytes()
        whole.delete([cells[0, 0][0], cells[1, 0][0]])
        if any(service.depths):
            service.predict(x)
        assert sum(service.depths) < 4, "both paths began with the slice, and there is room for one more beside them"
        service.settle()
        assert service.depths == whole.depths == (2, 2)
        assert used(service) <= memory
        assert service.predict(x).scores.tobytes() == whole.predict(x).scores.tobytes()


def test_a_thread_loads_the_ideal_path(mlp, store) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store, memory=least(store)) as service:
        service.delete([cells[0, 0][0]])
        service.delete([cells[1, 0][0]])
        until = time.monotonic() + 300
        while service.depths != (2, 2) and time.monotonic() < until:
            time.sleep(0.01)
        assert service.depths == (2, 2), "nobody asked, and nobody called settle"
        assert len(service.predict(mlp.table.inputs[:1]).nodes) == 4
    assert service._worker is None


@pytest.mark.parametrize(("ensemble", "more"), [("best", 0), ("best", 2), ("maximal", 0)])
def test_at_rest_the_state_is_a_function_of_the_dirty_slices(mlp, tmp_path, ensemble, more) -> None:
    """In whatever order and company the deletions came, a service holds and answers what a new one does."""
    store = mlp.fit(tmp_path / "store", slices=4, steps=1)
    cells, x = u.people_by_cell(store), mlp.table.inputs[:5]
    hit = [cells[0, 0][0], cells[1, 1][0], cells[0, 0][1]]
    slots = 11 + more
    memory, found = least(store, ensemble) + more * (least(store) // 11), set()
    for number, order in enumerate([*itertools.permutations(hit), None]):
        at = copy(store, tmp_path / f"run {number}")
        with Service(at, memory=memory, ensemble=ensemble) as service:
            if order is None:
                service.delete(hit)
            else:
                for turn, person in enumerate(order):
                    (service.delete if (number + turn) % 2 else lambda who, at=at: s3t_ext.delete(at, who))([person])
                    if (number + turn) % 3 == 0:
                        service.predict(x)
            service.settle()
            found.add(rest(service, x))
            assert len(service._pools.held) == (14 if ensemble == "maximal" else min(slots, 14))
        with Service(at, memory=memory, ensemble=ensemble) as service:
            found.add(rest(service, x))
    assert len(found) == 1
    assert next(iter(found))[4] == (3, 3)


def test_what_was_dropped_is_nan_and_what_is_loaded_anew_is_another(mlp, store, monkeypatch) -> None:
    """An answer is not released if a node in it left the memory while it was computed, even if it came back."""
    x = mlp.table.inputs[:3]
    with Service(store) as service:
        compute, answers = service._compute, []

        def overtaken(*args):
            if not answers:
                node = (0, service._routed.served[0].path)
                name, row = service._ids[node], service._pools.held[node].slot
                service._pools.drop(node)
                assert all(layer.a[row].isnan().all() for layer in service.network.layers.values())
            answers.append(compute(*args))
            if len(answers) == 1:
                service._pools.load(node, name, service.folder.nodes.get(name)[1])
                service._route()
            return answers[-1]

        right = service.predict(x)
        monkeypatch.setattr(service, "_compute", overtaken)
        released = service.predict(x)
    assert len(answers) == 2
    assert np.isnan(answers[0].scores).any()
    assert released.scores.tobytes() == right.scores.tobytes()


def test_all_maximal_nodes_answer_by_their_weights(mlp, store) -> None:
    x = mlp.table.inputs[:4]
    with Service(store, ensemble="maximal") as service:
        answer, served = service.predict(x), service._routed.served
        assert len(served) > 2
        assert len(answer.nodes) == 14, "of `subsets` every node lies under a maximal one"
        alone = []
        for row in service._routed.table:
            with torch.inference_mode(), service.network.routing.batch([4], row[None]):
                alone.append(service.network(torch.from_numpy(x)).softmax(-1))
        weights = [path.weight for path in served]
        assert sum(weights) == pytest.approx(1)
        total = torch.zeros_like(alone[0])
        for each, weight in zip(alone, weights, strict=True):
            total += each * weight
        assert answer.scores.tobytes() == total.numpy().tobytes()
        service.delete([t.people_by_cell(mlp)[0, 1][0]])
        assert all(1 not in path for shard, path, _ in service._routed.served if shard == 0)
        assert service.depths == (2, 3)


def test_a_damaged_node_does_not_stop_what_serves(mlp, store, recwarn) -> None:
    cells = t.people_by_cell(mlp)
    with Service(store, memory=least(store)) as service:
        away = set(service._ids.values()) - {held.name for held in service._pools.held.values()}
        for name in away:
            (store / "nodes" / f"{name}.sealed").write_bytes(b"damaged")
        service.delete([cells[0, 0][0]])
        with pytest.raises(StoreError):
            service.settle()
        assert service.depths[1] == 3
        assert len(service.predict(mlp.table.inputs[:1]).labels) == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [("memory", 1.5), ("memory", True), ("ensemble", "all"), ("combine", "mean"), ("prior", [0.5])],
)
def test_what_a_service_cannot_be_opened_with(store, argument, value) -> None:
    with pytest.raises(ValueError, match=argument):
        Service(store, **{argument: value})
