"""Non-interference: train(D), then delete X, gives what train(D without X) gives with the same slices invalid.

A case is drawn from its number alone; ``differences`` runs it and lists what is not equal, bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tiny as t

import s3t_ext
from s3t_ext.ledger.identity import Key, normalise_subject
from s3t_ext.ledger.partition import place
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system import ingest, train
from s3t_ext.system.config import Config, Schema
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Refused, Service

CLASSES = ("red", "green", "blue", "grey")
FORMS = ("memory", ".npz", ".jsonl")
ODD_TYPES = (np.float64, np.float16, np.int64, np.int8, np.uint16, np.bool_)
EXTREMES = (0.0, -0.0, 1e-42, -1e-45, 1.17549435e-38, 1e12, -1e15)  # zeros, denormals, the least normal number, huge


class Row(NamedTuple):
    """A record as a table has it, before anything is normalised."""

    subjects: tuple[str, ...]
    value: np.ndarray  # of the schema's shape and any type of number
    label: Any  # a whole number of any type


class Request(NamedTuple):
    """A deletion: before which pass of training (one that never comes: afterwards), whom, and by a service or not."""

    at: int
    people: tuple[str, ...]
    by_service: bool


@dataclass(frozen=True)
class Case:
    """One comparison; ``together`` are the nodes a pass of the two runs, which promise the same bits."""

    number: int
    removed: str
    architecture: str
    config: Config
    scale: float
    form: str
    rows: list[Row]
    requests: list[Request]
    together: tuple[int, int]
    shuffled: bool

    @property
    def people(self) -> set[str]:
        return {normalise_subject(name) for request in self.requests for name in request.people}

    def hit(self, row: Row) -> bool:
        return any(normalise_subject(name) in self.people for name in row.subjects)

    def __str__(self) -> str:
        return (
            f"interference.draw({self.number}): {self.removed}, {self.architecture}, {self.form}, {len(self.rows)} "
            f"records, {self.config}, {self.requests}"
        )


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(number: int) -> Case:
    """Draw a case; kinds of X take turns."""
    rng = random.Random(number)
    removed, architecture = list(REMOVED)[number % len(REMOVED)], rng.choice(["mlp", "mlp", "vit"])
    config = _config(rng)
    rows = _rows(rng, t.MODELS[architecture][1])
    people = REMOVED[removed](rows, rng, config)
    passes = rng.choice([0, 0, 1, 3, 6])  # 0: all requests come after training
    requests = [
        Request(rng.randrange(passes) if passes else 10**6, tuple(batch), rng.random() < 0.5)
        for batch in _batches(rng, sorted(people))
    ]
    together = rng.choice([(3, 3), (1, 4), (5, 2)])
    scale, form = rng.choice([1.0, 0.1, 255.0]), rng.choice(FORMS)
    return Case(number, removed, architecture, config, scale, form, rows, requests, together, rng.random() < 0.3)


def _config(rng: random.Random) -> Config:
    shards, slices = rng.randint(1, 3), rng.randint(1, 3)
    shards += shards * slices < 3
    strategy = rng.choice(["subsets", "subsets", "rotation", "sisa", "bms", "random", "conditional", "greedy"])
    budgeted = strategy in ("rotation", "bms", "random", "conditional")
    return Config(
        shards=shards,
        slices=slices,
        strategy=strategy,
        budget=rng.randint(1, slices) if budgeted else None,
        placement=rng.choice(["stack", "layers"]),
        targets=rng.choice(["all-linear", ("fc1",), ("blocks.0.fc2", "blocks.1.fc2", "blocks.2.fc2")]),
        rank=rng.randint(1, 3),
        lr=rng.choice([1e-2, 3e-3]),
        weight_decay=rng.choice([0.0, 0.1]),
        dropout=rng.choice([0.0, 0.0, 0.4]),
        steps=rng.randint(1, 4),
        batch=rng.randint(1, 5),
        combine=rng.choice(["probabilities", "logits", "vote"]),
    )


def _rows(rng: random.Random, shape: tuple[int, ...]) -> list[Row]:
    """Draw records: some people have many, some records two subjects, some are equal, some hold extreme numbers."""
    values = np.random.default_rng(rng.getrandbits(32))
    people, classes = rng.randint(4, 14), rng.randint(2, len(CLASSES))
    rows: list[Row] = []
    for i in range(rng.randint(max(6, people), 40)):
        owner = f"person {i if i < people else min(rng.randrange(people), rng.randrange(people))}"
        value = values.normal(size=shape).astype(np.float32)
        if rng.random() < 0.1:
            value.flat[rng.randrange(value.size)] = rng.choice(EXTREMES)
        row = Row((owner,), value, rng.choice([int, np.int8, np.uint16, np.int64])(rng.randrange(classes)))
        if rows and rng.random() < 0.15:
            row = rng.choice(rows)._replace(subjects=rng.choice([row.subjects, rows[-1].subjects]))
        if rng.random() < 0.1:
            row = row._replace(subjects=(*row.subjects, f"person {rng.randrange(people)}", "witness"))
        if rng.random() < 0.1:
            row = row._replace(subjects=(row.subjects[0].upper() + " ", *row.subjects[1:]))
        rows.append(row)
    if rng.random() < 0.5:
        rng.shuffle(rows)
    return rows


def _batches(rng: random.Random, people: list[str]) -> Iterator[list[str]]:
    rng.shuffle(people)
    while people:
        size = rng.randint(1, len(people))
        yield [rng.choice([str, str.upper, str.title])(name) for name in people[:size]]
        people = people[size:]


def _owners(rows: list[Row]) -> list[str]:
    return sorted({normalise_subject(row.subjects[0]) for row in rows})


def _slice_of(name: str, config: Config) -> tuple[int, int]:
    return place(Key(t.KEY), normalise_subject(name), config.shards, config.slices)


def _only_of_a_class(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    one = rng.choice(_owners(rows))
    for i, row in enumerate(rows):
        mine = normalise_subject(row.subjects[0]) == one
        rows[i] = row._replace(label=len(CLASSES) - 1 if mine else int(row.label) % (len(CLASSES) - 1))
    return {one}


def _odd_type(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    i = rng.randrange(len(rows))
    kind = rng.choice(ODD_TYPES)
    rows[i] = rows[i]._replace(value=np.clip(rows[i].value, 0, 100).astype(kind), label=np.uint8(rows[i].label))
    return {normalise_subject(rows[i].subjects[0])}


def _whole_slice(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    cell = _slice_of(rng.choice(_owners(rows)), config)
    return {name for name in _owners(rows) if _slice_of(name, config) == cell}


def _large_share(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    """All people of as many slices as leave something: sums and means over the table move by much."""
    cells = sorted({_slice_of(name, config) for name in _owners(rows)})
    kept = {rng.choice(cells), rng.choice(cells)}
    return {name for name in _owners(rows) if _slice_of(name, config) not in kept} or {rng.choice(_owners(rows))}


def _co_subject(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    rows[:] = [r._replace(subjects=(*r.subjects, "Witness ")) if rng.random() < 0.1 else r for r in rows]
    return {"witness"}


REMOVED = {
    "one person": lambda rows, rng, config: {rng.choice(_owners(rows))},
    "the only member of a class": _only_of_a_class,
    "the first row": lambda rows, rng, config: {normalise_subject(rows[0].subjects[0])},
    "the last row": lambda rows, rng, config: {normalise_subject(rows[-1].subjects[0])},
    "a whole slice": _whole_slice,
    "the one odd number type": _odd_type,
    "a co-subject": _co_subject,
    "a large share": _large_share,
    "who has many records": lambda rows, rng, config: {"person 0"},
    "some people": lambda rows, rng, config: set(rng.sample(_owners(rows), min(3, len(_owners(rows))))),
}


# --- comparing -------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What differs, and how many live nodes were compared."""

    differences: list[str]
    nodes: int


def differences(case: Case, folder: Path, bases: Path) -> Outcome:
    """Run a case in an empty folder; ``bases`` keeps the base models from one case to the next."""
    rest = [row for row in case.rows if not case.hit(row)]
    if not rest:
        return Outcome([], 0)
    if case.shuffled:
        random.Random(case.number).shuffle(rest)
    with _equal_salts():
        dirty = _deleted(case, folder / "all", bases)
        held = _held(folder / "all")
        with Service(folder / "all") as service:
            reopened = _served(service, case)
        _fit(case, rest, folder / "rest", bases, case.together[1])
        with Service(folder / "rest") as service:
            service._mask(dirty[1])  # the same slices invalid
            fresh = _served(service, case)
        expected = _held(folder / "rest", dirty[1])
    hit = {_slice_of(row.subjects[0], case.config) for row in case.rows if case.hit(row)}
    found = [] if hit == dirty[1] else [f"dirty slices: {sorted(dirty[1])}, the records lay in {sorted(hit)}"]
    found += _compare("", held, expected) + _compare("reopened: ", reopened, fresh)
    return Outcome(found + _compare("long-lived: ", dirty[0], fresh), sum(key[0] == "node" for key in held))


def _compare(what: str, found: dict, expected: dict) -> list[str]:
    keys = sorted(found.keys() | expected.keys(), key=str)
    return [f"{what}{key}" for key in keys if found.get(key) != expected.get(key)]


def _deleted(case: Case, store: Path, bases: Path) -> tuple[dict, frozenset]:
    """Train on everything, deleting on the way and afterwards; give what is served then, and the dirty slices."""
    left = list(case.requests)
    stage, passes = train.Trainer._stage, iter(range(10**6))

    def interrupted(self, nodes, ids, bar):
        at = next(passes)
        for request in [request for request in left if request.at == at]:
            left.remove(request)
            s3t_ext.delete(store, request.people)
        return stage(self, nodes, ids, bar)

    with mock.patch.object(train.Trainer, "_stage", interrupted):
        _fit(case, case.rows, store, bases, case.together[0])
    with Service(store) as service:
        _served(service, case)
        for request in left:
            s3t_ext.delete(store, request.people) if not request.by_service else service.delete(request.people)
        return _served(service, case), service.folder.ledger.dirty()


def _fit(case: Case, rows: list[Row], store: Path, bases: Path, together: int) -> None:
    store.parent.mkdir(exist_ok=True)
    base = bases / case.architecture
    if not base.exists():
        t.make(base, case.architecture, rows=1, people=1)
    schema = Schema(classes=CLASSES, shape=t.MODELS[case.architecture][1], scale=case.scale)
    table: Any = ingest.Table([row.subjects for row in rows], [row.value for row in rows], [row.label for row in rows])
    if case.form == ".npz":
        table = store.with_suffix(".npz")
        values, labels = np.stack([row.value for row in rows]), np.array([CLASSES[row.label] for row in rows])
        np.savez(table, subject=[json.dumps(row.subjects) for row in rows], input=values, label=labels)
    elif case.form == ".jsonl":
        lines = [{"subject": r.subjects, "input": r.value.tolist(), "label": CLASSES[r.label]} for r in rows]
        table = store.with_suffix(".jsonl")
        table.write_text("\n".join(map(json.dumps, lines)))
    config = {"nodes_per_pass": together, "progress": False, "key": t.KEY}
    s3t_ext.fit(store, table, schema, base / "base", case.config, **config)


def _served(service: Service, case: Case) -> dict:
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


def _held(store: Path, invalid: frozenset = frozenset()) -> dict:
    """List a store's live nodes with identity and weights, and the records that are left, slice by slice."""
    held: dict = {}
    with StoreFolder(store) as folder:
        slices = {cell: None if cell in invalid else digest for cell, digest in folder.ledger.slices().items()}
        for node, name in folder.trained(slices).items():
            manifest, tensors = folder.nodes.get(name)
            held["node", node] = (name, manifest["identity"], weights_hash(tensors))
        for cell in slices:
            records = folder.records.get(*cell)
            content = zip(records.keys, records.subjects, records.inputs, records.labels, strict=True)
            held["records", cell] = [(key, names, ingest.record_bytes(x, y)) for key, names, x, y in content]
    return held


@contextmanager
def _equal_salts() -> Iterator[None]:
    """Make all salts zero inside the block: identities then are functions of content, and must be equal too."""
    with mock.patch.object(ingest, "secrets", SimpleNamespace(token_bytes=bytes)):
        yield
