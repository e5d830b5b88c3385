"""Histories of non-interference, each drawn from its number: fit, delete, heal, grow, re-admit, some killed on the way.

``differences`` lives through one, and through the world beside it, whose tables never held the deleted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiny as t
from interference import compare, equal_salts, fit, held, served
from interference_cases import FORMS, Row, draw_config, draw_rows
from points import meeting

import s3t_ext
from s3t_ext.ledger.identity import normalise_subject
from s3t_ext.system.config import Config
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.serve import Service
from s3t_ext.system.settings import Settings
from s3t_ext.system.unlearn import erase_pending

GENERATIONS, POINTS = 3, 40


class Outcome(NamedTuple):
    """What differs, how many live nodes were compared, and what happened on the way."""

    differences: list[str]
    nodes: int
    log: list[str]


class _Killed(Exception):
    """An operation ends here, as by a signal."""


@dataclass
class World:
    """A store and what happens to it, and the test's own record of whose words stand.

    Args:
        tables: rows of each generation; ``deleted``: people who are, now; ``back``: generation that one came back with.
    """

    number: int
    rng: random.Random
    store: Path
    bases: Path
    architecture: str
    config: Config
    scale: float
    form: str
    rows: list[Row]
    tables: list[list[Row]] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    back: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def gone(self, generation: int) -> set[str]:
        """Name those whose records of a generation are to have left no trace."""
        return self.deleted | {name for name, came in self.back.items() if came > generation}

    def rest(self, generation: int) -> list[Row]:
        gone = self.gone(generation)
        return [row for row in self.tables[generation] if not gone & set(map(normalise_subject, row.subjects))]

    # --- what happens ------------------------------------------------------------------------------------------------

    def live(self) -> Service:
        """Make the store, open a service on it, and let things happen to it."""
        self._begin()
        service = Service(self.store)
        for _ in range(self.rng.randint(3, 7)):
            kinds = {self.delete: 5, self.heal: 3, self.grow: 2 * (len(self.tables) < GENERATIONS)}
            self.rng.choices(list(kinds), list(kinds.values()))[0](service)
            served(service, self)  # answered in between
        return service

    def _begin(self) -> None:
        self.tables.append(self.rows)
        while not self._done("fit", lambda: fit(self, self.rows, self.store, self.bases, self.rng.randint(1, 4))):
            if self.store.exists() and self.rng.random() < 0.5:
                self.delete(None)

    def delete(self, service: Service | None) -> None:
        names = [f"person {self.rng.randrange(16)}" for _ in range(self.rng.choice((1, 1, 3)))]
        names += ["witness"] * (self.rng.random() < 0.1)
        self.log.append(f"delete {names}")
        if service and self.rng.random() < 0.5:
            service.delete(list(map(str.upper, names)))
        else:
            while not self._done("delete", lambda: s3t_ext.delete(self.store, names)):
                pass
        self.deleted |= set(names)
        for name in names:
            self.back.pop(name, None)

    def heal(self, _: Service | None = None, whole: bool = False) -> None:
        budget = None if whole else self.rng.choice((None, None, 3, 0))
        settings = Settings(nodes_per_pass=self.rng.randint(1, 4))
        self.log.append(f"heal {budget}")
        self._done("heal", lambda: heal(self.store, budget=budget, settings=settings, progress=False))

    def grow(self, _: Service) -> None:
        rows = draw(self.rng, self.architecture)
        here = {normalise_subject(name) for row in rows for name in row.subjects}
        back = [name for name in sorted(self.deleted & here) if self.rng.random() < 0.5]
        shards, generation = self.rng.randint(1, 2), len(self.tables)
        self.log.append(f"grow, readmit {back}")
        beside = self.store.parent / "more" / self.store.name  # where the table lies, if it is a file
        beside.parent.mkdir(exist_ok=True)

        def grow() -> None:
            more = {"grow": True, "grow_shards": shards, "readmit": back, "beside": beside}
            fit(self, rows, self.store, self.bases, 3, **more)

        while not self._done("grow", grow):
            self._entered(rows, back)
            if self.rng.random() < 0.5:
                self.delete(None)
                if len(self.tables) > generation:  # a repeated command lets nobody in who asked again since
                    back = [name for name in back if name not in self.deleted]
            if self.rng.random() < 0.3:
                return  # nobody goes on
        self._entered(rows, back)

    def _entered(self, rows: list[Row], back: list[str]) -> None:
        with StoreFolder(self.store) as folder:
            if len(folder.ledger.generations) == len(self.tables):
                return
        self.back |= dict.fromkeys(back, len(self.tables))
        self.deleted -= set(back)
        self.tables.append(rows)

    def _done(self, name: str, operation: Callable[[], object]) -> bool:
        """Tell whether an operation came to its end: some are killed."""
        nth = self.rng.randint(1, POINTS) if self.rng.random() < 0.3 else 10**9
        killed: list[str] = []

        def stop(point: str) -> None:
            killed.append(point)
            raise _Killed

        with meeting(nth, stop), suppress(_Killed):
            operation()
        self.log += [f"{name} killed {point}" for point in killed]
        return not killed


def draw(rng: random.Random, architecture: str) -> list[Row]:
    """Draw a table; one person in it is never deleted, so that something is left."""
    shape = t.MODELS[architecture][1]
    own = np.random.default_rng(rng.getrandbits(32)).normal(size=shape).astype(np.float32)
    return [*draw_rows(rng, shape), Row(("keeper",), own, 0)]


def differences(number: int, folder: Path, bases: Path) -> Outcome:
    """Live through a history in an empty folder; ``bases`` keeps the base models from one to the next."""
    rng = random.Random(f"history {number}")
    architecture = rng.choice(["mlp", "mlp", "vit"])
    kind = (architecture, draw_config(rng), rng.choice([1.0, 0.1]), rng.choice(FORMS), draw(rng, architecture))
    world = World(number, rng, folder / "lived" / "store", bases, *kind)
    world.store.parent.mkdir(parents=True)
    with equal_salts():
        with world.live() as service:
            whole = rng.random() < 0.5
            if whole:
                while _unfinished(world.store):
                    world.heal(whole=True)
            with StoreFolder(world.store) as opened:
                erase_pending(opened)
                left, dirty = residue(opened), opened.ledger.dirty()
            service.refresh()
            service.settle()
            long_lived = served(service, world)
        found = held(world.store)
        with Service(world.store) as service:
            reopened = served(service, world)
        beside = _without(world, folder / "beside" / "store", {key[1] for key in found if key[0] == "node"}, whole)
        with Service(beside) as service:
            service._mask(dirty)
            fresh = served(service, world)
        expected = held(beside, dirty)
    wrong = [f"left of the deleted: {left}"] if left else []
    wrong += compare("", found, expected) + compare("reopened: ", reopened, fresh)
    return Outcome(wrong + compare("long-lived: ", long_lived, fresh), sum(k[0] == "node" for k in found), world.log)


def _unfinished(store: Path) -> bool:
    with StoreFolder(store) as folder:
        slices = folder.ledger.slices()
        return bool(folder.ledger.dirty()) or len(folder.trained(slices)) < len(list(folder.plan_nodes(slices)))


def _without(world: World, store: Path, nodes: set, whole: bool) -> Path:
    """Make the store of the world beside, with the nodes that this one has trained, or all where it should have all."""
    store.parent.mkdir(parents=True)
    with StoreFolder(world.store) as folder:
        sizes = [generation.shards for generation in folder.ledger.generations]
    for generation, shards in enumerate(sizes):
        more = {"grow": True, "grow_shards": shards} if generation else {}
        fit(world, world.rest(generation), store, world.bases, 2, **more)
    with StoreFolder(store) as folder:
        for node, name in folder.trained(folder.ledger.slices()).items():
            if not whole and node not in nodes:
                folder.nodes.erase(name)
    return store
