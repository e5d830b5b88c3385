"""Training on a Ray cluster of two local workers: the bits of one machine, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from tiny import Tiny, weights

from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.settings import Settings
from s3t_ext.system.training import executor
from s3t_ext.system.training.train import Trainer
from s3t_ext.system.unlearn import delete, writing

RAY = Settings(executor="ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """Two workers of one processor each, on this machine; they import the installed package, not the checkout's."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("driver"))  # Ray puts the driver's folder on its workers' path
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    os.chdir(here)
    yield
    ray.shutdown()


def untrained(tiny: Tiny, store: Path, **config) -> Path:
    """Make a store in which no node is trained."""
    with mock.patch.object(Trainer, "train", return_value=0):
        return tiny.fit(store, **config)


def train(store: Path, **more) -> int:
    settings = Settings(executor="ray", **more)
    with StoreFolder(store) as folder, writing(folder), executor.trainer_for(folder, settings) as trainer:
        return trainer.train(folder.identities(folder.ledger.slices()), progress=False)


def test_a_cluster_trains_to_the_bits_of_one_machine(cluster, mlp: Tiny, tmp_path: Path) -> None:
    there, here = untrained(mlp, tmp_path / "there"), untrained(mlp, tmp_path / "here")
    count = train(there)
    with StoreFolder(here) as folder, writing(folder):
        assert Trainer(folder).train(folder.identities(folder.ledger.slices()), progress=False) == count > 0
    assert weights(there) == weights(here)
    assert train(there) == 0  # nothing is left to do


def test_a_worker_does_not_open_the_ledger(mlp: Tiny, tmp_path: Path, monkeypatch) -> None:
    store = untrained(mlp, tmp_path / "store")
    with StoreFolder(store) as folder:
        slices = dict(folder.ledger.slices())
        ids = folder.identities(slices)
    nodes = [node for node in ids if len(node[1]) == 1]

    def refused(_) -> None:
        raise AssertionError("the ledger belongs to the machine of the driver")

    monkeypatch.setattr(StoreFolder, "ledger", property(refused))
    sealed, _ = executor.remote_job(str(store), nodes, ids, slices, Settings())
    assert set(sealed) == set(nodes)


def workers() -> list[int]:
    """List the processes that train a job at this moment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                line = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::remote_job"):
                found.append(int(process.name))
    return found


def test_a_killed_worker_is_replaced_and_ends_with_the_same_bits(cluster, mlp: Tiny, tmp_path: Path) -> None:
    there, here = untrained(mlp, tmp_path / "there", steps=150), untrained(mlp, tmp_path / "here", steps=150)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not over.is_set():
            for worker in workers()[:1]:
                if worker not in killed:
                    time.sleep(0.3)  # it has begun
                    with suppress(ProcessLookupError):  # and may have ended
                        os.kill(worker, signal.SIGKILL)
                        killed.append(worker)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        count = train(there)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    with StoreFolder(here) as folder, writing(folder):
        assert Trainer(folder).train(folder.identities(folder.ledger.slices()), progress=False) == count
    assert weights(there) == weights(here)
    print(f"{len(killed)} workers killed, {count} nodes with the same bits")


def test_what_a_request_killed_meanwhile_is_not_stored(cluster, mlp: Tiny, tmp_path: Path, monkeypatch) -> None:
    store = untrained(mlp, tmp_path / "store")
    person = mlp.table.subjects[0][0]
    publish, asked = executor.publish, []

    def overtaken(folder, *rest):
        if not asked:
            asked.append(delete(store, [person]))  # its sender cannot erase: we hold the lock
        return publish(folder, *rest)

    monkeypatch.setattr(executor, "publish", overtaken)
    train(store)
    with StoreFolder(store) as folder:
        dirty = folder.ledger.dirty()
        live = folder.trained(folder.ledger.slices())
        assert dirty
        assert live
        stored = {path.name.partition(".")[0] for path in (store / "nodes").iterdir()}
        assert stored == set(live.values())
        assert not folder.ledger.unerased()


def test_fit_and_heal_on_a_cluster(cluster, mlp: Tiny, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    mlp.fit(there, settings=RAY)
    mlp.fit(here)
    assert weights(there) == weights(here)
    person = mlp.table.subjects[0][0]
    for store, settings in ((there, RAY), (here, Settings())):
        delete(store, [person])
        healed = heal(store, settings=settings, progress=False)
        assert healed["nodes"] > 0 == healed["left"]["nodes"]
    assert weights(there) == weights(here)


def test_what_training_refuses_is_told_as_on_one_machine(cluster, mlp: Tiny, tmp_path: Path) -> None:
    store = untrained(mlp, tmp_path / "store", lr=1e30)
    with pytest.raises(ValueError, match="lr: training diverged"):
        train(store)
    with pytest.raises(ValueError, match="cpus: expected 1 to the cluster's 2 processors for a job, got 3"):
        train(store, cpus=3)


def test_without_ray_it_says_what_to_install(mlp: Tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"executor: ray is not installed; pip install 's3t-ext\[ray\]'"):
        train(untrained(mlp, tmp_path / "store"))


def test_a_path_trained_in_two_places_is_not_compared(mlp: Tiny, tmp_path: Path, monkeypatch) -> None:
    from s3t_ext.system.verify import verify

    store = untrained(mlp, tmp_path / "store")
    with StoreFolder(store) as folder, writing(folder):
        wanted = folder.identities(folder.ledger.slices())
        trainer = Trainer(folder)
        monkeypatch.setitem(trainer.provenance, "cpu", "another")
        trainer.train({node: name for node, name in wanted.items() if len(node[1]) == 1}, progress=False)
        Trainer(folder).train(wanted, progress=False)
    report = verify(store, mlp.table, "all", progress=False)
    assert report["nodes"] == 0
    assert report["incomparable"] == len(wanted)
    assert "above it cpu: trained with another" in report["reason"]
