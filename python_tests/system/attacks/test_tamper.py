"""Every file of a store, and what lies beside it, cut or flipped: refused, or of no effect on anything that is read.

The ledger has tests of its own. The counts are printed (`pytest -rP`). S3T_LONG=1 visits every byte, ten minutes.
"""

import os
import random
import re
from collections import Counter
from pathlib import Path

import plain
import pytest

from s3t_ext.ledger import LedgerError
from s3t_ext.ledger.identity import canonical_json
from s3t_ext.ledger.signature import fault, read_public, read_receipt
from s3t_ext.store.files import StoreError
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.backup import backup, check
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.unlearn import delete

LONG = bool(os.environ.get("S3T_LONG"))
SAMPLE = 8  # places of a file
REFUSALS = (StoreError, LedgerError, ValueError)  # the last for a file that is given by hand


class Refused(Exception):
    """A reader said that what it read is not what was written."""


@pytest.fixture
def world(ram) -> plain.World:
    """A small store with a dead node and its receipt, a pending request, and a backup of the time before that."""
    world = plain.make(ram / "at" / "store", shards=1, slices=3, people=9)
    for request, cell in (("r1", (0, 0)), ("r2", (0, 2))):
        world.begun[request] = (next(name for name, at in world.cells.items() if at == cell),)
        receipt = delete(world.path, world.begun[request], request)
        world.acknowledge(request, receipt)
        (ram / "at" / f"{request}.receipt").write_bytes(canonical_json(receipt))
        if request == "r1":
            backup(world.path, ram / "at" / "backup")
    return world


def books(store: Path) -> object:
    with StoreFolder(store) as folder:
        ledger = folder.ledger
        requests = ledger.requests()
        receipts = [ledger.receipt(row.request_id) for row in requests]
        return ledger.slices(), requests, receipts, ledger.fence.read(), ledger.meta


def served(store: Path) -> dict:
    with StoreFolder(store) as folder:
        return folder.trained(folder.ledger.slices())


def nodes(store: Path) -> dict:
    with StoreFolder(store) as folder:
        found = {name: folder.nodes.get(name) for name in folder.trained(folder.ledger.slices()).values()}
        return {name: (manifest, weights_hash(tensors)) for name, (manifest, tensors) in found.items()}


def records(store: Path) -> object:
    with StoreFolder(store) as folder:
        found = {cell: folder.records.get(*cell) for cell in folder.ledger.slices()}
        return {
            cell: (r.subjects, r.keys, r.salts, r.inputs.tobytes(), r.labels.tobytes()) for cell, r in found.items()
        }


def declared(store: Path) -> object:
    with StoreFolder(store) as folder:
        return folder.schema, folder.config, folder.key.hex(), folder.signing_key.hex(), folder.head().tobytes()


def receipts(store: Path) -> dict:
    """Check the receipts as somebody does who has them and public.json."""
    public, found = read_public(store / "public.json"), {}
    for path in sorted(store.parent.glob("*.receipt")):
        receipt = read_receipt(path)
        if fault(receipt, public):
            raise Refused
        found[receipt["request_id"]] = receipt
    return found


def copy(store: Path) -> object:
    return check(store.parent / "backup")


PARTS = (books, served, nodes, records, declared, receipts, copy)


def read(store: Path, whole: dict | None = None, fewer: bool = False) -> tuple[dict, int]:
    """Read everything in parts, each held against what it was (`fewer`: some may be missing); count the refusals."""
    found, refused = {}, 0
    for part in PARTS:
        try:
            found[part] = part(store)
        except (*REFUSALS, Refused):
            refused += 1
            continue
        if fewer and part in (served, nodes, receipts):
            refused += len(found[part]) < len(whole[part])
            assert found[part].items() <= whole[part].items(), part
        else:
            assert whole is None or found[part] == whole[part], part
    return found, refused


def test_what_is_cut_or_flipped_anywhere_is_refused_or_changes_nothing(world):
    folder, chance = world.path.parent, random.Random(9)
    whole, refused = read(world.path)
    assert not refused
    assert len(whole) == len(PARTS)
    held = files(folder)
    seen: dict[str, Counter] = {}
    for victim, data in victims(world, held).items():
        kind = re.sub(r"[0-9a-f]{64}|\d-\d|r\d", "*", str(victim.relative_to(folder)))
        counts = seen.setdefault(kind, Counter())
        if counts["cut"] >= 2 * SAMPLE and not LONG:
            continue
        every = LONG and "backup" not in victim.parts  # which is read by one hash of each file
        for at in range(len(data)) if every else chance.sample(range(len(data)), min(SAMPLE, len(data))):
            flip = bytes([data[at] ^ 1 << chance.randrange(8)])
            for change, content in (("flipped", data[:at] + flip + data[at + 1 :]), ("cut", data[:at])):
                victim.write_bytes(content)
                _, refused = read(world.path, whole)
                counts[change] += 1
                counts[f"{change}, refused"] += refused > 0
                restore(folder, held)
    for kind, counts in seen.items():
        print(f"{kind}: {dict(counts)}")
    assert len(seen) > 15
    for kind, counts in seen.items():
        if "base/" not in kind or "backup" in kind:  # the base is checked by its hash where it is loaded
            assert counts["cut, refused"] >= 0.7 * counts["cut"], kind


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def victims(world: plain.World, held: dict[Path, bytes]) -> dict[Path, bytes]:
    """Choose the files: not the ledger, which test_anchor.py hurts, nor a lock, on whose content nothing hangs."""
    return {path: data for path, data in held.items() if path.name != "lock" and path != world.path / "ledger.sqlite"}


def restore(folder: Path, held: dict[Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in held:
            path.unlink()
    for path, data in held.items():
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def test_what_is_missing_or_exchanged_is_refused_or_changes_nothing(world):
    folder = world.path.parent
    whole, _ = read(world.path)
    held = files(folder)
    counts = Counter()
    for victim in victims(world, held):
        for other in [path for path in held if path.suffix == victim.suffix and path.parent == victim.parent]:
            victim.unlink()
            if other != victim:
                victim.write_bytes(held[other])
            _, refused = read(world.path, whole, fewer=True)
            kind = "missing" if other == victim else "exchanged"
            counts[kind] += 1
            counts[f"{kind}, refused"] += refused > 0
            restore(folder, held)
    print(dict(counts))
    assert counts["missing, refused"] > 0.7 * counts["missing"]
    assert counts["exchanged, refused"] > 0.7 * counts["exchanged"]
