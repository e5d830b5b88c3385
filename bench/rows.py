"""The file of rows: its columns, how rows are appended, and what the newest of them say of a device."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cases import Case, parse

RESULTS = Path(__file__).parent / "results"
SHAPE = ("T", "K", "O", "r", "N", "live", "G", "P", "dtype", "step", "timer")
COLUMNS = (
    *("case", "provider", *SHAPE, "mode", "metric", "p20", "p50", "p80", "unit", "repeats", "predicted", "floor"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
NAN = float("nan")

Row = Mapping[str, object]


def header(path: Path) -> list[str]:
    """Give the columns of a file; those of a file of rows are ``COLUMNS``."""
    with path.open(newline="") as lines:
        return next(csv.reader(lines), [])


def append(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a file of rows, which is made with its header if it is not there.

    Raises:
        ValueError: the file has another header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    if not fresh and (found := header(path)) != list(columns):
        raise ValueError(f"{path}: expected the columns {list(columns)}, got {found}; move the file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


@dataclass
class Measured:
    """The rows of one device and one commit: medians in us by (case, provider), ceilings by (timer, name)."""

    device: str
    times: dict[tuple[str, str], float] = field(default_factory=dict)
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)
    predicted: dict[tuple[str, str], float] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)  # of layers and of whole models
    older: int = 0  # rows that were left out
    effects: dict[str, float] = field(default_factory=dict)  # us from a table's rewriting to the next answer, by timer
    tokens: dict[tuple[str, str], float] = field(default_factory=dict)  # a second, end to end, by (case, provider)

    @property
    def gpu(self) -> bool:
        return any(parse(case).timer in ("graph", "eager") for case, _ in self.times)

    def time(self, case: Case, provider: str) -> float:
        return self.times.get((case.name, provider), NAN)


def read(path: Path) -> Measured:
    """Read the rows of the commit that the last row names (+: changed files), of layers and of whole models apart.

    So no figure mixes commits, nor has it providers that are no longer timed; of several rows of one case and provider
    the last stands.
    """
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = Measured(path.stem, commits={_part(row): _commit(row) for row in rows})
    for row in rows:
        if _commit(row) != found.commits[_part(row)]:
            found.older += 1
            continue
        key, value = (row["case"], row["provider"]), float(row["p50"])
        match row["metric"]:
            case "ceiling":
                found.ceilings[row["timer"], row["provider"]] = value
                continue
            case "effect":
                found.effects[row["timer"]] = value
                continue
            case "tokens":
                found.tokens[key] = value
            case _:
                found.times[key] = value
                found.predicted[key] = float(row["predicted"] or "nan")
    return found


def _part(row: Mapping[str, str]) -> str:
    return "models" if row["metric"] == "tokens" else "layers"


def _commit(row: Mapping[str, str]) -> str:
    return row["commit"][:10] + ("+" if row["dirty"] not in ("0", "False") else "")
