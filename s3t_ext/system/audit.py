"""Audit a store by membership inference against a retrained oracle, with planted canaries as the live control.

The store itself is only read. What is deleted is deleted in a rehearsal: a scratch store under the same key and
declarations, trained on the same table with canaries planted in it, and served and asked to forget as any store is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext.ledger.identity import Key
from s3t_ext.system import membership
from s3t_ext.system.canaries import Cast, cast, join, take
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.ingest import Table, as_table
from s3t_ext.system.isolation import isolate
from s3t_ext.system.oracle import FreshStores
from s3t_ext.system.scratch import answer, hand_over, in_fresh_process, scratch_beside
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.unlearn import cells
from s3t_ext.system.verify import check_subjects

POWER = 0.70  # least AUC of the planted canaries, before their deletion, from which anything follows
SLACK = 0.03  # differences of AUC up to this, or to three standard errors, are none
CHUNK = 500  # records in one forward pass


def audit(
    path: Path | str,
    table: Table | Path | str,
    *,
    nonmembers: Table | Path | str | None = None,
    subjects: Sequence[str] | None = None,
    sample: int = 100,
    canaries: int = 40,
    references: int = 4,
    isolation: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Attack a store's deletions by membership inference and compare with models retrained without the deleted.

    Three groups of members: ``store``, the records of the table whose subjects the store has deleted, as it serves now
    (needs ``nonmembers``); ``people``, deleted in a rehearsal; ``canaries``, planted and deleted in the rehearsal.

    Args:
        table: the raw table; deleted subjects may still be in it: they are attacked, never trained on.
        nonmembers: records that the store never held; None: people are held out of the rehearsal's table instead.
        subjects: whom the rehearsal deletes; None: ``sample`` people, from one slice of every shard.
        canaries: how many to plant, at least 2; ``references``: reference models, an even number; 0: loss attack only.
        isolation: slices to remove or change, in turn, see ``s3t_ext.system.isolation``.

    Returns:
        groups (by group: members, others, and by attack before, served, oracle with auc, se, tpr; difference of served
        and oracle, its se, its bound, within), depths (of the rehearsal, before and after), same_after_reopening,
        control (by attack: the canaries' AUC before), power, isolation, differing (what is not as it must be).

    Raises:
        ValueError, StoreError: bad table or store, too few records, or the rehearsal's deletion leaves nothing to
            serve; RuntimeError: the fresh process failed.
    """
    for name, value, least in (("sample", sample, 1), ("canaries", canaries, 2), ("isolation", isolation, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if references < 0 or references % 2:
        raise ValueError(f"references: expected an even number of at least 0, got {references}")
    path = Path(path).absolute()
    with scratch_beside(path) as scratch:
        with StoreFolder(path) as folder:
            schema = folder.schema
        task = {
            "path": str(path),
            "table": hand_over(table, schema),
            "nonmembers": None if nonmembers is None else hand_over(nonmembers, schema),
            "subjects": None if subjects is None else list(subjects),
            "sample": sample,
            "canaries": canaries,
            "references": references,
            "isolation": isolation,
            "seed": seed,
            "progress": progress,
            "scratch": str(scratch),
        }
        return in_fresh_process("s3t_ext.system.audit", task, scratch)


def examine(
    path: str,
    table: Table | str,
    nonmembers: Table | str | None,
    subjects: Sequence[str] | None,
    sample: int,
    canaries: int,
    references: int,
    isolation: int,
    seed: int,
    progress: bool,
    scratch: str,
) -> dict[str, Any]:
    """Do the work of ``audit`` in this process, expected to be a fresh one."""
    with StoreFolder(path) as folder:
        stores = FreshStores(folder, Path(scratch), progress)
        records = as_table(table, folder.schema)
        check_subjects(folder, records)
        strangers = None if nonmembers is None else as_table(nonmembers, folder.schema)
        _check_strangers(folder, strangers)
        gone = folder.ledger.deleted()
        lost = np.array([any(folder.hashed(name) in gone for name in names) for names in records.subjects])  # (n,)
        deleted, records = take(records, np.flatnonzero(lost)), take(records, np.flatnonzero(~lost))
        parts = cast(folder, records, strangers, subjects, sample, canaries, seed)
        seen = join(parts.people, parts.others, parts.planted, parts.controls, deleted)
        bounds = np.cumsum([len(parts.people), len(parts.others), canaries, canaries, len(deleted)])
        people, others, planted, controls, own = np.split(np.arange(len(seen)), bounds[:-1])

        models, depths, same = _rehearse(stores, parts, seen)
        outputs, saw = _references(stores, parts, seen, references, np.r_[planted, controls], seed)
        groups = {"people": (models, people, others), "canaries": (models, planted, controls)}
        if strangers is not None and len(own) > 1:
            served = _served(path, seen.inputs)
            if served is not None:
                oracle = _trained(stores, "oracle-of-the-store", records, seen.inputs)
                groups["store"] = ({"served": served, "oracle": oracle}, own, others)
        found = {
            name: _group(answers, seen.labels, outputs, saw, members, rest)
            for name, (answers, members, rest) in groups.items()
        }
        moved = isolate(stores, records, isolation, seed)
    control = {attack: row["before"]["auc"] for attack, row in found["canaries"]["attacks"].items()}
    report = {
        "seed": seed,
        "groups": found,
        "references": references,
        "depths": depths,
        "same_after_reopening": same,
        "control": control,
        "power": max(control.values()) >= POWER and all(row["moved"] for row in moved),
        "isolation": moved,
    }
    return {**report, "differing": _differing(report)}


def _check_strangers(folder: StoreFolder, strangers: Table | None) -> None:
    for name in sorted({name for names in (strangers.subjects if strangers else ()) for name in names}):
        if any(holding.part == "private" for holding in folder.ledger.find(folder.hashed(name))):
            raise ValueError(f"nonmembers: expected people whom the store never held, got {name!r}")


def _rehearse(
    stores: FreshStores, parts: Cast, seen: Table
) -> tuple[dict[str, np.ndarray], dict[str, list[int]], bool]:
    """Train on people and canaries, serve, delete them, serve again; and retrain without them.

    Returns:
        Probabilities (n, C) before, served (after) and of the oracle; depths before and after; and whether a service
        opened after the deletion gives the same answers as the one that made it.
    """
    members = join(parts.people, parts.planted)
    asked = [*parts.asked, *(names[0] for names in parts.planted.subjects)]
    at = stores.make("rehearsal", join(parts.rest, members))
    with stores.open(at) as fresh:
        slices = fresh.ledger.slices()
        after = {**slices, **dict.fromkeys(cells(fresh, asked))}
        best = [list(enumerate(fresh.best(fresh.identities(state)))) for state in (slices, after)]
    stores.train(at, [node for nodes in best for node in nodes if node[1]])
    with stores.serve(at) as service:
        before, depths = _probabilities(service, seen.inputs), list(service.depths)
        service.delete(asked)
        served = _probabilities(service, seen.inputs)
        changed = list(service.depths)
    with stores.serve(at) as service:
        same = np.array_equal(served, _probabilities(service, seen.inputs))
    oracle = _trained(stores, "oracle", parts.rest, seen.inputs)
    return {"before": before, "served": served, "oracle": oracle}, {"before": depths, "after": changed}, same


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
        outputs.append(_trained(stores, f"reference-{k}", table, seen.inputs, key))
    return np.stack(outputs) if count else np.zeros((0, len(seen), len(stores.folder.schema.classes))), saw


def _group(
    models: Mapping[str, np.ndarray],
    labels: np.ndarray,
    references: np.ndarray,
    saw: np.ndarray,
    members: np.ndarray,
    others: np.ndarray,
) -> dict[str, Any]:
    """Attack members (rows of all arrays) against others by every model, and hold served against oracle."""
    rows = np.r_[members, others]
    m = len(members)
    scores = {
        name: membership.attacks(p[rows], labels[rows], references[:, rows], saw[:, rows]) for name, p in models.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for attack in scores["served"]:
        row: dict[str, Any] = {}
        for name, by_attack in scores.items():
            score = by_attack[attack]
            area, error = membership.auc(score[:m], score[m:])
            row[name] = {"auc": area, "se": error, "tpr": membership.tpr_at_fpr(score[:m], score[m:])}
        served, oracle = scores["served"][attack], scores["oracle"][attack]
        difference, error = membership.auc_difference(served[:m], served[m:], oracle[:m], oracle[m:])
        bound = max(SLACK, 3 * error)
        row |= {"difference": difference, "se": error, "bound": bound, "within": abs(difference) <= bound}
        found[attack] = row
    return {"members": m, "others": len(others), "attacks": found}


def _differing(report: Mapping[str, Any]) -> list[str]:
    """List what is not as it must be, a line each."""
    lines = []
    for name, group in report["groups"].items():
        for attack, row in group["attacks"].items():
            served = row["served"]
            if not row["within"]:
                lines.append(f"{name}, {attack}: AUC differs from the oracle's by {row['difference']:+.3f}")
            if name == "canaries" and abs(served["auc"] - 0.5) > max(SLACK, 3 * served["se"]):
                lines.append(f"canaries, {attack}: AUC after deletion is {served['auc']:.3f}, not 0.5")
    if not report["same_after_reopening"]:
        lines.append("rehearsal: the store, opened again, answers otherwise")
    for row in report["isolation"]:
        if row["differing"]:
            lines.append(
                f"isolation: shard {row['shard']}, slice {row['slice']} {row['change']}: {len(row['differing'])} nodes "
                "that never saw it moved"
            )
    return lines


def _served(path: Path | str, inputs: np.ndarray) -> np.ndarray | None:
    """Give what the store serves now; None where it refuses."""
    try:
        with Service(path) as service:
            return _probabilities(service, inputs)
    except Refused:
        return None


def _trained(stores: FreshStores, name: str, table: Table, inputs: np.ndarray, key: Key | None = None) -> np.ndarray:
    """Train what a fresh store of a table serves, and give its probabilities."""
    at = stores.make(name, table, key)
    stores.train(at)
    with stores.serve(at) as service:
        return _probabilities(service, inputs)


def _probabilities(service: Service, inputs: np.ndarray) -> np.ndarray:
    """Give what a service answers as probabilities (n, C)."""
    chunks = [inputs[i : i + CHUNK] for i in range(0, len(inputs), CHUNK)]
    scores = np.concatenate([service.predict(chunk).scores for chunk in chunks]).astype(np.float64)  # (n, C)
    if service.combine != "logits":
        return scores
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


if __name__ == "__main__":
    answer(examine)
