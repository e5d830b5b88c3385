"""S3T's row in the table of approximate methods: a store that deletes, beside its own oracle."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.approximate_cases import Case
from bench.approximate_scores import Seen, grown, see
from bench.unlearning_stores import answers
from s3t_ext import Service, fit
from s3t_ext.approximate import Guarantee
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.unlearn import erase_or_warn


class Forgotten(NamedTuple):
    """What a store says before and after a deletion, what its oracle says, and what the deletion took.

    Attributes:
        seconds: until no answer has anything of the forgotten and the acknowledgement is durable; erasing the files of
            what was switched off comes after it, ``erased_s`` in the note.
    """

    before: Seen
    after: Seen
    oracle: Seen
    guarantee: Guarantee
    seconds: float
    memory: dict[str, float]
    note: dict[str, Any]


def whole(case: Case, private: Table, base: Path, folder: Path) -> Path:
    """Fit a store on all records, or take up the one that is there."""
    store = folder / "whole" / "store"
    if not (folder / "fitted").exists():
        key = bytes.fromhex(case.key.hex())
        fit(store, private, case.data.schema, base, case.setting.config, key=key, progress=False)
        (folder / "fitted").touch()
    return store


def forget(case: Case, private: Table, base: Path, folder: Path) -> Forgotten:
    """Delete a case's people from a copy of the store; where a shard is dead then, heal it before it answers.

    The oracle is a fresh store under the same key and declarations, trained on the table without the deleted: the nodes
    that serve, with the same slices invalid; or after healing those that serve while nothing is deleted.

    Raises:
        RuntimeError: the store does not answer as its oracle, bit for bit.
    """
    whole(case, private, base, folder)
    now = folder / "now"
    shutil.rmtree(now, ignore_errors=True)
    shutil.copytree(folder / "whole", now)  # with the small files that lie beside it
    store, people = now / "store", sorted({names[0] for names in case.forget.subjects})
    with Service(store) as service:
        before = see(answers(service), case)
        with grown() as used:
            start = time.perf_counter()
            service.acknowledge(people)
            seconds, depths = time.perf_counter() - start, list(service.depths)
        dead = not all(depths)
        after = before if dead else see(answers(service), case)
        start = time.perf_counter()
        erase_or_warn(service.folder)
        erased = time.perf_counter() - start
    if dead:
        with grown() as used:
            start = time.perf_counter()
            heal(store, progress=False)
            seconds += time.perf_counter() - start
        with Service(store) as service:
            depths, after = list(service.depths), see(answers(service), case)
    oracle = _oracle(case, store, dead)
    if not all(np.array_equal(after.parts[name].loss, oracle.parts[name].loss) for name in after.parts):
        raise RuntimeError("the store answers otherwise than its oracle")
    shutil.rmtree(now)
    told = {"served": "healed" if dead else "live nodes", "depths": depths, "erased_s": round(erased, 3)}
    guarantee = Guarantee.EXACT_RETRAIN if dead else Guarantee.EXACT_DEACTIVATION
    return Forgotten(before, after, oracle, guarantee, seconds, used, told)


def _oracle(case: Case, store: Path, healed: bool) -> Seen:
    with StoreFolder(store) as folder, tempfile.TemporaryDirectory(dir=store.parent) as scratch:
        live = folder.trained(folder.ledger.slices())
        nodes = None if healed else [node for node in enumerate(folder.best(live)) if node[1]]
        fresh = FreshStores(folder, Path(scratch), progress=False)
        at = fresh.make("oracle", case.retain)
        fresh.train(at, nodes)
        with fresh.serve(at) as service:
            return see(answers(service), case)
