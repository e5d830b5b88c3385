"""Non-interference: train(D), then delete X, gives what train(D without X) gives with the same slices invalid.

``differences`` runs a case and lists what is not equal, bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tiny as t
from interference_cases import CLASSES, Case, Row, slice_of

import s3t_ext
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.data import ingest, tables
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.settings import Settings
from s3t_ext.system.training import train


class Outcome(NamedTuple):
    """What differs, and how many live nodes were compared."""

    differences: list[str]
    nodes: int


def differences(case: Case, folder: Path, bases: Path) -> Outcome:
    """Run a case in an empty folder; ``bases`` keeps the base models from one case to the next."""
    rest = [row for row in case.rows if not case.hit(row)]
    if case.shuffled:
        random.Random(case.number).shuffle(rest)
    with equal_salts():
        dirty = _deleted(case, folder / "all", bases)
        here = held(folder / "all")
        with Service(folder / "all") as service:
            reopened = served(service, case)
        fit(case, rest, folder / "rest", bases, case.together[1])
        with Service(folder / "rest") as service:
            service._mask(dirty[1])  # the same slices invalid; none, where they were healed
            fresh = served(service, case)
        expected = held(folder / "rest", dirty[1])
    hit = {slice_of(row.subjects[0], case.config) for row in case.rows if case.hit(row)}
    found = [] if hit == dirty[2] else [f"dirty slices: {sorted(dirty[2])}, the records lay in {sorted(hit)}"]
    found += compare("", here, expected) + compare("reopened: ", reopened, fresh)
    return Outcome(found + compare("long-lived: ", dirty[0], fresh), sum(key[0] == "node" for key in here))


def compare(what: str, found: dict, expected: dict) -> list[str]:
    keys = sorted(found.keys() | expected.keys(), key=str)
    return [f"{what}{key}" for key in keys if found.get(key) != expected.get(key)]


class _Killed(Exception):
    """Training ends here, as by a signal: what is in the store stays."""


def _deleted(case: Case, store: Path, bases: Path) -> tuple[dict, frozenset, frozenset]:
    """Train on everything, deleting on the way and afterwards, and heal; give what is served then, and dirty slices.

    Dirty after healing, that is, and before.
    """
    left = list(case.requests)
    stage, passes = train.Trainer._stage, iter(range(10**6))

    def interrupted(self, *args):
        at = next(passes)
        for request in [request for request in left if request.at == at]:
            left.remove(request)
            s3t_ext.delete(store, request.people)
            if case.killed:
                raise _Killed
        return stage(self, *args)

    with mock.patch.object(train.Trainer, "_stage", interrupted):
        while True:
            with suppress(_Killed):
                fit(case, case.rows, store, bases, case.together[0])
                break
    with Service(store) as service:
        served(service, case)
        for request in left:
            s3t_ext.delete(store, request.people) if not request.by_service else service.delete(request.people)
        dirtied = service.folder.ledger.dirty()
        if case.healed:
            heal(store, settings=Settings(nodes_per_pass=case.together[0]), progress=False)
            service.refresh()
            service.settle()
        return served(service, case), service.folder.ledger.dirty(), dirtied


def fit(
    case: Any, rows: list[Row], store: Path, bases: Path, together: int, beside: Path | None = None, **more: Any
) -> None:
    """Fit a store to rows in the form of a case; ``beside``: where a table that is a file lies, if not by the store."""
    store.parent.mkdir(exist_ok=True)
    base = bases / case.architecture
    if not base.exists():
        t.make(base, case.architecture, rows=1, people=1)
    schema = Schema(classes=CLASSES, shape=t.MODELS[case.architecture][1], scale=case.scale)
    table: Any = tables.Table([row.subjects for row in rows], [row.value for row in rows], [row.label for row in rows])
    if case.form == ".npz":
        table = (beside or store).with_suffix(".npz")
        values, labels = np.stack([row.value for row in rows]), np.array([CLASSES[row.label] for row in rows])
        np.savez(table, subject=[json.dumps(row.subjects) for row in rows], input=values, label=labels)
    elif case.form == ".jsonl":
        lines = [{"subject": r.subjects, "input": r.value.tolist(), "label": CLASSES[r.label]} for r in rows]
        table = (beside or store).with_suffix(".jsonl")
        table.write_text("\n".join(map(json.dumps, lines)))
    config = {"settings": Settings(nodes_per_pass=together), "progress": False, "key": t.KEY}
    with mock.patch.object(ingest.Layout, "check"):  # in tables as small as these a shard may be empty
        s3t_ext.fit(store, table, schema, base / "base", case.config, **config, **more)


def served(service: Service, case: Any) -> dict:
    """List depths, nodes, labels and the bits of the scores that are served, to the deleted people's inputs too."""
    queries = np.stack([np.float32(row.value) for row in case.rows[:4]])
    try:
        answer = service.predict(queries)
    except Refused:
        return {"depths": service.depths, "nodes": "refused"}
    return {
        "depths": answer.depths,
        "nodes": answer.nodes,
        "labels": answer.labels,
        "scores": answer.scores.tobytes(),
    }


def held(store: Path, invalid: frozenset = frozenset()) -> dict:
    """List a store's live nodes with identity and weights, and the records that are left, slice by slice."""
    found: dict = {}
    with StoreFolder(store) as folder:
        slices = {cell: None if cell in invalid else digest for cell, digest in folder.ledger.slices().items()}
        for node, name in folder.trained(slices).items():
            manifest, tensors = folder.nodes.get(name)
            found["node", node] = (name, manifest["identity"], weights_hash(tensors))
        for cell in slices:
            records = folder.records.get(*cell)
            content = zip(records.keys, records.subjects, records.inputs, records.labels, strict=True)
            found["records", cell] = [(key, names, ingest.record_bytes(x, y)) for key, names, x, y in content]
    return found


@contextmanager
def equal_salts() -> Iterator[None]:
    """Make all salts zero inside the block: identities then are functions of content, and must be equal too."""
    with mock.patch.object(ingest, "secrets", SimpleNamespace(token_bytes=bytes)):
        yield
