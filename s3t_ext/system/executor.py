"""Train a store's nodes on a Ray cluster: the jobs of one machine, sent to many, to the same bits.

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

from collections.abc import Mapping, Sequence
from typing import Any

from s3t_ext.store.crypt import seal, unseal
from s3t_ext.store.files import StoreError
from s3t_ext.store.tensors import decode, encode
from s3t_ext.system.folder import Slices, StoreFolder
from s3t_ext.system.paths import Node
from s3t_ext.system.progress import Progress
from s3t_ext.system.train import Settings, Trainer, jobs, publish

RETRIES = 5  # of a job whose worker was lost

Sealed = dict[Node, bytes]


def train_on_ray(
    folder: StoreFolder,
    wanted: Mapping[Node, str],
    settings: Settings | None = None,
    *,
    address: str | None = None,
    cpus: int = 1,
    progress: bool = True,
) -> int:
    """Train those of the wanted nodes (with their ids) that the store lacks; parents must be among them.

    Each shard's nodes of a depth follow those of the depth above; apart from that as many jobs run as the cluster has
    processors for. The job of a lost worker is run again.

    Args:
        folder: open, and locked against other writers by the caller.
        address: of a cluster, or ``auto``; None: the one that this process is connected to, else workers on this
            machine for the length of the call.
        cpus: processors, and threads, of each job.

    Returns:
        How many nodes were trained and published.

    Raises:
        ValueError: Ray is not installed, there are no such processors, or training itself refused.
        StoreError: workers were lost again and again.
    """
    ray = _ray()
    connected = ray.is_initialized()
    if not connected:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        return _drive(ray, folder, wanted, settings or Settings(), cpus, progress)
    finally:
        if not connected:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("executor: ray is not installed; pip install 's3t-ext[ray]'") from None
    return ray


def _drive(
    ray: Any, folder: StoreFolder, wanted: Mapping[Node, str], settings: Settings, cpus: int, progress: bool
) -> int:
    """Keep the cluster busy; store what comes back."""
    missing = [node for node, name in wanted.items() if not folder.nodes.has(name)]
    there = int(ray.cluster_resources().get("CPU", 0))
    if not 1 <= cpus <= there:
        raise ValueError(f"cpus: expected 1 to the cluster's {there} processors for a job, got {cpus}")
    # A worker ends with its job, and with it every copy of records and weights in its memory.
    work = ray.remote(num_cpus=cpus, max_retries=RETRIES, max_calls=1)(remote_job)
    bar = Progress(len(missing), progress)
    chains = [list(jobs(part)) for part in _parts(missing, there // cpus)]
    running: dict[Any, list[list[Node]]] = {}
    published = 0

    def submit(chain: list[list[Node]]) -> None:
        nodes = chain.pop(0)
        above = {(shard, path[:d]) for shard, path in nodes for d in range(1, len(path) + 1)}
        ids = {node: wanted[node] for node in above}
        running[work.remote(str(folder.path.absolute()), nodes, ids, folder.ledger.slices(), settings)] = chain

    for chain in chains:
        submit(chain)
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        chain = running.pop(done)
        try:
            sealed, where = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise StoreError(f"executor: a job's workers were lost {RETRIES + 1} times: {error}; fit again") from None
        weights = {node: decode(unseal(wanted[node], data, folder.files.key)) for node, data in sealed.items()}
        published += len(publish(folder, weights, wanted, where))
        if chain:
            submit(chain)
        bar.advance(len(sealed), f"depth {max((len(path) for _, path in sealed), default=0)}")
    return published


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
