"""One fitted system in one folder: what was declared, the key, the books, the records and the nodes.

::

    store.json            format, schema, configuration, hashes of base and head, names of both keys (checked)
    key                   32 bytes in hex, sealed; whoever holds it can name placements and subjects
    signing-key           32 bytes in hex, sealed; whoever holds it can sign receipts
    public.json           the ledger's first event, for anybody: it names the public half of the signing key
    base/ head.npy        the frozen model and head
    ledger.sqlite         the books, with the files `epoch` and `anchor`
    records/ nodes/       private records by slice, trained nodes by content address, sealed

Beside the folder ``NAME.key``, the store key, which opens what is sealed (`s3t_ext.store.crypt`), and ``NAME.anchor``:
where the books end (`s3t_ext.ledger.anchor`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext.ledger import Ledger
from s3t_ext.ledger.identity import Key, commitment, node_identity, normalise_subject, slice_digest, subject_hash
from s3t_ext.ledger.log import Cell as Cell
from s3t_ext.ledger.signature import SigningKey
from s3t_ext.plan import Node, NodePath, StageTree
from s3t_ext.store.beside import sweep_beside as sweep_beside
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import (
    StoreError,
    exists,
    outside,
    read_bytes,
    read_checked,
    write_checked,
)
from s3t_ext.store.nodes import NodeStore
from s3t_ext.store.records import RecordStore, SliceRecords
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.system.config import Config
from s3t_ext.system.data.ingest import record_bytes
from s3t_ext.system.data.schema import Schema

DECLARED = ("store.json", "key", "signing-key", "public.json", "head.npy")
DEADLINE_DAYS = 30
RECIPE = 1  # raised by hand when the arithmetic of training changes

Slices = Mapping[Cell, str | None]  # current digest of each slice, None where dirty


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least depth that is promised: the mean over the shards, and that of each; 0: nothing is promised."""

    mean: float = 0
    shard: float = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"floor: expected a {name} depth of at least 0, got {value!r}")

    def broken(self, depths: Sequence[int]) -> list[str]:
        """List what these depths break of it, a line each."""
        lines, mean = [], sum(depths) / len(depths)
        if mean < self.mean:
            lines.append(f"the mean depth {mean:.2f} is below {self.mean:g}")
        if low := [shard for shard, depth in enumerate(depths) if depth < self.shard]:
            lines.append(f"the depth of shards {', '.join(map(str, low))} is below {self.shard:g}")
        return lines


class StoreFolder:
    """An existing store. Opening it reads and checks ``store.json`` only; ledger and keys are opened on first use.

    Args:
        path: of the store.
        store_key: of a store that is being made, or that no other process opens. Default: found.

    Raises:
        StoreError: no store there, of another format, or damaged.
    """

    def __init__(self, path: str | Path, store_key: StoreKey | None = None) -> None:
        self.path = Path(path)
        if not exists(self.path / "store.json"):
            raise StoreError(f"{self.path} holds no store; make one with `s3t fit {self.path} TABLE`")
        body = read_checked(self.path / "store.json")
        self.schema = Schema.from_dict(body["schema"])
        self.config = Config.from_dict(body["config"])
        self.base_hash: str = body["base"]
        self.probe: list[float] = body["probe"]
        self.declared = [*DECLARED, *(f"base/{name}" for name in body["base_files"])]  # files that are written once
        self.head_hash: str = body["head"]
        self.key_name: str = body["key"]
        self.floor = Floor(**body["floor"])
        self._anchor = outside(self.path, "anchor") if store_key is None else None
        self.files = SealedFiles(self.path, store_key)
        self.nodes, self.records = NodeStore(self.files), RecordStore(self.files)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger.open(self.path / "ledger.sqlite", self._anchor)

    @cached_property
    def tree(self) -> StageTree:
        return self.config.tree()

    @property
    def shards(self) -> int:
        """Number of shards over all generations, as of the last look at the ledger; cells are counted over all."""
        return self.ledger.shards or self.config.shards

    @cached_property
    def signing_key(self) -> SigningKey:
        """The key that signs receipts.

        Raises:
            StoreError: it is missing, or not the one whose public half the ledger names.
        """
        key = SigningKey.from_hex(self.files.read(self.path / "signing-key").decode())
        if key.public != self.ledger.meta["public_key"]:
            raise StoreError(f"{self.path}/signing-key is not the signing key of this store; restore it from a backup")
        return key

    @cached_property
    def key(self) -> Key:
        """The key that all streams, placements and names of subjects derive from.

        Raises:
            StoreError: it is missing or damaged, or the store key is missing.
        """
        key = Key.from_hex(self.files.read(self.path / "key").decode())
        if key.name != self.key_name:
            raise StoreError(f"{self.path}/key is not the key of this store; restore it from a backup")
        return key

    @property
    def base(self) -> Path:
        """The folder of the frozen base model."""
        return self.path / "base"

    def head(self) -> np.ndarray:
        """Read the frozen head (outputs, features), checked; without elements where heads are of another kind."""
        data = read_bytes(self.path / "head.npy")
        if hashlib.sha256(data).hexdigest() != self.head_hash:
            raise StoreError(f"{self.path / 'head.npy'} is damaged: it does not match its hash; restore it")
        return np.frombuffer(data, "<f4").reshape(self.schema.outputs if data else 0, -1 if data else 0)

    def close(self) -> None:
        if "ledger" in self.__dict__:
            self.__dict__.pop("ledger").close()

    def __enter__(self) -> StoreFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hashes(self, subjects: Sequence[str]) -> list[str]:
        """Give the names under which the books know several subjects."""
        if isinstance(subjects, str) or not subjects:
            raise ValueError(f"subjects: expected a list of at least one subject, got {subjects!r}")
        return [self.hashed(subject) for subject in subjects]

    def hashed(self, subject: str) -> str:
        """Give the keyed hash under which the books know a subject, normalised as the schema declares."""
        return subject_hash(self.key, normalise_subject(subject, self.schema.normalise))

    @cached_property
    def _constants(self) -> dict[str, Any]:
        return {
            "recipe": RECIPE,
            "base": self.base_hash,
            "head": self.head_hash,
            "key": self.key_name,
            "config": self.config.identity(),
            "schema": schema_dict(self.schema),
        }

    def identity(self, shard: int, path: NodePath, slices: Slices, parent: str) -> dict[str, Any]:
        """List what defines a live node's weights; its id is the hash of this."""
        return {
            **self._constants,
            "shard": shard,
            "path": list(path),
            "slices": [slices[shard, k] for k in path],
            "parent": parent,
        }

    def identities(self, slices: Slices) -> dict[Node, str]:
        """Compute the id of every live node under these slice digests; a node with a dirty slice has none."""
        ids: dict[Node, str] = {}
        for shard, path in self.plan_nodes(slices):
            if self.alive(shard, path, slices):
                parent = ids.get((shard, path[:-1]), "")
                ids[shard, path] = node_identity(self.identity(shard, path, slices, parent))
        return ids

    def plan_nodes(self, slices: Slices) -> Iterator[Node]:
        """List every (shard, path) of the plan, shallow nodes first, of all shards that have slices."""
        shards = sorted({shard for shard, _ in slices})
        for path in self.tree.nodes:
            for shard in shards:
                yield shard, path

    @staticmethod
    def alive(shard: int, path: NodePath, slices: Slices) -> bool:
        """Tell whether every slice digest on a node's path is current: there is no other flag."""
        return all(slices[shard, k] is not None for k in path)

    def best(self, trained: Collection[Node]) -> list[NodePath]:
        """Choose the node each shard serves among live, trained ones: the deepest, ties by the order of slices."""
        chosen: list[NodePath] = [()] * self.shards
        for shard, path in sorted(trained, key=lambda node: (-len(node[1]), node[1])):
            if not chosen[shard] and all((shard, path[:d]) in trained for d in range(1, len(path))):
                chosen[shard] = path
        return chosen

    def slice_records(self, shard: int, slice_: int, slices: Slices | None = None) -> SliceRecords:
        """Read a slice's records, held against the digest under which nodes are trained on them.

        Args:
            slices: the digests, where the ledger is not to be asked.

        Raises:
            StoreError: they are others than the ledger says, an old copy perhaps; or as ``records.get``.
        """
        records, digest = self.records.get(shard, slice_), (slices or self.ledger.slices())[shard, slice_]
        if digest not in (None, digest_of(records)):  # a dirty one is not trained on: erasure is at it
            raise StoreError(
                f"records/{shard}-{slice_} are not those of the ledger, an older copy perhaps: run `s3t erase "
                f"{self.path}`, or restore the store from a backup"
            )
        return records

    def trained(self, slices: Slices) -> dict[Node, str]:
        """List the live nodes that are in the store, with their ids."""
        return {node: name for node, name in self.identities(slices).items() if self.nodes.has(name)}


def schema_dict(schema: Schema) -> dict[str, Any]:
    """Give the schema as plain JSON types."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(schema).items()}


def promise(folder: StoreFolder, floor: Floor) -> None:
    """Put another floor in the place of a store's, under the writer's lock: no identity holds it."""
    write_checked(folder.path / "store.json", {**read_checked(folder.path / "store.json"), "floor": vars(floor)})
    folder.floor = floor


def announce(folder: StoreFolder) -> None:
    """Tell services of the live nodes in the store that they were not told of: the epoch moves, and they look."""
    folder.ledger.trained(folder.trained(folder.ledger.slices()).values())


def digest_of(records: SliceRecords) -> str:
    """Compute the digest of a slice with these records."""
    rows = zip(records.salts, records.inputs, records.labels, strict=True)
    return slice_digest([commitment(salt, record_bytes(x, y)) for salt, x, y in rows])
