"""How long a plan lasts: its deletion rate for uniform independent hits on slices."""

from __future__ import annotations

import math


def last_death(shards: int, slices: int, heads: int) -> float:
    """Compute the expected number of requests until the last shard is dead.

        E = m * L * H_{m*B'}

    Args:
        shards: m.
        slices: L.
        heads: number B' of distinct first slices of a shard's sequences, min(B, L); for SISA 1.

    Notes:
        Coupon collector over the m*B' head slices among m*L. Exact for independent uniform hits on slices; for finite
        equal slices an upper bound. S3T states the order only, O(mL log(m min(B, L))).
    """
    _check_sizes(shards, slices, heads)
    return shards * slices * math.fsum(1 / i for i in range(1, shards * heads + 1))


def first_death(shards: int, slices: int, heads: int, j: int = 1) -> float:
    """Compute the expected number of requests until the j-th shard is dead, by default the first.

        E = m * L * integral_0^inf P[Binomial(m, (1 - e^-s)^B') < j] ds

    Args:
        shards: m.
        slices: L.
        heads: number B' of distinct first slices of a shard's sequences, min(B, L); for SISA 1.
        j: which death, 1..m; j = m is `last_death`.

    Notes:
        Adaptive quadrature over log s, which spreads both the first of many deaths and the last; relative error below
        1e-9, checked against j = m up to 20,000 shards.
    """
    from scipy.integrate import quad
    from scipy.special import bdtr

    _check_sizes(shards, slices, heads)
    if not 1 <= j <= shards:
        raise ValueError(f"j: wanted 1..{shards}, got {j}")

    def fewer_than_j_dead(log_s: float) -> float:
        s = math.exp(log_s)
        mass: float = bdtr(j - 1, shards, (-math.expm1(-s)) ** heads) * s
        return mass

    end = math.log(math.log(shards * heads) + 40)  # beyond it less than e^-40 is left
    integral: float = quad(fewer_than_j_dead, -40, end, epsabs=0, epsrel=1e-11, limit=500)[0]
    return shards * slices * integral


def _check_sizes(shards: int, slices: int, heads: int) -> None:
    if shards < 1 or slices < 1 or not 1 <= heads <= slices:
        raise ValueError(
            "shards, slices, heads: wanted shards >= 1, slices >= 1 and 1 <= heads <= slices, "
            f"got {shards}, {slices}, {heads}"
        )
