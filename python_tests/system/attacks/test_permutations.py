"""The state at rest is a function of the set of requests: whatever their order, repetition and batches, one hash.

200 runs, or 1,000 with S3T_LONG=1; the count is printed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from contextlib import ExitStack
from pathlib import Path

import tiny as t

import s3t_ext
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.store.files import exclusive, outside
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.data.ingest import record_bytes
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.settings import Settings

RUNS = 1000 if os.environ.get("S3T_LONG") else 200


def state(store: Path) -> dict:
    """List what a store holds and serves at rest; not what tells of the way there: times, request ids, the chain."""
    with StoreFolder(store) as folder:
        slices = folder.ledger.slices()
        live = folder.trained(slices)
        records = {cell: folder.records.get(*cell) for cell in slices}
        files = [path.name.partition(".")[0] for path in (store / "nodes").iterdir()]
        return {
            "dirty": sorted(map(list, folder.ledger.dirty())),
            "deleted": sorted(folder.ledger.deleted()),
            "nodes": {name: weights_hash(folder.nodes.get(name)[1]) for name in live.values()},
            "routing": [list(path) for path in folder.best(live)],
            "depths": [len(path) for path in folder.best(live)],
            "records": {
                f"{shard} {slice_}": [
                    [names, hashlib.sha256(record_bytes(x, y)).hexdigest()]
                    for names, x, y in zip(held.subjects, held.inputs, held.labels, strict=True)
                ]
                for (shard, slice_), held in records.items()
            },
            "residue": sorted(set(files) - set(live.values())),
            "unerased": len(folder.ledger.unerased()),
        }


def state_hash(store: Path) -> str:
    return hashlib.sha256(canonical_json(state(store))).hexdigest()


def copy(store: Path, to: Path) -> None:
    """Copy a store, with what belongs to it and lies outside its folder."""
    shutil.copytree(store, to)
    for kind in ("key", "anchor"):
        if outside(store, kind).exists():
            shutil.copy2(outside(store, kind), outside(to, kind))


def play(store: Path, people: list[str], rng: random.Random) -> int:
    """Delete people in any order, some again and again, one by one or many at once; return how many requests."""
    asked = people + rng.choices(people, k=rng.randrange(2 * len(people)))
    rng.shuffle(asked)
    spelled = [rng.choice([str, str.upper, str.title])(name) for name in asked]
    requests = []
    while spelled:
        size = rng.randint(1, len(spelled))
        requests.append((spelled[:size], f"request {len(requests)}" if rng.random() < 0.7 else None))
        spelled = spelled[size:]
    requests += rng.sample(requests, rng.randint(0, min(2, len(requests))))  # sent again, some under the same id
    with ExitStack() as stack:
        service = stack.enter_context(s3t_ext.Service(store)) if rng.random() < 0.5 else None
        for names, request_id in requests:
            with ExitStack() as held:
                if rng.random() < 0.2:
                    held.enter_context(exclusive(store))  # erasure waits for the next request
                if service is not None and rng.random() < 0.7:
                    service.delete(names, request_id)
                else:
                    s3t_ext.delete(store, names, request_id)
    s3t_ext.delete(store, people[:1], "the last one")  # erases what waited
    return len(requests) + 1


def test_one_set_of_requests_has_one_state_when_all_is_healed(ram, capsys) -> None:
    """Whatever was healed in between, and how far."""
    tiny = t.make(ram, rows=30, people=12)
    tiny.fit(ram / "store", steps=1, rank=1)
    people = [names[0] for names in t.people_by_cell(tiny).values() if names][:4]
    found, healings = set(), 0
    for number in range(RUNS // 25):
        chance, store = random.Random(number), ram / "again" / "store"
        copy(ram / "store", store)
        left = chance.sample(people, len(people)) + chance.choices(people, k=2)
        while left:
            size = chance.randint(1, len(left))
            s3t_ext.delete(store, left[:size])
            left = left[size:]
            if left and chance.random() < 0.7:
                s3t_ext.heal(store, budget=chance.choice([0, 2, 5, None]), progress=False)
                healings += 1
        s3t_ext.heal(store, settings=Settings(nodes_per_pass=chance.randint(1, 6)), progress=False)
        found.add(state_hash(store))
        if number == 0:
            first = state(store)
        shutil.rmtree(ram / "again")
    tiny.fit(ram / "fresh", t.without(tiny.table, set(people)), steps=1, rank=1)
    with capsys.disabled():
        print(f"\npermutations: {RUNS // 25} runs healed, {healings} times on the way, {len(found)} final states")
    assert len(found) == 1
    assert (first["depths"], first["dirty"], first["residue"]) == ([3, 3], [], [])
    assert sorted(first["nodes"].values()) == sorted(state(ram / "fresh")["nodes"].values())
    assert first["records"] == state(ram / "fresh")["records"]


def test_one_set_of_requests_has_one_state(ram, capsys) -> None:
    tiny = t.make(ram, rows=30, people=12)
    tiny.fit(ram / "store", steps=1, rank=1)
    cells = t.people_by_cell(tiny)
    people = [names[0] for cell, names in sorted(cells.items()) if cell not in ((0, 1), (1, 0)) and names]
    people += [names[1] for cell, names in sorted(cells.items()) if cell[1] == 2 and len(names) > 1]
    before, found, requests = state_hash(ram / "store"), set(), 0
    for number in range(RUNS):
        copy(ram / "store", ram / "again" / "store")
        requests += play(ram / "again" / "store", people, random.Random(number))
        found.add(state_hash(ram / "again" / "store"))
        if number == 0:
            first = state(ram / "again" / "store")
        shutil.rmtree(ram / "again")
    with capsys.disabled():
        print(f"\npermutations: {RUNS} runs, {requests} requests for {len(people)} people, {len(found)} final states")
    assert len(found) == 1
    assert before not in found
    assert first["residue"] == []
    assert first["unerased"] == 0
    assert first["depths"] == [1, 1]
    assert not {name for held in first["records"].values() for names, _ in held for name in names} & set(people)
    assert len(first["deleted"]) == len(people)
