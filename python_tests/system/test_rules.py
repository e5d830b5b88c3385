"""Rules of exactness that show in no answer: placement, identity, digests, layer groups, files, verification."""

from __future__ import annotations

import gc
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import FunctionType, ModuleType

import numpy as np
import tiny as t
import torch

import s3t_ext
from s3t_ext.models.folder import build
from s3t_ext.store.files import exclusive
from s3t_ext.system import network, verify
from s3t_ext.system.config import Config
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.scratch import hand_over
from s3t_ext.system.serve import Service
from s3t_ext.system.training.train import Trainer

DEFINING = ("recipe", "base", "head", "key", "config", "schema", "shard", "path", "slices", "parent")
FILES = (
    r"store\.json|key|signing-key|public\.json|head\.npy|epoch|anchor|lock|ledger\.sqlite(-wal|-shm)?"
    r"|base/(model\.json|weights\.safetensors)|records/\d+-\d+\.\w+|nodes/[0-9a-f]{64}\.\w+"
)


def test_all_records_of_a_subject_share_a_slice(store) -> None:
    cells = defaultdict(set)
    with StoreFolder(store) as folder:
        for cell in folder.ledger.slices():
            for names in folder.records.get(*cell).subjects:
                cells[names[0]].add(cell)
    assert len(cells) == 25
    assert set(map(len, cells.values())) == {1}


def test_an_identity_holds_what_defines_the_result_and_nothing_else(store) -> None:
    with StoreFolder(store) as folder:
        slices = folder.ledger.slices()
        ids = folder.identities(slices)
        manifests = {node: folder.nodes.manifest(name) for node, name in ids.items()}
        other = folder.identities({**slices, (0, 1): "a" * 64})
    assert all(sorted(m["identity"]) == sorted(DEFINING) for m in manifests.values())
    assert {node for node in ids if ids[node] != other[node]} == {node for node in ids if node[0] == 0 and 1 in node[1]}


def test_a_digest_confirms_no_guess(mlp, tmp_path) -> None:
    """Who knows a slice's records, and nothing else, cannot tell its digest from another."""
    digests = []
    for name in ("one", "two"):
        with StoreFolder(mlp.fit(tmp_path / name, steps=1)) as folder:
            digests += folder.ledger.slices().values()
    assert len(set(digests)) == len(digests) == 12


def test_a_dead_node_that_is_still_on_the_disk_is_not_served(mlp, store) -> None:
    with StoreFolder(store) as folder:
        dead = {name for node, name in folder.trained(folder.ledger.slices()).items() if node[0] == 0 and 0 in node[1]}
    with exclusive(store):  # who would erase finds the store locked
        s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])
        with StoreFolder(store) as folder, Service(store) as service:
            assert all(folder.nodes.has(name) for name in dead)
            assert not dead & set(folder.trained(folder.ledger.slices()).values())
            assert not dead & set(service.predict(mlp.table.inputs[:1]).nodes)
            assert service.depths == (2, 3)


def test_the_frozen_base_is_in_eval_mode_and_every_layer_exact(store) -> None:
    with StoreFolder(store) as folder, Service(store) as service:
        modules = [*Trainer(folder).network.modules(), *service.network.modules()]
    assert not any(module.training for module in modules)
    assert {module.mode for module in modules if isinstance(module, s3t_ext.MaskedLoRALinear)} == {"exact"}


def test_layers_are_matched_by_parsed_index_and_whole_names() -> None:
    base = build("mlp", {"shape": [6], "width": 8, "depth": 12})
    network.adapt_base(base, Config(shards=1, slices=12, strategy="sisa", placement="layers"), 1)
    stages = {name: list(layer.stages) for name, layer in network.adapted_layers(base).items()}
    assert stages == {f"layers.{i}.{part}": [11 - i] for i in range(12) for part in ("fc1", "fc2")}
    base = build("mlp", {"shape": [6], "width": 8, "depth": 12})
    network.adapt_base(base, Config(shards=1, slices=1, targets=("1.fc1",)), 1)
    assert list(network.adapted_layers(base)) == ["layers.1.fc1"]


def test_a_store_holds_what_is_listed_and_nothing_else(mlp, store) -> None:
    """A new file may hold derived data: whoever adds one says here that erasure knows it."""
    with Service(store) as service:
        service.predict(mlp.table.inputs)
        service.delete(["person 1"])
    found = [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    assert not [name for name in found if not re.fullmatch(FILES, name)]


def test_erasure_leaves_no_file_and_zeroes_what_it_unlinks(mlp, store, tmp_path) -> None:
    """A second name of each file that must go still shows its blocks afterwards."""
    with StoreFolder(store) as folder:
        nodes = folder.trained(folder.ledger.slices())
    dead = {name for (shard, path), name in nodes.items() if shard == 0 and 0 in path}
    doomed = [path for path in (store / "nodes").iterdir() if path.stem in dead]
    doomed += (store / "records").glob("0-0.*")
    assert len(doomed) == 2 * len(dead) + 1 == 9
    for path in doomed:
        os.link(path, tmp_path / f"second name of {path.name}")
    s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])
    assert {path.stem for path in (store / "nodes").iterdir()} == set(nodes.values()) - dead
    assert not any(any(path.read_bytes()) for path in tmp_path.glob("second name of *"))


def _reached(root: object) -> Iterator[bytes]:
    """Give the bytes of every array and tensor that an object leads to, by whatever attributes."""
    left, seen = [root], set[int]()
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, (ModuleType, type, FunctionType)):
            continue
        seen.add(id(found))
        if isinstance(found, (np.ndarray, torch.Tensor)):
            yield np.asarray(found).tobytes()
        left += gc.get_referents(found)


def test_nothing_that_a_service_reaches_holds_dead_weights(mlp, store) -> None:
    with Service(store) as service:
        weights = {node: service.folder.nodes.get(name)[1] for node, name in service._ids.items()}
        first = {node: tensors["layers.0.fc1.a"].tobytes() for node, tensors in weights.items()}
        del weights
        service.predict(mlp.table.inputs)
        service.delete([t.people_by_cell(mlp)[0, 0][0]])
        reached = list(_reached(service))
        held = {node for node, a in first.items() if any(a in data for data in reached)}
    assert held == {node for node in first if node[0] != 0 or 0 not in node[1]}, "and the walk finds the live ones"


def test_a_receipt_names_the_copies_that_left_with_the_slice(mlp, store) -> None:
    with StoreFolder(store) as folder:
        folder.ledger.export("old", "backup", [], [(0, 0), (1, 1)])
        folder.ledger.export("other", "backup", [], [(1, 1)])
    receipt = s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])
    assert [export["export"] for export in receipt["exports"]] == ["old"]


def test_verification_retrains_from_the_table(mlp, store, tmp_path) -> None:
    """In this process, so that what is broken in it shows; test_verify.py has the fresh one."""

    def run(table, name: str) -> dict:
        handed = hand_over(table, mlp.schema, mlp.base)
        return verify.compare(str(store), [handed], "all", 0, False, str(tmp_path / name))

    assert run(mlp.table, "same")["mismatched"] == 0
    assert run(replace(mlp.table, inputs=mlp.table.inputs + np.float32(1e-3)), "other")["mismatched"] == 14
