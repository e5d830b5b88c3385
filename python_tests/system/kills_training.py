"""Run in a process of its own: training killed at random instants, and gone on with, to the same bits.

Arguments: an empty folder, how many kills, a seed. It prints the counts as JSON; an assertion fails where a store does
not open, a node has other bits than in a run that nobody disturbed, or a deleted person's node comes back.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tiny as t

from s3t_ext.ledger.identity import Key
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.unlearn import delete, erase_pending

Weights = dict[tuple, str]


def fit(tiny: t.Tiny, store: Path, after: float | None) -> tuple[bool, float]:
    """Train in a process that is killed `after` seconds; return whether it was at work then, and how long it took."""
    return child(partial(tiny.fit, store, nodes_per_pass=2), after)


def child(work: Callable[[], object], after: float | None) -> tuple[bool, float]:
    """Work in a process that is killed `after` seconds; return whether it was at work then, and how long it took."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    handle = os.pidfd_open(pid)
    if not select.select([handle], [], [], after)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(handle)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0, time.perf_counter() - start


def check(store: Path, whole: Weights, deleted: set[tuple[int, int]]) -> int:
    """Open what a killed run left; return how many nodes it has, all of the undisturbed run's bits and none dead."""
    if not store.exists():
        return 0
    found = t.weights(store)
    assert found.items() <= whole.items()
    assert not [node for node in found if any((node[0], k) in deleted for k in node[1])]
    with StoreFolder(store) as folder:
        assert folder.ledger.fence.read() == folder.ledger.seq
        assert folder.ledger.dirty() == deleted
    return len(found)


def main(folder: Path, kills: int, seed: int) -> dict[str, object]:
    chance, tiny = random.Random(seed), t.make(folder)
    reference = folder / "whole" / "store"
    fit(tiny, reference, None)
    duration = fit(tiny, folder / "again" / "store", None)[1]
    whole = t.weights(reference)
    cells = {n: cell for cell, rows in lay_out(tiny.table, Key(t.KEY), 2, 3).slices.items() for n, *_ in rows.subjects}
    counts = {"runs": 0, "kills": 0, "before there was a store": 0, "with nodes missing": 0, "deletions": 0}
    number = 0
    while counts["kills"] < kills:
        number += 1
        store, deleted, working = folder / str(number) / "store", set(), True
        while working:
            working, _ = fit(tiny, store, chance.uniform(0, duration))
            counts["runs"] += 1
            counts["kills"] += working
            nodes = check(store, whole, deleted)
            counts["before there was a store"] += not store.exists()
            counts["with nodes missing"] += 0 < nodes < len(whole)
            if working and store.exists() and not deleted and number % 2:
                person = chance.choice(sorted(cells))
                delete(store, [person])
                deleted = {cells[person]}
                counts["deletions"] += 1
        live = {node: w for node, w in whole.items() if not any((node[0], k) in deleted for k in node[1])}
        assert t.weights(store) == live, "resumed training ends with other bits"
        with StoreFolder(store) as opened:
            erase_pending(opened)
            names = opened.identities(opened.ledger.slices()).values()
            assert {path.name.partition(".")[0] for path in opened.nodes.folder.iterdir()} == set(names)
        assert not [path.name for path in store.parent.rglob("*.part")]
    return {**counts, "stores": number, "ms of a whole one": round(1000 * duration)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
