"""Sequences by bipartite matching: for declared deletion probabilities, spread and yet with the safe slices first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from s3t_ext.plan.prior import check_prior
from s3t_ext.plan.tree import StageTree, check_budget

if TYPE_CHECKING:
    import numpy as np

SCORES = ("surviving", "printed")
TIE = 1e-9  # of the largest weight at a position: what is nearer than that counts as equal


def bms(
    slices: int,
    budget: int,
    *,
    prior: Sequence[float] | None = None,
    score: str = "surviving",
    horizon: int | None = None,
) -> StageTree:
    """Build `budget` sequences by iterated bipartite matching, for a prior of deletions.

        score(S) = sum_i (1 - c_i)^t   or, as printed,   sum_i i * (1 - c_i)^t,   c_i = p_{S_1} + ... + p_{S_i}

    One sequence starts at each slice. A matching of maximum total score(sequence + slice) then gives each of them its
    next slice, no slice twice at a position, until all are whole; of these L the B best by score are kept. B > L:
    further rounds of L, in which no stage takes a child a second time before each of its other children was taken as
    often: sequences branch as early as they can and never come again. The last, incomplete round keeps its best.

    Args:
        slices: L.
        budget: number of sequences B, 1..L!.
        prior: probability p of each slice to be hit by a request, (L,); uniform where not given.
        score: "surviving" is the expected number of slices of the sequence that survive t requests; "printed" is what
            S3T prints under that name, the expectation of K (K + 1) / 2 for K survivors.
        horizon: t, requests on the shard; default L, the middle of the 0..2L over which plans are compared.

    Raises:
        ValueError: L < 1, B outside 1..L!, no such prior or score, a horizon below 1.

    Notes:
        S3T, Algorithm 2, which stops at B = L. What a score adds at position i is the same for both up to the factor i,
        so they differ in which sequences of an incomplete round are kept, never in the matchings.
        Weights nearer than 1e-9 of a position's largest count as equal: they are settled for the greatest sum of
        1 / ((slice - the one before it) mod L). Scores equal to 12 digits are kept evenly spaced. With a uniform prior
        that is `rotation`, round by round. Weights are made by exact sums, divisions and products alone: they have the
        same bits on every machine.
    """
    import numpy as np

    check_budget(slices, budget)
    probabilities = check_prior(slices, prior)
    if score not in SCORES:
        raise ValueError(f"score: wanted one of {', '.join(SCORES)}, got {score!r}")
    horizon = slices if horizon is None else horizon
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon: wanted an integer of at least 1, got {horizon!r}")
    hit = np.rint(np.array(probabilities) * 2.0**50)  # (L,) whole numbers: their sums do not depend on the order
    earlier = np.empty((0, slices), dtype=np.int64)  # (rounds * L, L)
    while len(earlier) + slices < budget:
        earlier = np.concatenate([earlier, _round(earlier, hit, horizon)])
    last = _round(earlier, hit, horizon)  # (L, L)
    clean = 1 - hit[last].cumsum(axis=1) / hit.sum()  # (L, L)
    scores = (_power(clean, horizon) * (1 if score == "surviving" else np.arange(1, slices + 1))).sum(axis=1)  # (L,)
    kept = last[_best(scores, budget - len(earlier))]
    return StageTree.from_sequences(slices, [*earlier.tolist(), *kept.tolist()])


def _round(earlier: np.ndarray, hit: np.ndarray, horizon: int) -> np.ndarray:
    """Match one more sequence to every head, (L, L), unlike the earlier ones, (rounds * L, L).

    There always is a matching: equal costs give equal ones, so stages that met in one round meet in every round that
    comes to them. What they took so far are disjoint matchings; what these leave open has as many stages to a slice as
    slices to a stage.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    slices = len(hit)
    rows = np.arange(slices)  # (L,)
    chosen, safest = rows.copy(), np.argsort(hit, kind="stable")  # (L,)
    sequences = np.tile(rows[:, None], slices)  # (L, L) the head at every position until its slice is known
    free = ~np.eye(slices, dtype=bool)  # (L, L) row by slice: not yet in the sequence
    alike = earlier  # (., L) those that begin like the new sequence with their head
    for depth in range(1, slices):
        open_ = free
        if len(alike):
            taken = np.bincount(alike[:, 0] * slices + alike[:, depth], minlength=slices**2).reshape(slices, slices)
            least = np.where(free, taken, len(alike) + 1).min(axis=1, keepdims=True)  # (L, 1)
            open_ = free & (taken == least)  # (L, L) children of the row's stage
        clean = np.where(open_, (free @ hit)[:, None] - hit, 0)  # (L, L) probability of the slices outside
        weight = _power(clean / (clean.max() or 1), horizon)  # (L, L) a factor for all alters no matching
        step = (rows - chosen[:, None]) % slices  # (L, L) from the last slice to each
        cost = np.where(open_, 1 - weight - TIE / np.maximum(step, 1), np.inf)  # (L, L)
        _, matched = linear_sum_assignment(cost.T[safest])  # (L,) row of each slice; safest first is a fifth faster
        chosen[matched] = safest
        sequences[:, depth] = chosen
        free[rows, chosen] = False
        alike = alike[alike[:, depth] == chosen[alike[:, 0]]]
    return sequences


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """Raise to a whole power by products alone: the library's own powers differ in the last bit between processors."""
    result = base**0
    while exponent:
        result = result * base if exponent % 2 else result
        base, exponent = base * base, exponent // 2
    return result


def _best(scores: np.ndarray, count: int) -> list[int]:
    """Give the indices of the best scores; of those that tie for the last places, evenly spaced ones."""
    import numpy as np

    rounded = np.round(scores / (scores.max() or 1), 12)
    least = np.sort(rounded)[-count]
    sure, tied = np.flatnonzero(rounded > least).tolist(), np.flatnonzero(rounded == least).tolist()
    places = count - len(sure)
    return sure + [tied[place * len(tied) // places] for place in range(places)]
