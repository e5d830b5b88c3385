"""Run in a process of its own, without torch: operations on a store, killed at random instants.

Arguments: an empty folder, how many kills of each operation, a seed, names of operations. A kill that came too late is
not counted. It prints the counts as JSON; an assertion fails where anything is lost, served though dead, readable
though erased, or does not open.
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

import plain

from s3t_ext.cli import main as cli
from s3t_ext.store.crypt import StoreKey
from s3t_ext.system import growth, unlearn
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.growth import find_generation
from s3t_ext.system.heal import cleanse
from s3t_ext.system.unlearn import delete_from, erase_pending

Say = Callable[[object], None]  # a line to the parent


def delete(world: plain.World, request: str, say: Say) -> None:
    """Acknowledge as soon as there is a receipt, then erase, as a service does."""
    with StoreFolder(world.path) as folder:
        say(delete_from(folder, world.begun[request], request))
        erase_pending(folder)


def command(world: plain.World, request: str, say: Say) -> None:
    """`s3t delete`, whose output is the parent's pipe."""
    assert not cli.main(["delete", str(world.path), *world.begun[request], "--request-id", request, "--json"])


def erase(world: plain.World, request: str, say: Say) -> None:
    """Erase what earlier requests, acknowledged by now, left behind."""
    with StoreFolder(world.path) as folder:
        erase_pending(folder)


def sweep(world: plain.World, request: str, say: Say) -> None:
    """`s3t erase`: the same, and whatever else of the dead it finds."""
    assert not cli.main(["erase", str(world.path), "--json"])


def rotate(world: plain.World, request: str, say: Say) -> None:
    """Give the store another store key."""
    unlearn.rotate(world.path)


def heal(world: plain.World, request: str, say: Say) -> None:
    """Make dirty slices clean; that killed training goes on is seen in kills_training.py."""
    with StoreFolder(world.path) as folder, unlearn.writing(folder):
        cleanse(folder)


def grow(world: plain.World, request: str, say: Say) -> None:
    """Open new shards, as `s3t fit --grow` does; what is there is not opened again."""
    with StoreFolder(world.path) as folder, unlearn.writing(folder):
        unlearn.erase(folder)
        if find_generation(folder, plain.newcomers)[0] is None:
            growth.grow(folder, plain.newcomers, 2)


OPERATIONS = {
    "delete": delete, "command": command, "erase": erase, "sweep": sweep, "rotate": rotate, "heal": heal, "grow": grow,
}  # fmt: skip
REQUESTS = ("delete", "command")  # those that are one


def child(work: Callable[[Say], object], after: float | None) -> tuple[list[dict], bool, float]:
    """Work in a process that is killed `after` seconds; None: let it end.

    Returns:
        The lines that it said, whether the kill met it at work, its duration in seconds.
    """
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(into, 1)
        os.write(1, b"{}\n")  # the clock starts
        work(lambda line: os.write(1, json.dumps(line).encode() + b"\n"))
        os.write(1, b"done\n")
        os._exit(0)
    os.close(into)
    with open(out, "rb") as lines:
        assert lines.readline() == b"{}\n"
        start = time.perf_counter()
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], after)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(handle)
        said = lines.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    done = said.endswith(b"done\n")
    whole = said.removesuffix(b"done\n").split(b"\n")[:-1]  # a line that was cut is no acknowledgement
    return [json.loads(line) for line in whole], not done, time.perf_counter() - start


class Kills:
    """One operation, again and again, on copies of one store that last until their slices are dirty."""

    def __init__(self, folder: Path, whole: plain.World, operation: str, seed: int) -> None:
        self.folder, self.whole, self.operation = folder, whole, operation
        self.chance = random.Random(seed)
        self.number = 0
        self.counts = {"runs": 0, "kills": 0, "acknowledged": 0, "in the log without": 0, "stores": 0}
        self.renew()
        self.duration = sorted(self.once(None)[2] for _ in range(5))[3]
        self.renew()

    def renew(self) -> None:
        self.world = self.whole.copy(self.folder / "now")
        self.world.healing = self.operation == "heal"
        self.left = sorted(self.world.cells)
        self.chance.shuffle(self.left)
        self.counts["stores"] += 1

    def once(self, after: float | None) -> tuple[list[dict], bool, float]:
        self.number += 1
        request, world = f"r{self.number}", self.world
        world.keys.append(StoreKey.find(world.path))
        world.begun[request] = tuple(self.left.pop() for _ in range(self.chance.choice((1, 1, 2))))
        if self.operation not in REQUESTS:
            with StoreFolder(world.path) as folder:
                world.acknowledge(request, delete_from(folder, world.begun[request], request))
        said, hit, seconds = child(partial(OPERATIONS[self.operation], world, request), after)
        if self.operation in REQUESTS:
            for receipt in said:
                world.acknowledge(request, receipt)
        return said, hit, seconds

    def kill(self) -> None:
        said, hit, _ = self.once(self.chance.uniform(0, self.duration))
        self.counts["runs"] += 1
        self.counts["kills"] += hit
        self.counts["acknowledged"] += self.operation in REQUESTS and bool(said)
        self.world.check()
        request = f"r{self.number}"
        if self.operation in REQUESTS and not said:
            with StoreFolder(self.world.path) as folder:
                self.counts["in the log without"] += request in {row.request_id for row in folder.ledger.requests()}
                if self.chance.random() < 0.5:  # who got no answer sends the same again
                    self.world.acknowledge(request, delete_from(folder, self.world.begun[request], request))
        if self.chance.random() < 0.5:
            self.end()
        if len(self.left) < 12:
            self.end()
            with StoreFolder(self.world.path) as folder:
                assert all(folder.ledger.receipt(name) for name in self.world.acknowledged)
            self.renew()

    def end(self) -> None:
        """Let the operation end, where it does not by itself: nothing of what it was to remove is left."""
        if self.operation == "rotate":
            self.world.keys = self.world.keys or [StoreKey.find(self.world.path)]  # a new copy, not yet rotated
            unlearn.rotate(self.world.path)
            self.world.rotated()
        if self.operation in ("heal", "grow"):
            OPERATIONS[self.operation](self.world, "", print)
            with StoreFolder(self.world.path) as folder:
                assert self.operation != "heal" or not folder.ledger.dirty()
                assert len(folder.ledger.generations) == 1 + (self.operation == "grow")
        self.world.settle()


def main(folder: Path, kills: int, seed: int, operations: list[str]) -> dict[str, dict]:
    whole, found = plain.make(folder / "whole" / "store"), {}
    cli.parser()  # imports what a command would
    for index, operation in enumerate(operations):
        run = Kills(folder, whole, operation, seed + index)
        while run.counts["kills"] < kills:
            run.kill()
        run.end()
        found[operation] = {**run.counts, "ms of a whole one": round(1000 * run.duration, 1)}
    assert "torch" not in sys.modules
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
