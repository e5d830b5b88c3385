"""Run in a process of its own: training or healing, killed at random instants, and gone on with, to the same bits.

Arguments: an empty folder, how many kills, a seed, and which of the two. It prints the counts as JSON; an assertion
fails where a store does not open, a node has other bits than one that was trained undisturbed and without the deleted,
or a dead node is there.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import kills
import tiny as t

from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.settings import Settings
from s3t_ext.system.unlearn import delete, erase_pending

Weights = dict[tuple, str]
TWO = Settings(nodes_per_pass=2)


class Training:
    """`fit` of one table; slices of who is deleted meanwhile stay dirty."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance, self.tiny = chance, t.make(folder)
        self.people = {cell: names for cell, names in t.people_by_cell(self.tiny).items() if names}
        self.cells = {name: cell for cell, names in self.people.items() for name in names}
        kills.child(lambda _: self.fit(folder / "whole" / "store"), None)
        self.whole = t.weights(folder / "whole" / "store")

    def begin(self, store: Path) -> list[str]:
        """Make ready what is worked on; give who was deleted before."""
        return []

    def fit(self, store: Path, people: Collection[str] = ()) -> None:
        """Train all, less somebody's records."""
        self.tiny.fit(store, t.without(self.tiny.table, set(people)), settings=TWO)

    def work(self, store: Path) -> None:
        self.fit(store)

    def late(self) -> str:
        """Choose who asks while it works."""
        return self.chance.choice(sorted(self.cells))

    def dirty(self, asked: list[str]) -> set[tuple[int, int]]:
        """Name the slices that stay dirty."""
        return {self.cells[name] for name in asked}

    def expected(self, asked: list[str]) -> Weights:
        dirty = self.dirty(asked)
        return {node: w for node, w in self.whole.items() if not any((node[0], k) in dirty for k in node[1])}


class Healing(Training):
    """`heal` of a store with two dirty slices; what is expected was trained from the table without the deleted."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(folder, chance)
        self.store, self.folder, self.trained = folder / "whole" / "store", folder, dict[int, Weights]()

    def begin(self, store: Path) -> list[str]:
        first = [self.people[0, 0][0], self.people[1, 1][0]]
        shutil.copytree(self.store, store)
        for kind in ("key", "anchor"):
            shutil.copy2(self.store.with_name(f"store.{kind}"), store.with_name(f"store.{kind}"))
        delete(store, first)
        return first

    def work(self, store: Path) -> None:
        heal(store, settings=TWO, progress=False)

    def late(self) -> str:
        return self.people[0, 1][0]

    def dirty(self, asked: list[str]) -> set[tuple[int, int]]:
        return set()

    def expected(self, asked: list[str]) -> Weights:
        if len(asked) not in self.trained:
            fresh = self.folder / f"without {len(asked)}"
            kills.child(lambda _: self.fit(fresh, asked), None)
            self.trained[len(asked)] = t.weights(fresh)
        return self.trained[len(asked)]


def check(task: Training, store: Path, asked: list[str]) -> tuple[int, bool]:
    """Open what a killed run left; return how many nodes it has, and whether those slices are dirty that stay so."""
    if not store.exists():
        return 0, False
    found = t.weights(store)
    assert found.items() <= task.expected(asked).items(), "a node has other bits, or is dead"
    with StoreFolder(store) as folder:
        assert folder.ledger.fence.read() == folder.ledger.seq
        return len(found), folder.ledger.dirty() == task.dirty(asked)


def main(folder: Path, count: int, seed: int, what: str) -> dict[str, object]:
    chance = random.Random(seed)
    task = {"training": Training, "healing": Healing}[what](folder, chance)
    task.begin(folder / "again" / "store")
    duration = kills.child(lambda _: task.work(folder / "again" / "store"), None)[2]
    counts = {"runs": 0, "kills": 0, "before there was a store": 0, "with nodes missing": 0, "deletions": 0}
    number = 0
    while counts["kills"] < count or (counts["with nodes missing"] <= count // 5 and number < 3 * count):
        number += 1
        store = folder / str(number) / "store"
        asked, working, late = task.begin(store), True, False
        while working:
            _, working, _ = kills.child(lambda _: task.work(store), chance.uniform(0, duration))  # noqa: B023
            nodes, settled = check(task, store, asked)
            counts["runs"] += 1
            counts["kills"] += working
            counts["before there was a store"] += not store.exists()
            counts["with nodes missing"] += settled and 0 < nodes < len(task.expected(asked))
            if working and store.exists() and not late and chance.random() < 0.3:
                asked.append(task.late())
                delete(store, asked[-1:])
                late = True
                counts["deletions"] += 1
        assert settled, "slices are dirty that nobody asked for, or were not healed"
        assert t.weights(store) == task.expected(asked), "what was gone on with ends with other bits"
        with StoreFolder(store) as opened:
            erase_pending(opened)
            names = opened.identities(opened.ledger.slices()).values()
            assert {path.name.partition(".")[0] for path in opened.nodes.folder.iterdir()} == set(names)
        assert not [path.name for path in store.parent.rglob("*.part")]
    return {**counts, "stores": number, "ms of a whole one": round(1000 * duration)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
