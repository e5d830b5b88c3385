"""Cases of non-interference, each drawn from its number alone: a table, a plan, and whom to delete when."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tiny as t

from s3t_ext.ledger.identity import Key, normalise_subject
from s3t_ext.ledger.partition import place
from s3t_ext.system.config import Config

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
    """One comparison; ``together`` are the nodes a pass of the two runs, which promise the same bits.

    ``shuffled``: the table without X is in another order; ``killed``: training ends at the first request, and the same
    command goes on afterwards, with the deleted people in its table. ``healed``: what was deleted from is healed.
    """

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
    killed: bool
    healed: bool

    @property
    def people(self) -> set[str]:
        return {normalise_subject(name) for request in self.requests for name in request.people}

    def hit(self, row: Row) -> bool:
        return any(normalise_subject(name) in self.people for name in row.subjects)

    def __str__(self) -> str:
        return (
            f"interference_cases.draw({self.number}): {self.removed}, {self.architecture}, {self.form}, "
            f"{len(self.rows)} records, {self.config}, {self.requests}"
        )


def draw(number: int) -> Case:
    """Draw a case; kinds of X take turns. What would leave no record is drawn again."""
    attempts = (_draw(number, random.Random(f"{number} {attempt}")) for attempt in itertools.count())
    return next(case for case in attempts if not all(map(case.hit, case.rows)))


def _draw(number: int, rng: random.Random) -> Case:
    removed, architecture = list(REMOVED)[number % len(REMOVED)], rng.choice(["mlp", "mlp", "vit"])
    config = draw_config(rng)
    rows = draw_rows(rng, t.MODELS[architecture][1])
    people = REMOVED[removed](rows, rng, config)
    passes = rng.choice([0, 0, 1, 3, 6])  # 0: all requests come after training
    requests = [
        Request(rng.randrange(passes) if passes else 10**6, tuple(batch), rng.random() < 0.5)
        for batch in _batches(rng, sorted(people))
    ]
    together = rng.choice([(3, 3), (1, 4), (5, 2)])
    scale, form = rng.choice([1.0, 0.1, 255.0]), rng.choice(FORMS)
    shuffled, killed = rng.random() < 0.3, rng.random() < 0.3
    healed = number % 5 == 2
    return Case(number, removed, architecture, config, scale, form, rows, requests, together, shuffled, killed, healed)


def draw_config(rng: random.Random) -> Config:
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
        targets=rng.choice(["all-linear", ("fc1",), ("layers.0.fc2", "layers.1.fc2", "layers.2.fc2")]),
        rank=rng.randint(1, 3),
        lr=rng.choice([1e-2, 3e-3]),
        weight_decay=rng.choice([0.0, 0.1]),
        dropout=rng.choice([0.0, 0.0, 0.4]),
        steps=rng.randint(1, 4),
        batch=rng.randint(1, 5),
        combine=rng.choice(["probabilities", "logits", "vote"]),
    )


def draw_rows(rng: random.Random, shape: tuple[int, ...]) -> list[Row]:
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


def slice_of(name: str, config: Config) -> tuple[int, int]:
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
    cell = slice_of(rng.choice(_owners(rows)), config)
    return {name for name in _owners(rows) if slice_of(name, config) == cell}


def _large_share(rows: list[Row], rng: random.Random, config: Config) -> set[str]:
    """All people of as many slices as leave something: sums and means over the table move by much."""
    cells = sorted({slice_of(name, config) for name in _owners(rows)})
    kept = {rng.choice(cells), rng.choice(cells)}
    return {name for name in _owners(rows) if slice_of(name, config) not in kept} or {rng.choice(_owners(rows))}


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
