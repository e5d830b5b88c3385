"""Threads predict while people are deleted, here and by a second process: nothing dead is released.

Held against what requesters know: the receipts' lists of dead nodes, and when each receipt was in their hands. The
counts are printed (`pytest -rP`). S3T_LONG=1: 1,000 deletions for each number of threads, some ten minutes.
"""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field

import pytest
import tiny as t

from s3t_ext.ledger.identity import Key
from s3t_ext.system import serve
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.serve import Service

LONG = bool(os.environ.get("S3T_LONG"))
CORES = len(os.sched_getaffinity(0))
SHARDS, SLICES, SPARE = 24, 3, (0, 0)  # nobody of this slice is deleted: something is always served
ROUND = 100  # deletions of one copy of the store

DELETE = """
import json, sys, time
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.unlearn import delete_from, erase_or_warn
with StoreFolder(sys.argv[1]) as folder:
    for line in sys.stdin:
        receipt = delete_from(folder, [line.strip()], None)
        at = time.monotonic_ns()
        print(json.dumps([at, [name for shard in receipt["shards"] for name in shard["dead"]]]), flush=True)
        erase_or_warn(folder)
"""


@dataclass
class Seen:
    """What the askers and the requesters saw, in nanoseconds of the machine's clock."""

    answers: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    computed: int = 0
    died: dict[str, int] = field(default_factory=dict)
    changes: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def acknowledged(self, at: int, dead: list[str]) -> None:
        self.died |= dict.fromkeys(dead, at)
        self.changes += bool(dead)

    def stale(self) -> int:
        """Count the answers that were still being computed when the death of a node in them was acknowledged."""
        never = time.monotonic_ns()
        return sum(any(self.died.get(name, never) < at for name in nodes) for at, nodes in self.answers)


class Watched(Service):
    """A service that notes when an answer is computed, sometimes slowly, and when a receipt is there."""

    slow = (0, 0, 0.005, 0.05)  # seconds

    def __init__(self, path, seen: Seen) -> None:
        self.seen, self.mine = seen, threading.local()
        super().__init__(path)

    def _compute(self, *args):
        answer = super()._compute(*args)
        time.sleep(random.choice(self.slow))
        self.seen.computed += 1
        self.mine.at = time.monotonic_ns()
        return answer

    def acknowledge(self, subjects, request_id=None):
        receipt = super().acknowledge(subjects, request_id)
        at = time.monotonic_ns()
        self.seen.acknowledged(at, [name for shard in receipt["shards"] for name in shard["dead"]])
        return receipt


def without(old: str, new: str) -> type[Watched]:
    """Give a service whose `predict` has a line changed."""
    source = textwrap.dedent(inspect.getsource(Service.predict))
    assert source.count(old) == 1
    names = dict(vars(serve))
    exec(source.replace(old, new), names)
    return type("Changed", (Watched,), {"predict": names["predict"], "slow": (0.1,)})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    tiny = t.make(folder, rows=400, people=400)
    tiny.fit(folder / "whole" / "store", nodes_per_pass=SHARDS, shards=SHARDS, slices=SLICES, steps=1, batch=1, rank=1)
    return tiny, folder


def people(tiny, chance) -> list[str]:
    """Order people so that the first of every slice comes early, with others and strangers between."""
    cells = lay_out(tiny.table, Key(t.KEY), SHARDS, SLICES).slices
    groups = [sorted({s[0] for s in rows.subjects}) for cell, rows in cells.items() if cell != SPARE]
    first = [group.pop(chance.randrange(len(group))) for group in groups if group]
    rest = [*(name for group in groups for name in group), *(f"stranger {n}" for n in range(20))]
    order = first + chance.sample(rest, ROUND - len(first))
    chance.shuffle(order)
    return order


def stress(kind, fitted, threads: int, deletions: int, seed: int = 0, here: int = 2) -> Seen:
    """Ask from many threads while every second deletion (0: none) is made here, the rest by another process."""
    tiny, folder = fitted
    chance, seen = random.Random(seed), Seen()
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "now")
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                nodes = service.predict(tiny.table.inputs[:2]).nodes
                seen.answers.append((service.mine.at, nodes))
        except BaseException as error:
            seen.errors.append(error)

    with (
        kind(folder / "now" / "store", seen) as service,
        subprocess.Popen(
            [sys.executable, "-c", DELETE, folder / "now" / "store"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as other,
    ):  # fmt: skip
        askers = [threading.Thread(target=ask) for _ in range(threads)]
        for asker in askers:
            asker.start()
        for number, person in enumerate(people(tiny, chance)[:deletions]):
            if here and number % here:
                service.delete([person])
            else:
                print(person, file=other.stdin, flush=True)
                seen.acknowledged(*json.loads(other.stdout.readline()))
        stop.set()
        for asker in askers:
            asker.join()
        other.stdin.close()
    assert not seen.errors
    return seen


@pytest.mark.parametrize("threads", [CORES, 64], ids=["cores", "64"])
def test_nothing_dead_is_released(fitted, threads):
    deletions = ROUND if LONG or threads == CORES else 30  # a deletion waits for its turn among 64
    rounds = [stress(Watched, fitted, threads, deletions, seed) for seed in range(10 if LONG else 1)]
    answers, computed = (sum(map(count, rounds)) for count in (lambda s: len(s.answers), lambda s: s.computed))
    stale, changes = sum(seen.stale() for seen in rounds), sum(seen.changes for seen in rounds)
    print(
        f"{threads} threads, {deletions * len(rounds)} deletions, {changes} of them changed what is served: "
        f"{answers} answers released, {computed - answers} computed again, {stale} stale"
    )
    assert changes > 0.5 * deletions * len(rounds)
    assert stale == 0


@pytest.mark.parametrize(
    ("old", "new", "threads"),
    [
        ("if self.releasable(route):", "if True:", 8),
        # One thread: where there are more, another one's next request refreshes what this one compares with.
        ("self.refresh()\n        if self.rel", "if self.rel", 1),
    ],
    ids=["nodes are not compared", "the epoch is not read again"],
)
def test_without_the_release_check_it_is_seen(fitted, old, new, threads):
    stale = rounds = 0
    while stale <= 1 and rounds < 10:  # what a busy machine shows the askers is chance
        stale += stress(without(old, new), fitted, threads, 30, rounds, here=threads // 4).stale()
        rounds += 1
    print(f"{stale} stale in {rounds} rounds")
    assert stale > 1
