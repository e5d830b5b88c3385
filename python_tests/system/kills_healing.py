"""Run in a process of its own: healing killed at random instants, and gone on with, to the same bits.

Arguments: an empty folder, how many kills, a seed. It prints the counts as JSON; an assertion fails where a store does
not open, a node has other bits than one trained without the deleted, or a dead node is there.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import kills_training as training
import tiny as t

from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.settings import Settings
from s3t_ext.system.unlearn import delete, erase_pending


def copy(store: Path, to: Path) -> None:
    shutil.copytree(store, to)
    for kind in ("key", "anchor"):
        shutil.copy2(store.with_name(f"{store.name}.{kind}"), to.with_name(f"{to.name}.{kind}"))


def main(folder: Path, kills: int, seed: int) -> dict[str, object]:
    chance, tiny = random.Random(seed), t.make(folder)
    whole = folder / "whole" / "store"
    people = {cell: names[0] for cell, names in t.people_by_cell(tiny).items() if names}
    first, late = [people[0, 0], people[1, 1]], people[0, 1]
    training.child(partial(tiny.fit, whole), None)
    expected = {}
    for asked in ((*first,), (*first, late)):
        fresh = folder / f"without {len(asked)}"
        training.child(partial(tiny.fit, fresh, t.without(tiny.table, set(asked))), None)
        expected[len(asked)] = t.weights(fresh)
    copy(whole, folder / "again")
    delete(folder / "again", [*first, late])
    duration = training.child(
        partial(heal, folder / "again", settings=Settings(nodes_per_pass=2), progress=False), None
    )[1]
    counts = {"runs": 0, "kills": 0, "with nodes missing": 0, "healed with nodes missing": 0, "deletions": 0}
    number = 0
    while counts["kills"] < kills:
        number += 1
        store, asked, working = folder / str(number) / "store", list(first), True
        copy(whole, store)
        delete(store, first)
        while working:
            working, _ = training.child(
                partial(heal, store, settings=Settings(nodes_per_pass=2), progress=False), chance.uniform(0, duration)
            )
            found = t.weights(store)
            assert found.items() <= expected[len(asked)].items(), "a node has other bits"
            with StoreFolder(store) as opened:
                assert opened.ledger.fence.read() == opened.ledger.seq
                clean = not opened.ledger.dirty()
            counts["runs"] += 1
            counts["kills"] += working
            counts["with nodes missing"] += len(found) < 14
            counts["healed with nodes missing"] += clean and len(found) < 14
            if working and late not in asked and chance.random() < 0.3:
                delete(store, [late])
                asked.append(late)
                counts["deletions"] += 1
        assert t.weights(store) == expected[len(asked)], "healing that went on ends with other bits"
        with StoreFolder(store) as opened:
            erase_pending(opened)
            names = opened.identities(opened.ledger.slices()).values()
            assert {path.name.partition(".")[0] for path in opened.nodes.folder.iterdir()} == set(names)
        assert not [path.name for path in store.parent.rglob("*.part")]
    return {**counts, "stores": number, "ms of a whole one": round(1000 * duration)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
