"""Run in a process of its own, without torch: backup and restore, killed at random instants.

Arguments: an empty folder, how many kills of each, a seed. A kill that came too late is not counted. It prints the
counts as JSON; an assertion fails where half a backup looks whole, or a half-restored store serves a dead node.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import kills
import plain
from histories import History

from s3t_ext.ledger import LedgerError
from s3t_ext.store.files import StoreError
from s3t_ext.system.backup import backup, check
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.restore import restore


def back_up(world: plain.World, dest: Path, say: kills.Say) -> None:
    backup(world.path, dest)


def bring_back(world: plain.World, aside: Path, say: kills.Say) -> None:
    restore(aside / "backup", world.path, receipts=[aside / "receipts"])


def fresh(folder: Path, whole: plain.World) -> History:
    shutil.rmtree(folder / "aside", ignore_errors=True)
    (folder / "aside").mkdir()
    return History(whole.copy(folder / "now"), folder / "aside")


def kill_backups(folder: Path, whole: plain.World, count: int, chance: random.Random) -> dict[str, int]:
    counts = {"kills": 0, "whole": 0, "not there": 0}
    history = fresh(folder, whole)
    duration = kills.child(partial(back_up, history.world, folder / "aside" / "first"), None)[2]
    while counts["kills"] < count:
        history = fresh(folder, whole)
        dest = folder / "aside" / "backup"
        history.delete(*chance.sample(history.people, 2), erase=False)
        _, hit, _ = kills.child(partial(back_up, history.world, dest), chance.uniform(0, 1.2 * duration))
        history.world.check()
        counts["kills"] += hit
        counts["whole" if dest.exists() else "not there"] += hit
        if not dest.exists():
            history.backup()
        check(dest)
        assert not list(dest.parent.glob(".*.part"))
        history.world.settle()
        history.lose()
        restore(dest, history.world.path)
        history.world.settle()
    return counts


def kill_restores(folder: Path, whole: plain.World, count: int, chance: random.Random) -> dict[str, int]:
    counts = {"kills": 0, "stores": 0, "no store yet": 0, "refused": 0, "served": 0}
    durations: list[float] = []
    while counts["kills"] < count:
        history = fresh(folder, whole)
        history.delete(*chance.sample(history.people, 2))
        history.backup()
        snapshot = history.snapshot("snapshot")
        for person in chance.sample(history.people, 3):
            history.delete(person)
        if counts["stores"] % 2:
            history.put_back(snapshot)
        else:
            history.lose()
        once = partial(bring_back, history.world, folder / "aside")
        left = count - counts["kills"] if durations else 0
        for after in sorted(chance.uniform(0, max(durations)) for _ in range(min(4, left))):
            _, hit, _ = kills.child(once, after)
            counts["kills"] += hit
            counts[half_way(history)] += hit
            if not hit:
                break
        durations = [*durations[-4:], kills.child(once, None)[2]]  # of what is left to do: some were the whole
        history.world.settle()
        counts["stores"] += 1
    return counts


def half_way(history: History) -> str:
    """Look at what a killed restore left: nothing that serves, or nothing dead in it."""
    try:
        with StoreFolder(history.world.path) as folder:
            slices = folder.ledger.slices()
            served = folder.trained(slices).values()
            assert {row.request_id for row in folder.ledger.requests()} == history.world.acknowledged.keys()
    except LedgerError as error:
        return _as("refused", error, "s3t restore", "No such file")
    except StoreError as error:
        return _as("no store yet", error, "holds no store")
    gone = {person for people in history.world.begun.values() for person in people}
    assert not history.world.dead({history.world.cells[person] for person in gone}) & set(served)
    return "served"


def _as(outcome: str, error: Exception, *known: str) -> str:
    if not any(text in str(error) for text in known):
        raise error
    return outcome


def main(folder: Path, count: int, seed: int) -> dict[str, dict]:
    whole = plain.make(folder / "whole" / "store")
    found = {
        "backup": kill_backups(folder, whole, count, random.Random(seed)),
        "restore": kill_restores(folder, whole, count, random.Random(seed + 1)),
    }
    assert "torch" not in sys.modules
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
