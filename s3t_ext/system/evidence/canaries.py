"""Who plays what in an audit: people to delete, canaries to plant, and records that no model ever sees."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from s3t_ext.ledger.identity import normalise_subject
from s3t_ext.system.data.schema import IGNORED, Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import Cell, StoreFolder

CANDIDATES = 3  # for each place of a canary or a control, where the most memorised are chosen


@dataclass(frozen=True)
class Dated(Table):
    """Records, each with the number of the generation of shards that it is of: (n,) int64."""

    generation: np.ndarray


@dataclass(frozen=True)
class Cast:
    """Disjoint parts of an audit's tables.

    Args:
        asked: the people to delete; ``people``: their records, members until then;
        rest: every model is trained on it; ``others``: never trained on.
        planted: canaries, mislabelled records of subjects of their own, members until they are deleted;
        controls: as many records, mislabelled alike, never trained on.
        candidates: of how many planted and controls are the most memorised; 0: they are drawn.
    """

    asked: list[str]
    people: Dated
    rest: Dated
    others: Dated
    planted: Dated
    controls: Dated
    candidates: int = 0


def asked_for(canaries: int | str) -> tuple[int, bool]:
    """Read how many canaries to plant, and whether the most memorised: 40, "memorised" (40 of them) or "memorised:60".

    Raises:
        ValueError: something else, or fewer than 2.
    """
    found = re.fullmatch(r"(\d+)|memorised(?::(\d+))?", str(canaries))
    count = int(found[1] or found[2] or 40) if found else 0
    if found is None or count < 2:
        raise ValueError(f"canaries: expected at least 2, 'memorised' (40 of them) or 'memorised:K', got {canaries!r}")
    return count, found[1] is None


def cast(
    folder: StoreFolder,
    records: Table,
    strangers: Table | None,
    subjects: Sequence[str] | None,
    sample: int,
    canaries: int,
    seed: int,
    memorised: Callable[[Dated, Dated], np.ndarray] | None = None,
) -> Cast:
    """Draw who is deleted, what is planted and what is held out, by a seed.

    People and canaries come from one slice of every shard, so that the deletion leaves something to serve; where
    subjects are given, the slices are theirs. Planted and control canaries are halves of one draw, labels included.

    Args:
        records: the table less the subjects in the ledger; ``strangers``: records the store never held; None: as many
            as are needed are held out of the table.
        subjects: whom to delete; None: ``sample`` people are drawn.
        canaries: how many to plant.
        memorised: scores candidates (n,) for ``rest`` and these, the greater the more memorised; the greatest play
            canaries and controls, by chance which. None: they are drawn.

    Raises:
        ValueError: unknown or no subjects, or too few records.
    """
    rng = random.Random(f"audit {seed}")
    named = _named(folder, records, subjects)
    wanted = 2 * canaries * (CANDIDATES if memorised else 1)
    if strangers is None:
        others = max(sample, len(named), 2)
        wanted = min(wanted, max(2 * canaries, len(records) // 3 - others))  # fewer candidates of a small table
        strangers, records = _hold_out(records, named, wanted + others, rng)
    else:
        wanted = min(wanted, max(2 * canaries, 3 * len(strangers) // 4))  # others are needed too
    if len(strangers) < 2 * canaries + 2:
        raise ValueError(
            f"nonmembers: expected at least {2 * canaries + 2} records for {canaries} canaries, as many controls and "
            f"two others, got {len(strangers)}"
        )
    owners = {names[0] for names in records.subjects}
    homes: dict[str, set[Cell]] = {name: set() for name in owners}  # of one person several, in several generations
    for names, home in zip(records.subjects, placed(folder, records), strict=True):
        homes[names[0]].add(home)
    cells = sorted({home for name in named & owners for home in homes[name]}) or _cells(folder, rng)
    if not named:
        pool = sorted(name for name in owners if homes[name] <= set(cells))
        named = set(rng.sample(pool, min(sample, len(pool))))
    chosen = [bool(named & set(names)) for names in records.subjects]
    if sum(chosen) < 2:
        raise ValueError(f"subjects: expected people with at least two records together, got {sum(chosen)}")
    rows = rng.sample(range(len(strangers)), len(strangers))
    rest = take(records, np.flatnonzero(~np.array(chosen)))
    wrong = mislabelled(take(strangers, rows[:wanted]), folder.schema, rng)
    if memorised:
        best = np.argsort(-memorised(rest, wrong), kind="stable")[: 2 * canaries].tolist()
        wrong = take(wrong, rng.sample(best, len(best)))
    planted, controls = take(wrong, range(canaries)), take(wrong, range(canaries, 2 * canaries))
    owned, generation = _subjects_of_canaries(folder, cells, canaries, owners)
    return Cast(
        asked=sorted(named),
        rest=rest,
        people=take(records, np.flatnonzero(chosen)),
        others=take(strangers, rows[wanted:]),
        planted=Dated(owned, planted.inputs, planted.labels, generation),
        controls=Dated(controls.subjects, controls.inputs, controls.labels, generation),
        candidates=wanted if memorised else 0,
    )


def dated(table: Table, generation: int = 0) -> Dated:
    """Give a table as records of one generation; one that is dated stays as it is."""
    if isinstance(table, Dated):
        return table
    return Dated(table.subjects, table.inputs, table.labels, np.full(len(table), generation))


def placed(folder: StoreFolder, records: Table) -> list[Cell]:
    """Give the slice of each record."""
    generations = folder.ledger.generations
    return [
        generations[number].place(folder.key, names[0], folder.config.slices)
        for names, number in zip(records.subjects, dated(records).generation.tolist(), strict=True)
    ]


def take(table: Table, rows: Iterable[int]) -> Dated:
    """Give some rows of a table, in the given order."""
    index, table = np.fromiter(rows, np.int64), dated(table)
    return Dated([table.subjects[i] for i in index], table.inputs[index], table.labels[index], table.generation[index])


def join(*tables: Table) -> Dated:
    """Give the rows of several tables, one table after the other."""
    return Dated(
        [names for table in tables for names in table.subjects],
        np.concatenate([table.inputs for table in tables]),
        np.concatenate([table.labels for table in tables]),
        np.concatenate([dated(table).generation for table in tables]),
    )


def _named(folder: StoreFolder, records: Table, subjects: Sequence[str] | None) -> set[str]:
    if subjects is None:
        return set()
    named = [normalise_subject(name, folder.schema.normalise) for name in subjects]
    there = {name for names in records.subjects for name in names}
    unknown = [i for i, name in enumerate(named, 1) if name not in there]
    if unknown or not named:  # nobody's name: errors end in logs
        got = f"{len(unknown)} of {len(named)} who are not, number {unknown[0]} for one" if unknown else "none"
        raise ValueError(f"subjects: expected people of the table, not deleted yet, got {got}")
    return set(named)


def _hold_out(records: Table, spared: set[str], count: int, rng: random.Random) -> tuple[Table, Table]:
    """Split people off until they have ``count`` records; give theirs and the others'."""
    by_owner: dict[str, list[int]] = {}
    for row, names in enumerate(records.subjects):
        if len(names) == 1 and names[0] not in spared:
            by_owner.setdefault(names[0], []).append(row)
    shared = {name for names in records.subjects if len(names) > 1 for name in names}
    people = sorted(set(by_owner) - shared)
    rng.shuffle(people)
    held: set[int] = set()
    while people and len(held) < count:
        held |= set(by_owner[people.pop()])
    if len(held) > len(records) // 2:
        raise ValueError(
            f"table: expected at least {2 * count} records, of which {count} are held out, got {len(records)}; give "
            "--nonmembers, or fewer --canaries and a smaller --sample"
        )
    return take(records, sorted(held)), take(records, sorted(set(range(len(records))) - held))


def _cells(folder: StoreFolder, rng: random.Random) -> list[Cell]:
    """Draw one slice of every shard, among those that a shard survives; of half the shards where it survives none."""
    shards = range(folder.shards)
    survived = [k for k in range(folder.config.slices) if folder.tree.best_live({k})]
    if survived:
        return [(shard, rng.choice(survived)) for shard in shards]
    return [(shard, rng.randrange(folder.config.slices)) for shard in shards[: max(1, len(shards) // 2)]]


def mislabelled(table: Table, schema: Schema, rng: random.Random) -> Dated:
    """Give records wrong answers: another class; two standard deviations off; other words, of all in the table."""
    table = dated(table)
    inputs, labels = table.inputs, table.labels
    if schema.task == "classification":
        shift = np.array([rng.randrange(1, len(schema.classes)) for _ in range(len(table))], np.int64)
        labels = (labels + shift) % len(schema.classes)
    elif schema.task == "regression":
        sign = np.array([rng.choice((-1, 1)) for _ in range(len(table))], np.float32)
        labels = labels + 2 * sign[:, None] * labels.std(0)
    else:
        inputs, labels = inputs.copy(), labels.copy()
        rows, places = np.nonzero((labels != IGNORED)[:, :-1] & (labels != IGNORED)[:, 1:])  # each but the last, an end
        words = sorted(set(labels[rows, places].tolist()))
        labels[rows, places] = inputs[rows, places] = [rng.choice(words) for _ in rows]
    return Dated(table.subjects, inputs, labels, table.generation)


def _subjects_of_canaries(
    folder: StoreFolder, cells: Sequence[Cell], count: int, taken: set[str]
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Find names, placed by the store's key in these slices in turn, that nobody else has; and their generations."""
    waiting = [cells[i % len(cells)] for i in range(count)]
    names: list[tuple[str, ...]] = [()] * count
    found, number = np.zeros(count, np.int64), 0
    while not all(names):
        name = f"audit canary {number}"
        number += 1
        for generation in folder.ledger.generations:
            home = generation.place(folder.key, name, folder.config.slices)
            if home in waiting and name not in taken:
                at = waiting.index(home)
                names[at], found[at], waiting[at] = (name,), generation.number, (-1, -1)
                break
    return names, found
