"""Who trains a store's nodes: this process, or a Ray cluster by the same jobs, to the same bits.

::

    driver, on the machine of the ledger          workers, anywhere
      ids and digests of the slices  ------------>  read base, records and ancestors in the store's folder
      reads the ledger, stores what               train one job: nodes of one depth, of some of the shards
      is still alive                 <------------  send the weights back, sealed by the store key

The folder lies on a file system that all machines mount at one path, and the store key is found as on the driver's
machine: beside the folder, in ``S3T_KEY_FOLDER`` or in ``S3T_STORE_KEY``. The ledger is SQLite in its write-ahead mode,
whose locks and shared memory do not reach over a network: the machine that runs the driver also serves deletions, and
no worker opens the ledger. Weights in the object store are sealed, for Ray keeps objects in shared memory, on disk too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from s3t_ext.plan import Node
from s3t_ext.store.crypt import seal, unseal
from s3t_ext.store.files import StoreError
from s3t_ext.store.tensors import decode, encode
from s3t_ext.system.folder import Slices, StoreFolder
from s3t_ext.system.settings import Settings
from s3t_ext.system.training.progress import Progress
from s3t_ext.system.training.train import Trainer, jobs, publish

RETRIES = 5  # of a job whose worker was lost

Sealed = dict[Node, bytes]


@contextmanager
def trainer_for(folder: StoreFolder, settings: Settings) -> Iterator[Trainer | RayTrainer]:
    """Give what trains as the settings say, for the length of the block.

    Raises:
        ValueError: as ``RayTrainer``.
    """
    if settings.executor == "local":
        yield Trainer(folder, settings)
        return
    ray = _ray()
    connected = ray.is_initialized()
    if not connected:
        ray.init(address=settings.address, include_dashboard=False, log_to_driver=False)
    try:
        yield RayTrainer(ray, folder, settings)
    finally:
        if not connected:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("executor: ray is not installed; pip install 's3t-ext[ray]'") from None
    return ray


class RayTrainer:
    """Train nodes of one store on the cluster that ``ray`` is connected to; see ``Trainer``.

    Each shard's nodes of a depth follow those of the depth above; apart from that as many jobs run as the cluster has
    processors for. The job of a lost worker is run again.

    Args:
        folder: open, and locked against other writers by the caller.

    Attributes:
        width: jobs that run side by side; ``notes``: what was used.

    Raises:
        ValueError: the cluster has not so many processors as one job is to have.
    """

    def __init__(self, ray: Any, folder: StoreFolder, settings: Settings) -> None:
        there = int(ray.cluster_resources().get("CPU", 0))
        if settings.cpus > there:
            raise ValueError(f"cpus: expected 1 to the cluster's {there} processors for a job, got {settings.cpus}")
        self.ray, self.folder, self.width = ray, folder, there // settings.cpus
        self.settings = replace(settings, executor="local", address=None)
        self.notes = {"executor": "ray", "width": self.width}
        # A worker ends with its job, and with it every copy of records and weights in its memory.
        self._work = ray.remote(num_cpus=settings.cpus, max_retries=RETRIES, max_calls=1)(remote_job)

    def train(self, wanted: Mapping[Node, str], progress: bool = True) -> int:
        """Train those of the wanted nodes (with their ids) that the store lacks; parents must be among them.

        Returns:
            How many nodes were trained and published.

        Raises:
            ValueError: training itself refused; StoreError: workers were lost again and again.
        """
        missing = [node for node, name in wanted.items() if not self.folder.nodes.has(name)]
        bar = Progress(len(missing), progress)
        running = {}
        for part in _parts(missing, self.width):
            chain = list(jobs(part))
            running[self._submit(chain.pop(0), wanted)] = chain
        published = 0
        while running:
            (done, *_), _ = self.ray.wait(list(running), num_returns=1)
            chain = running.pop(done)
            sealed, where = self._result(done)
            key = self.folder.files.key
            weights = {node: decode(unseal(wanted[node], data, key)) for node, data in sealed.items()}
            published += len(publish(self.folder, weights, wanted, where))
            if chain:
                running[self._submit(chain.pop(0), wanted)] = chain
            bar.advance(len(sealed), f"depth {max((len(path) for _, path in sealed), default=0)}")
        return published

    def _submit(self, nodes: Sequence[Node], wanted: Mapping[Node, str]) -> Any:
        ids = {(shard, path[:d]): wanted[shard, path[:d]] for shard, path in nodes for d in range(1, len(path) + 1)}
        slices = self.folder.ledger.slices()
        return self._work.remote(str(self.folder.path.absolute()), nodes, ids, slices, self.settings)

    def _result(self, done: Any) -> tuple[Sealed, dict[str, Any]]:
        errors = self.ray.exceptions
        try:
            return self.ray.get(done)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise StoreError(f"executor: a job's workers were lost {RETRIES + 1} times: {error}; fit again") from None


def _parts(nodes: Sequence[Node], most: int) -> list[list[Node]]:
    """Cut nodes in at most so many parts by shard."""
    shards = sorted({shard for shard, _ in nodes})
    owners = {shard: i % most for i, shard in enumerate(shards)}
    return [[node for node in nodes if owners[node[0]] == part] for part in range(min(most, len(shards)))]


def remote_job(
    path: str, nodes: Sequence[Node], ids: Mapping[Node, str], slices: Slices, settings: Settings
) -> tuple[Sealed, dict[str, Any]]:
    """Train nodes of one depth in a worker.

    Args:
        path: of the store; ``ids``: of the nodes and their ancestors, which are in it.
        slices: their digests as the ledger's machine told them.

    Returns:
        The nodes' weights, each sealed under its id, and the provenance of this process.
    """
    sealed: Sealed = {}
    with StoreFolder(path) as folder:
        trainer = Trainer(folder, settings)
        bar = Progress(0, enabled=False)
        for weights in trainer.passes(nodes, ids, lambda: slices, bar):
            sealed |= {node: seal(ids[node], encode(tensors), folder.files.key) for node, tensors in weights.items()}
    return sealed, trainer.provenance
