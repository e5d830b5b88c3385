"""Audit a store by membership inference against retrained oracles, with planted canaries as the live control.

The store itself is only read. What is deleted is deleted in a rehearsal: a scratch store under the same key and
declarations, trained on the same table with canaries planted in it, and served and asked to forget as any store is.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s3t_ext.approximate.memorisation import learning_event
from s3t_ext.ledger.identity import Key
from s3t_ext.plan import Node
from s3t_ext.system.data.tables import Table, as_table
from s3t_ext.system.evaluate import probabilities
from s3t_ext.system.evidence import membership
from s3t_ext.system.evidence.canaries import Cast, Dated, asked_for, cast, dated, join, take
from s3t_ext.system.evidence.extent import extent
from s3t_ext.system.evidence.isolation import isolate
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.scratch import answer, hand_over, in_fresh_process, scratch_beside
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.unlearn import cells
from s3t_ext.system.verify import Tables, check_subjects, listed
from s3t_ext.system.wording import counted

POWER = 0.70  # least AUC of the planted canaries, before their deletion, from which anything follows
ORACLES = ("oracle", "retrained")


def audit(
    path: Path | str,
    table: Tables,
    *,
    nonmembers: Table | Path | str | None = None,
    subjects: Sequence[str] | None = None,
    sample: int = 100,
    canaries: int | str = 40,
    references: int = 4,
    isolation: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Attack a store's deletions by membership inference and compare with models trained without the deleted.

    Three groups of members: ``store``, the records of the table whose subjects the store has deleted, as it serves now
    (needs ``nonmembers``); ``people``, deleted in a rehearsal; ``canaries``, planted and deleted in the rehearsal.

    Args:
        table: the raw table, or a sequence of tables, one of each generation, in order; deleted subjects may still be
            in it: they are attacked, never trained on.
        nonmembers: records that the store never held; None: people are held out of the rehearsal's table instead.
        subjects: whom the rehearsal deletes; None: ``sample`` people, from one slice of every shard.
        canaries: how many to plant, at least 2; or "memorised" (40) or "memorised:K": the most memorised of three
            times as many candidates, a stronger control on average.
        references: reference models, an even number; 0: loss attack only.
        isolation: slices to remove or change, in turn, see ``s3t_ext.system.evidence.isolation``.

    Returns:
        groups (by group: members, others, and by attack before, served, oracle, retrained with auc, se, tpr; the last
        two with the difference of served from them, its difference_se, its bound, within), depths (of the rehearsal,
        before and after), same_after_reopening, control (by attack: the canaries' AUC before), power, isolation,
        candidates (of memorised canaries; 0: they were drawn), left_out (groups not attacked, and why), told (what may
        be chance), differing (what is not as it must be).

    Notes:
        ``oracle`` is the promise's: trained without the deleted, with the same slices invalid. An exact store answers
        as it does, bit for bit, and its difference is 0. ``retrained`` has all slices: another model, equal by chance
        only, so what is outside its bound (1 in 370 of three standard errors, without any leak) is told, not judged.
        Of tasks without classes, attacks see the probability of a record's own answer: ``evaluate.probabilities``.
        After their deletion the canaries' AUC must also be 0.5 within three standard errors, where it differs from the
        oracle's; where it does not, what is outside is told.

    Raises:
        ValueError, StoreError: bad table or store, too few records, no room for what it makes (before any work), or the
            rehearsal's deletion leaves nothing to serve; RuntimeError: the fresh process failed.
    """
    planted, memorised = asked_for(canaries)
    for name, value, least in (("sample", sample, 1), ("isolation", isolation, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if references < 0 or references % 2:
        raise ValueError(f"references: expected an even number of at least 0, got {references}")
    path = Path(path).absolute()
    with scratch_beside(path) as scratch:
        with StoreFolder(path) as folder:
            schema, generations = folder.schema, len(folder.ledger.generations)
            size = extent(folder, scratch, references + memorised, isolation, nonmembers is not None)
        if len(tables := listed(table)) != generations:
            raise ValueError(
                f"table: expected one for each of the store's {counted(generations, 'generation')}, in order, got "
                f"{len(tables)}"
            )
        task = {
            "path": str(path),
            "tables": [hand_over(table, schema, path / "base") for table in tables],
            "nonmembers": None if nonmembers is None else hand_over(nonmembers, schema, path / "base"),
            "subjects": None if subjects is None else list(subjects),
            "sample": sample,
            "canaries": planted,
            "memorised": memorised,
            "references": references,
            "isolation": isolation,
            "seed": seed,
            "progress": progress,
            "scratch": str(scratch),
            "size": size,
        }
        return in_fresh_process("s3t_ext.system.audit", task, scratch)


def examine(
    path: str,
    tables: Sequence[Table | str],
    nonmembers: Table | str | None,
    subjects: Sequence[str] | None,
    sample: int,
    canaries: int,
    references: int,
    isolation: int,
    seed: int,
    progress: bool,
    scratch: str,
    memorised: bool = False,
    size: str = "",
) -> dict[str, Any]:
    """Do the work of ``audit`` in this process, expected to be a fresh one."""
    with StoreFolder(path) as folder:
        stores = FreshStores(folder, Path(scratch), progress)
        records, deleted = _population(folder, tables)
        strangers = None if nonmembers is None else as_table(nonmembers, folder.schema, folder.base)
        _check_strangers(folder, strangers)
        scores = partial(_memorised, stores, seed) if memorised else None
        parts = cast(folder, records, strangers, subjects, sample, canaries, seed, scores)
        if progress:
            print(f"{size}\n{_counts(parts, len(deleted))}", file=sys.stderr, flush=True)
        seen = join(parts.people, parts.others, parts.planted, parts.controls, deleted)
        bounds = np.cumsum([len(parts.people), len(parts.others), canaries, canaries, len(deleted)])
        people, others, planted, controls, own = np.split(np.arange(len(seen)), bounds[:-1])

        models, depths, same = _rehearse(stores, parts, seen)
        outputs, saw = _references(stores, parts, seen, references, np.r_[planted, controls], seed)
        groups = {"people": (models, people, others), "canaries": (models, planted, controls)}
        served, why = _served(path, strangers, len(own), seen)
        if served is not None:
            paths = _paths(folder, folder.trained(folder.ledger.slices()))
            oracles = _oracles(stores, "store", records, paths, seen)
            groups["store"] = ({"served": served, **oracles}, own, others)
        labels = seen.labels if folder.schema.task == "classification" else np.zeros(len(seen), np.int64)
        found = {
            name: membership.compare(answers, ORACLES, labels, outputs, saw, members, rest)
            for name, (answers, members, rest) in groups.items()
        }
        moved = isolate(stores, records, isolation, seed)
    control = {attack: row["before"]["auc"] for attack, row in found["canaries"]["attacks"].items()}
    report = {
        "seed": seed,
        "groups": found,
        "candidates": parts.candidates,
        "left_out": {"store": why} if why else {},
        "references": references,
        "depths": depths,
        "same_after_reopening": same,
        "control": control,
        "power": max(control.values()) >= POWER and all(row["moved"] for row in moved),
        "isolation": moved,
    }
    return {**report, "told": _told(report), "differing": _differing(report)}


def _counts(parts: Cast, deleted: int) -> str:
    return (
        f"audit: {counted(len(parts.rest), 'record')} to train on, {counted(len(parts.people), 'record')} of "
        f"{counted(len(parts.asked), 'subject')} to delete, {counted(len(parts.planted), 'canary record')}, "
        f"{counted(len(parts.others), 'record')} held out, {deleted} of those deleted before"
    )


def _population(folder: StoreFolder, tables: Sequence[Table | str]) -> tuple[Dated, Dated]:
    """Read the tables of all generations: what is trained on, and the records of those who are deleted now.

    Records that somebody who was re-admitted had in an earlier generation are neither.
    """
    now, held, deleted = folder.ledger.deleted(), [], []
    for generation, table in zip(folder.ledger.generations, tables, strict=True):
        records = dated(as_table(table, folder.schema, folder.base), generation.number)
        check_subjects(folder, records)
        gone = folder.ledger.gone(generation.first)
        hashes = [{folder.hashed(name) for name in names} for names in records.subjects]
        held.append(take(records, [i for i, names in enumerate(hashes) if not names & gone]))
        deleted.append(take(records, [i for i, names in enumerate(hashes) if names & gone & now]))
    return join(*held), join(*deleted)


def _check_strangers(folder: StoreFolder, strangers: Table | None) -> None:
    for i, names in enumerate(strangers.subjects if strangers else (), 1):
        if any(holding.part == "private" for name in names for holding in folder.ledger.find(folder.hashed(name))):
            raise ValueError(f"nonmembers: expected people whom the store never held, got one whom it did in row {i}")


def _rehearse(
    stores: FreshStores, parts: Cast, seen: Table
) -> tuple[dict[str, np.ndarray], dict[str, list[int]], bool]:
    """Train on people and canaries, serve, delete them, serve again; and retrain without them.

    Returns:
        What ``probabilities`` gives before, served (after) and of the oracles; depths before and after; and whether a
        service opened after the deletion gives the same answers as the one that made it.
    """
    members = join(parts.people, parts.planted)
    asked = [*parts.asked, *(names[0] for names in parts.planted.subjects)]
    at = stores.make("rehearsal", join(parts.rest, members))
    with stores.open(at) as fresh:
        slices = fresh.ledger.slices()
        after = {**slices, **dict.fromkeys(cells(fresh, asked))}
        paths = [_paths(fresh, fresh.identities(state)) for state in (slices, after)]
    stores.train(at, paths[0] + paths[1])
    with stores.serve(at) as service:
        before, depths = probabilities(service, seen), list(service.depths)
        service.delete(asked)
        served = probabilities(service, seen)
        changed = list(service.depths)
    with stores.serve(at) as service:
        same = np.array_equal(served, probabilities(service, seen))
    oracles = _oracles(stores, "rehearsal", parts.rest, paths[1], seen)
    return {"before": before, "served": served, **oracles}, {"before": depths, "after": changed}, same


def _memorised(stores: FreshStores, seed: int, rest: Dated, candidates: Dated) -> np.ndarray:
    """Score candidates by how unsure a fresh store is of each that was trained on all of them, under another key.

    Notes:
        The proxy ``confidence``. It chooses whom to look at, after the store was made: no slice hangs on it.
    """
    classes = stores.folder.schema.task == "classification"
    labels = candidates.labels if classes else np.zeros(len(candidates), np.int64)
    key = Key(bytes(32)).derive(f"audit {seed} candidates")
    said = _trained(stores, "candidates", join(rest, candidates), candidates, key)
    return -learning_event("confidence", torch.from_numpy(said), torch.from_numpy(labels)).numpy()


def _references(
    stores: FreshStores, parts: Cast, seen: Table, count: int, halved: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train as the oracle, each under a key of its own, on the rest and on half of the canaries and controls.

    Returns:
        Probabilities (K, n, C), and (K, n) whether a model was trained on a record. Models 2 k and 2 k + 1 have
        complementary halves, so every canary and control is in as many models as it is out of.
    """
    saw = np.zeros((count, len(seen)), bool)
    rng = np.random.default_rng([seed, 1])
    outputs = []
    for k in range(count):
        half = saw[k - 1, halved] ^ True if k % 2 else rng.permutation(len(halved)) < len(halved) // 2
        saw[k, halved] = half
        table = join(parts.rest, take(seen, halved[half]))
        key = Key(bytes(32)).derive(f"audit {seed} reference {k}")
        outputs.append(_trained(stores, f"reference-{k}", table, seen, key))
    return np.stack(outputs) if count else np.zeros((0, len(seen), 2)), saw


def _differing(report: Mapping[str, Any]) -> list[str]:
    """List what is not as it must be, a line each."""
    lines = []
    for name, group in report["groups"].items():
        for attack, row in group["attacks"].items():
            if not row["oracle"]["within"]:
                lines.append(f"{name}, {attack}: AUC differs from the oracle's by {row['oracle']['difference']:+.3f}")
            if name == "canaries" and row["oracle"]["difference"] and _seen(row["served"]):
                lines.append(f"canaries, {attack}: AUC after deletion is {row['served']['auc']:.3f}, not 0.5")
    if not report["same_after_reopening"]:
        lines.append("rehearsal: the store, opened again, answers otherwise")
    for row in report["isolation"]:
        if row["differing"]:
            lines.append(
                f"isolation: shard {row['shard']}, slice {row['slice']} {row['change']}: "
                f"{counted(len(row['differing']), 'node')} that never saw it moved"
            )
    return lines


def _told(report: Mapping[str, Any]) -> list[str]:
    """List where the oracle, which never saw the canaries, is off 0.5 as the store is: chance, or it leaks too."""
    return [
        f"canaries, {attack}: AUC after deletion is {row['served']['auc']:.3f}, not 0.5, and so is the oracle's"
        for attack, row in report["groups"]["canaries"]["attacks"].items()
        if not row["oracle"]["difference"] and _seen(row["served"])
    ]


def _seen(found: Mapping[str, float]) -> bool:
    return abs(found["auc"] - 0.5) > membership.bound(found["se"])


def _served(path: Path | str, strangers: Table | None, deleted: int, seen: Table) -> tuple[np.ndarray | None, str]:
    """Give what the store serves now, or why its deleted records are not attacked."""
    if strangers is None:
        return None, "no nonmembers were given"
    if deleted < 2:
        return None, f"at least 2 records of deleted subjects are needed in the table, it has {deleted}"
    try:
        with Service(path) as service:
            return probabilities(service, seen), ""
    except Refused as refusal:
        return None, f"the store does not serve: {refusal}"


def _paths(folder: StoreFolder, nodes: Collection[Node]) -> list[Node]:
    """Give the nodes that shards serve of these: one a shard that is not dead."""
    return [node for node in enumerate(folder.best(nodes)) if node[1]]


def _oracles(stores: FreshStores, name: str, table: Table, paths: list[Node], seen: Table) -> dict[str, np.ndarray]:
    """Retrain on a table without the deleted, and give probabilities: with the same slices invalid, and with all."""
    return {
        "oracle": _trained(stores, f"oracle-of-{name}", table, seen, nodes=paths),
        "retrained": _trained(stores, f"retrained-{name}", table, seen),
    }


def _trained(
    stores: FreshStores,
    name: str,
    table: Table,
    seen: Table,
    key: Key | None = None,
    nodes: Collection[Node] | None = None,
) -> np.ndarray:
    """Train a fresh store's nodes, all that it serves unless named, and give its probabilities."""
    stores.train(at := stores.make(name, table, key), nodes)
    with stores.serve(at) as service:
        return probabilities(service, seen)


if __name__ == "__main__":
    answer(examine)
