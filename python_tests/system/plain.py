"""A store made without torch, and what its test knows of it by itself: who is where, which nodes must be dead.

Its nodes hold random numbers, so that processes which delete and erase start, work and die in milliseconds.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from s3t_ext.ledger.identity import Key, canonical_json
from s3t_ext.plan import NodePath
from s3t_ext.store.crypt import StoreKey, unseal
from s3t_ext.store.files import exclusive, outside
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.system.config import Config
from s3t_ext.system.creation import admit, creating
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.unlearn import erase_pending

KEY = Key(bytes(range(32)))
SCHEMA = Schema(classes=("red", "green"), shape=(2,))
Cell = tuple[int, int]


@dataclass
class World:
    """One store, and the record that the test keeps of it: nothing in it was read back from the store.

    Args:
        path: of the store, in a folder that holds nothing else but what lies outside the store.
        cells: of each person; ``nodes``: the (shard, path) of each node's id.
        begun: people by request; ``acknowledged``: the receipt's SHA-256 by request; ``seq``: events seen.
        missing: nodes by id that may or may not be in the store; ``keys``: store keys that it had.
    """

    path: Path
    cells: dict[str, Cell]
    nodes: dict[str, tuple[int, NodePath]]
    begun: dict[str, tuple[str, ...]] = field(default_factory=dict)
    acknowledged: dict[str, str] = field(default_factory=dict)
    missing: dict[str, tuple[int, NodePath]] = field(default_factory=dict)
    keys: list[StoreKey] = field(default_factory=list)
    seq: int = 0
    healing: bool = False
    """Dirty slices may have been healed."""

    def copy(self, to: Path) -> World:
        """Copy the store with all that lies beside it; the folder `to` is replaced."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.path.parent, to)
        own = {name: dict(getattr(self, name)) for name in ("begun", "acknowledged", "missing")}
        return replace(self, path=to / self.path.name, keys=list(self.keys), **own)

    def acknowledge(self, request_id: str, receipt: dict) -> None:
        """Note that the receipt was in the requester's hands."""
        self.acknowledged[request_id] = hashlib.sha256(canonical_json(receipt)).hexdigest()

    def dead(self, dirty: set[Cell]) -> set[str]:
        """Name the nodes that saw one of these slices."""
        return {name for name, (shard, path) in self.nodes.items() if any((shard, k) in dirty for k in path)}

    def check(self) -> None:
        """Open the store: all that was acknowledged is there, nobody else's slice is dirty, no dead node is served."""
        with StoreFolder(self.path) as folder:
            stored = {row.request_id: row.receipt_sha256 for row in folder.ledger.requests()}
            assert self.acknowledged.items() <= stored.items(), "an acknowledged request is lost"
            assert stored.keys() <= self.begun.keys()
            assert folder.ledger.seq >= self.seq, "events are lost"
            assert folder.ledger.fence.read() >= folder.ledger.seq, "the epoch fell behind"
            self.seq = folder.ledger.seq
            slices = folder.ledger.slices()
            dirty = {cell for cell, digest in slices.items() if digest is None}
            hit = {self.cells[p] for request in stored for p in self.begun[request] if p in self.cells}
            assert dirty <= hit if self.healing else dirty == hit
            served = set(folder.trained(slices).values())
            live = self.nodes.keys() - self.dead(hit)
            assert live - self.missing.keys() <= served <= live, "a dead node is served, or a live one is not"
            for name in served:
                folder.nodes.get(name)

    def settle(self, already: bool = False) -> None:
        """Erase what is pending (`already`: it must be): no dead node or deleted person stays under any name."""
        with StoreFolder(self.path) as folder:
            if not already:
                erase_pending(folder)
            assert not folder.ledger.unerased()
            stored = {row.request_id for row in folder.ledger.requests()}
            gone = {person for request in stored for person in self.begun[request]}
            live = self.nodes.keys() - self.dead({self.cells[p] for p in gone if p in self.cells})
            files = {path.name.partition(".")[0] for path in folder.nodes.folder.iterdir()}
            assert files == live, "the blob of a dead node can still be read"
            assert not [path.name for path in self.path.rglob("*.part")]
            for cell in set(self.cells.values()):
                names = {name for record in folder.records.get(*cell).subjects for name in record}
                assert names == {person for person, at in self.cells.items() if at == cell} - gone
            known = {f"{shard}-{slice_}" for shard, slice_ in folder.ledger.slices()}
            assert {path.stem for path in folder.records.folder.glob("*.sealed")} == known
        self.check()

    def rotated(self) -> None:
        """After a rotation that ended: one key is there, and none that was before opens anything."""
        found = StoreKey.find(self.path)
        assert found != self.keys[0]
        there = [path.name for path in self.path.parent.glob("*.key*")]
        assert there == [outside(self.path, "key").name], there
        files = SealedFiles(self.path)
        for path in files.all():
            unseal(files.name(path), path.read_bytes(), found)
            for old in self.keys:  # a rotation that was killed late has the next one's key
                assert old == found or bytes.fromhex(old.name) not in path.read_bytes()


def newcomers() -> list[Table]:
    """Give a table of people who are not in the store."""
    chance = np.random.default_rng(1)
    inputs = chance.normal(size=(60, 2)).astype(np.float32)
    return [Table([(f"newcomer {i % 30}",) for i in range(60)], inputs, np.arange(60) % 2)]


def tensors(name: str) -> dict[str, np.ndarray]:
    """Give the weights of a node: numbers that its id names."""
    return {"a": np.random.default_rng(int(name[:8], 16)).normal(size=64).astype(np.float32)}  # (64,)


def make(path: Path, shards: int = 2, slices: int = 3, people: int = 30) -> World:
    """Make a store of random nodes, people in every slice."""
    base = path.parent / "base"
    base.mkdir(parents=True)
    for name in ("model.json", "weights.safetensors"):
        (base / name).write_bytes(b"no model: nothing here computes an answer")
    chance = np.random.default_rng(0)
    inputs = chance.normal(size=(2 * people, 2)).astype(np.float32)
    table = Table([(f"person {i % people}",) for i in range(2 * people)], inputs, np.arange(2 * people) % 2)
    layout = lay_out(table, KEY, shards, slices)
    with creating(path, SCHEMA, Config(shards=shards, slices=slices), KEY, base, "0" * 64, np.zeros((2, 2))) as folder:
        admit(folder, layout, {"public": ["volunteer"]})
    nodes: dict[str, tuple[int, NodePath]] = {}
    with StoreFolder(path) as folder, exclusive(path):
        state = folder.ledger.slices()
        ids = folder.identities(state)
        for (shard, stage), name in ids.items():
            identity = folder.identity(shard, stage, state, ids.get((shard, stage[:-1]), ""))
            assert folder.nodes.put(identity, tensors(name), {}) == name
            nodes[name] = shard, stage
    shutil.rmtree(base)
    cells = {name: cell for cell, rows in layout.slices.items() for names in rows.subjects for name in names}
    assert set(cells.values()) == {(s, k) for s in range(shards) for k in range(slices)}
    return World(path, cells, nodes)
