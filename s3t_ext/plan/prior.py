"""What is declared of future requests: how probable it is that one hits each slice of its shard.

A prior belongs to declared tiers of slices, never to the records in them (method.md section 4, rule 12).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

Prior = tuple[float, ...]


def check_prior(slices: int, prior: Sequence[float] | None = None) -> Prior:
    """Return the probability of each slice, (L,): uniform where no prior is given.

    Args:
        slices: L.
        prior: L numbers, none negative, that sum to 1 (to 1e-6; their sum is divided out).

    Raises:
        ValueError: it is no such prior; the message says what is wrong.
    """
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise ValueError(f"slices: wanted an integer of at least 1, got {slices!r}")
    if prior is None:
        return (1 / slices,) * slices
    values = [float(value) for value in prior]
    if len(values) != slices:
        raise ValueError(f"prior: wanted {slices} probabilities, one for each slice, got {len(values)}")
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"prior: wanted finite probabilities of at least 0, got {value} for slice {index}")
    total = math.fsum(values)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"prior: wanted probabilities that sum to 1, got a sum of {total:.9g}")
    return tuple(value / total for value in values)


def read_history(path: str | Path) -> list[tuple[int, int]]:
    """Read a declared history of requests: a line for each, ``shard slice`` or ``shard,slice``, both from 0.

    What follows a ``#`` is a comment.

    Raises:
        ValueError: a line that is no pair of integers of at least 0 (the message has its number), or no request.
    """
    requests: list[tuple[int, int]] = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: wanted text in UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise ValueError(
                f"{path}: line {number}: wanted `shard slice`, two integers from 0 on, got {line.strip()!r}"
            )
        requests.append((int(words[0]), int(words[1])))
    if not requests:
        raise ValueError(f"{path}: wanted at least one request, a line `shard slice` for each, got none")
    return requests


def prior_of(requests: Iterable[tuple[int, int]], slices: int) -> Prior:
    """Estimate the prior from a declared history: p_i = (n_i + 1) / (n + L), n_i the requests for slice i of any shard.

    Raises:
        ValueError: a request names a slice outside 0..L-1.

    Notes:
        Laplace's rule of succession: a slice that nobody asked for yet is not taken to be safe.
    """
    counts = Counter(slice_ for _, slice_ in requests)
    if outside := sorted(index for index in counts if not 0 <= index < slices):
        raise ValueError(f"history: wanted slices in 0..{slices - 1}, got {outside[0]}")
    total = counts.total() + slices
    return tuple((counts[index] + 1) / total for index in range(slices))
