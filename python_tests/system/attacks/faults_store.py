"""Run with `ledger/faults.c` preloaded: of the calls of an operation on a store that change a file the n-th fails.

Arguments: the compiled library, an empty folder, an operation, how many places of each kind to visit (0: n = 1, 2, ...
until a run is clean), a seed. It prints the counts as JSON; an assertion fails where an acknowledgement came before the
record was on the disk, where anything but the product's own errors is raised, or where the store is not whole after.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import kills
import plain

from s3t_ext.ledger import LedgerError
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.store import rotate as rotation
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import StoreError, exclusive, outside
from s3t_ext.system.backup import backup, check
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.restore import restore
from s3t_ext.system.unlearn import delete_from

# A call that is interrupted for ever is repeated for ever.
KINDS = [(errno.EIO, 0), (errno.EIO, 1), (errno.ENOSPC, 0), (errno.ENOSPC, 1), (errno.EINTR, 0)]
WRITES = ("write", "pwrite", "pwrite64", "ftruncate", "ftruncate64")
SYNCS = ("fsync", "fdatasync")
LEFT_OUT = 3  # a node of the plan that the store lacks


def publish(world: plain.World, request: str, say: kills.Say) -> None:
    """Publish a node as training does."""
    shard, path = world.missing[request]
    with exclusive(world.path), StoreFolder(world.path) as folder:
        slices = folder.ledger.slices()
        parent = folder.identities(slices).get((shard, path[:-1]), "")
        say({"node": folder.nodes.put(folder.identity(shard, path, slices, parent), plain.tensors(request), {})})


def back_up(world: plain.World, request: str, say: kills.Say) -> None:
    """Write a backup, beside the store."""
    backup(world.path, world.path.parent / "backup")


def bring_back(world: plain.World, request: str, say: kills.Say) -> None:
    """Restore a store whose ledger, nodes and records are lost, from an old backup and the receipts since."""
    restore(world.path.parent / "backup", world.path, receipts=[world.path.parent / "receipts"])


def rotate(world: plain.World, request: str, say: kills.Say) -> None:
    """Alone: of what is erased afterwards a fault is a warning."""
    with exclusive(world.path):
        rotation.rotate(world.path)


OPERATIONS = {
    "delete": kills.delete, "erase": kills.erase, "publish": publish,
    "rotate": rotate, "backup": back_up, "restore": bring_back, "heal": kills.heal, "grow": kills.grow,
}  # fmt: skip
ERASES = ("delete", "erase", "publish", "backup", "restore", "heal", "grow")  # where it ends, nothing is left to erase


@dataclass
class Run:
    """How an operation ended under a fault: what it said and after how many calls, and all the calls it made."""

    said: list[dict] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    error: str = ""
    ended: str = "done"


class Faults:
    """The preloaded library, and one operation on fresh copies of one store."""

    def __init__(self, library: str, folder: Path, operation: str, seed: int) -> None:
        self.library = ctypes.CDLL(library)
        self.library.faults_call.restype = ctypes.c_char_p
        self.folder, self.operation, self.chance = folder, operation, random.Random(seed)
        self.whole = plain.make(folder / "whole" / "store")
        self.person = sorted(self.whole.cells)[0]
        self.node = ""
        self.whole.keys.append(StoreKey.find(self.whole.path))
        if operation == "publish":
            self.node = sorted(self.whole.nodes)[LEFT_OUT]
            with StoreFolder(self.whole.path) as opened:
                opened.nodes.erase(self.node)
            self.whole.missing[self.node] = self.whole.nodes[self.node]

        if operation == "restore":
            self.whole.begun = {"old": (sorted(self.whole.cells)[1],), "new": (self.person,)}
            self.lose()

    def lose(self) -> None:
        """Back the store up, delete two people, keep their receipts, and lose nearly all that is in its folder."""
        path = self.whole.path
        back_up(self.whole, "", print)
        (path.parent / "receipts").mkdir()
        with StoreFolder(path) as folder:
            for request, people in self.whole.begun.items():
                receipt = delete_from(folder, people, request)
                self.whole.acknowledge(request, receipt)
                (path.parent / "receipts" / f"{request}.json").write_bytes(canonical_json(receipt))
        for lost in ("nodes", "records"):
            shutil.rmtree(path / lost)
        (path / "ledger.sqlite").unlink()

    def fresh(self) -> tuple[plain.World, str]:
        world, request = self.whole.copy(self.folder / "now"), "new"
        world.healing = self.operation == "heal"
        if self.operation in ("publish", "restore"):
            return world, self.node
        world.begun = {"old": (sorted(world.cells)[1],), request: (self.person,)}
        with StoreFolder(world.path) as folder:
            world.acknowledge("old", delete_from(folder, world.begun["old"], "old"))
            if self.operation != "delete":
                world.acknowledge(request, delete_from(folder, world.begun[request], request))
        return world, request

    def run(self, world: plain.World, request: str, nth: int, error: int, lasting: int) -> Run:
        """Run the operation in a process of its own, under a fault."""
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            found = Run()

            def say(line: dict) -> None:
                found.said.append(line)
                found.at.append(self.library.faults_made())

            self.library.faults_arm(nth, error, lasting)
            try:
                OPERATIONS[self.operation](world, request, say)
            except (StoreError, LedgerError) as refusal:
                found.ended, found.error = "refused", str(refusal)
            except BaseException:
                found.ended, found.error = "broken", traceback.format_exc()
            self.library.faults_disarm()
            found.calls = [self.library.faults_call(n + 1).decode() for n in range(self.library.faults_made())]
            os.write(into, json.dumps(vars(found)).encode())
            os._exit(0)
        os.close(into)
        with open(out, "rb") as lines:
            found = Run(**json.loads(lines.read()))
        assert os.waitpid(pid, 0)[1] == 0
        return found

    def visit(self, nth: int, error: int, lasting: int) -> tuple[bool, Run]:
        """Put one fault; check what it left, and that the operation can be repeated. Tell whether it met a call."""
        world, request = self.fresh()
        found = self.run(world, request, nth, error, lasting)
        assert found.ended != "broken", f"{nth}: {found.error}"
        fired = nth <= len(found.calls)
        if self.operation != "publish":
            for receipt, at in zip(found.said, found.at, strict=True):
                world.acknowledge(request, receipt)
                if error != errno.EINTR:  # the call was made again, at once
                    on_the_disk(found.calls[:at], nth, lasting, world.path)
        whole, already = replace(world, missing={}), self.operation in ERASES
        if self.operation == "restore" and found.ended == "refused":
            with suppress(StoreError, LedgerError):  # it opens when it is whole; if before, it serves nobody dead
                replace(world, missing=world.nodes).check()
        else:
            world.check()
        if found.ended == "done":
            whole.settle(already)
        if (world.path.parent / "backup").exists() and self.operation == "backup":
            check(world.path.parent / "backup")
            shutil.rmtree(world.path.parent / "backup")
        again = self.run(world, request, 0, 0, 0)
        assert again.ended == "done", again.error
        whole.settle(already)
        if self.operation == "rotate":
            whole.rotated()
        return fired, found


def on_the_disk(calls: list[str], nth: int, lasting: int, store: Path) -> None:
    """Check, from the calls before an acknowledgement alone, that ledger and anchors were written and synchronised."""
    failed = [n == nth or bool(lasting and n > nth) for n in range(1, len(calls) + 1)]
    made = [call for call, bad in zip(calls, failed, strict=True) if not bad]
    lost = {call for call, bad in zip(calls, failed, strict=True) if bad}

    def last(names: tuple[str, ...], target: Path) -> int:
        return max((n for n, call in enumerate(made) if call in {f"{name} {target}" for name in names}), default=-1)

    log = store / "ledger.sqlite-wal"
    assert -1 < last(WRITES, log) < last(SYNCS, log), made
    for anchor in (store / "anchor", outside(store, "anchor")):
        part = anchor.with_name(f"{anchor.name}.new")
        steps = last(WRITES, part), last(SYNCS, part), last(("rename",), anchor), last(SYNCS, anchor.parent)
        assert last(SYNCS, log) < steps[0] < steps[1] < steps[2] < steps[3], made
        assert not lost & {f"{name} {path}" for name in (*WRITES, *SYNCS, "rename") for path in (log, part, anchor)}


def synchronised(calls: list[str], folder: Path) -> None:
    """Check, from the calls of a whole run, that all it wrote is on the disk and so is every name that it gave."""
    last = {call: n for n, call in enumerate(calls)}

    def after(n: int, path: Path) -> bool:
        return any(last.get(f"{name} {path}", -1) > n for name in SYNCS)

    for n, call in enumerate(calls):
        name, _, path = call.partition(" ")
        if Path(path).name in ("lock", "ledger.sqlite-wal", "ledger.sqlite-shm") or folder not in Path(path).parents:
            continue  # nothing hangs on the first and last; the log is looked at where it is acknowledged
        if name in WRITES:
            assert after(n, Path(path)) or last.get(f"unlink {path}", -1) > n, call
        elif name in ("rename", "link", "unlink"):
            assert after(n, Path(path).parent), call


def main(library: str, folder: Path, operation: str, places: int, seed: int) -> dict[str, dict]:
    faults, counts = Faults(library, folder, operation, seed), {}
    whole = faults.run(*faults.fresh(), 0, 0, 0)
    synchronised(whole.calls, folder)
    clean = len(whole.calls)
    for error, lasting in KINDS:
        seen = {"calls": clean, "visited": 0, "refused": 0, "acknowledged after a fault": []}
        picked = sorted(faults.chance.sample(range(1, clean + 1), min(places, clean)))
        nth = 0
        while not places or picked:
            nth = picked.pop(0) if places else nth + 1
            fired, found = faults.visit(nth, error, lasting)
            if not fired:
                break
            seen["visited"] += 1
            seen["refused"] += found.ended == "refused"
            if found.at and nth <= found.at[0] and error != errno.EINTR:
                seen["acknowledged after a fault"].append(found.calls[nth - 1].replace(str(folder), ""))
        counts[f"{errno.errorcode[error]} {'lasting' if lasting else 'once'}"] = seen
    return counts


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
