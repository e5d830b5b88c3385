"""Retained depth: how deep the best live prefix of a shard still is after deletions, for any tree and prior."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from s3t_ext.plan.prior import Prior, check_prior
from s3t_ext.plan.tree import StageTree

if TYPE_CHECKING:
    import numpy as np

LATTICE_LIMIT = 12  # 4,096 sets of slices: a few milliseconds
COUNTED = 5_000  # requests up to which a uniform prior is counted in integers: their powers grow with them


class Estimate(NamedTuple):
    """A mean and its standard error, 0.0 where the mean is exact."""

    mean: float
    se: float


def expected_depth(
    tree: StageTree,
    requests: int,
    *,
    shards: int = 1,
    prior: Sequence[float] | None = None,
    subjects: int | None = None,
    utility: Sequence[float] | None = None,
    samples: int = 20_000,
    seed: int = 0,
) -> Estimate:
    """Compute the expected depth of one shard, E[F(depth)], after `requests` requests.

        E = sum over sets S of slices of g(S) * P[S clean],   sum over S within C of g(S) = F(best(C)),
        P[S clean] = (1 - p(S)/m)^r,  or with n subjects a slice  C((m*L - |S|)*n, r) / C(m*L*n, r)

    Args:
        tree: the plan of every shard; best(C) is the depth of its deepest node on clean slices C.
        requests: number r of requests; each hits a shard uniformly, then a slice by the prior.
        shards: m; the default 1 counts the hits on this shard alone.
        prior: probability of each slice, (L,); uniform where none is given.
        subjects: subjects n of each slice, who ask once each, in any order; None: hits are independent.
        utility: F(0)..F(L), (L+1,), never decreasing; the depth itself where none is given.
        samples: draws of the clean set above L = 12.
        seed: of those draws.

    Returns:
        The mean, and its standard error: 0.0 to L = 12, where it is exact.

    Raises:
        ValueError: an argument is out of range, or `subjects` comes with a prior that is not uniform.

    Notes:
        The sequences of a shard share one set of clean slices, so formulas that multiply over sequences (S3T's
        retention) are not this number. With a uniform prior and up to 5,000 requests it is counted in integers over
        all 2^L sets and divided once; else g is exact for integer F and the sum of the terms is rounded once. Above
        L = 12 the draws pass the sequences 8 to a byte: 20,000 at L = 64, B = 4,096 take 0.1 s.
    """
    values = check_utility(tree.slices, utility)
    urn = _Urn.checked(tree.slices, requests, shards, prior, subjects)
    if tree.slices <= LATTICE_LIMIT:
        return Estimate(urn.mean(values, best_depths(tree)), 0.0)
    return _estimate(values, _depths(tree, urn.draw(samples, seed)))


def ideal(
    slices: int,
    requests: int,
    *,
    shards: int = 1,
    prior: Sequence[float] | None = None,
    subjects: int | None = None,
    utility: Sequence[float] | None = None,
    samples: int = 20_000,
    seed: int = 0,
) -> Estimate:
    """Compute E[F(number of clean slices)], which no tree can exceed and `subsets` reaches.

    Args, Returns, Raises: as `expected_depth`, with `slices` L in place of a tree.

    Notes:
        Exact to L = 12, and above it for the depth itself and for a uniform prior.
    """
    import numpy as np

    values = check_utility(slices, utility)
    urn = _Urn.checked(slices, requests, shards, prior, subjects)
    if urn.uniform:
        return Estimate(urn.mean_over_sizes([math.comb(slices, k) * Fraction(F) for k, F in enumerate(values)]), 0.0)
    if utility is None:
        return Estimate(math.fsum((1 - p / shards) ** requests for p in urn.prior), 0.0)
    if slices <= LATTICE_LIMIT:
        return Estimate(urn.mean(values, sizes(slices)), 0.0)
    return _estimate(values, np.count_nonzero(urn.draw(samples, seed), axis=1))


def check_utility(slices: int, utility: Sequence[float] | None = None) -> tuple[float, ...]:
    """Return F(0)..F(L), (L+1,): 0..L where no utility is given.

    Raises:
        ValueError: wanted L+1 finite numbers that never decrease.
    """
    if utility is None:
        return tuple(range(slices + 1))
    values = tuple(utility)
    if len(values) != slices + 1:
        raise ValueError(f"utility: wanted {slices + 1} numbers, F(0)..F({slices}), got {len(values)}")
    if not all(map(math.isfinite, values)) or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"utility: wanted finite numbers that never decrease, got {values}")
    return values


def sizes(slices: int) -> np.ndarray[Any, Any]:
    """Count the members of every set of slices, (2^L,); the set of index C has slice i where bit i of C is 1."""
    import numpy as np

    counts = np.zeros(1 << slices, dtype=np.int64)  # (2^L,)
    for index in range(slices):
        counts.reshape(-1, 2, 1 << index)[:, 1] += 1
    return counts


def best_depths(tree: StageTree) -> np.ndarray[Any, Any]:
    """Find the depth of the deepest live node for every set of clean slices, (2^L,)."""
    import numpy as np

    best = np.zeros(1 << tree.slices, dtype=np.int64)  # (2^L,)
    for path in tree.sequences:
        clean = 0
        for depth, index in enumerate(path, 1):
            clean |= 1 << index
            best[clean] = depth
    for index in range(tree.slices):
        pairs = best.reshape(-1, 2, 1 << index)  # (., without | with slice `index`, .)
        np.maximum(pairs[:, 1], pairs[:, 0], out=pairs[:, 1])
    return best


class _Urn(NamedTuple):
    """What the requests are drawn from."""

    slices: int
    requests: int
    shards: int
    prior: Prior
    subjects: int | None

    @classmethod
    def checked(
        cls, slices: int, requests: int, shards: int, prior: Sequence[float] | None, subjects: int | None
    ) -> _Urn:
        urn = cls(slices, requests, shards, check_prior(slices, prior), subjects)
        if requests < 0:
            raise ValueError(f"requests: wanted at least 0, got {requests}")
        if shards < 1:
            raise ValueError(f"shards: wanted at least 1, got {shards}")
        if subjects is not None:
            if subjects < 1:
                raise ValueError(f"subjects: wanted at least 1 in each slice, got {subjects}")
            if not urn.uniform:
                raise ValueError(f"prior: wanted a uniform one beside a finite number of subjects, got {urn.prior}")
            if requests > shards * slices * subjects:
                raise ValueError(
                    f"requests: wanted at most {shards * slices * subjects}, one for each subject, got {requests}"
                )
        return urn

    @property
    def uniform(self) -> bool:
        return min(self.prior) == max(self.prior)

    def mean(self, values: Sequence[float], depths: np.ndarray[Any, Any]) -> float:
        """Compute E[F(depth)] from F, (L+1,), and the depth by the set of clean slices, (2^L,)."""
        import numpy as np

        if self.uniform and (self.requests <= COUNTED or self.subjects is not None):
            table = np.zeros((self.slices + 1, self.slices + 1), dtype=np.int64)  # sets by their size and their depth
            np.add.at(table, (sizes(self.slices), depths), 1)
            fractions = [Fraction(value) for value in values]
            return self.mean_over_sizes([sum(map(operator.mul, row, fractions), Fraction()) for row in table.tolist()])
        g = np.array(values)[depths]  # (2^L,)
        outside = np.zeros(1)
        for index, p in enumerate(self.prior):
            pairs = g.reshape(-1, 2, 1 << index)  # (., without | with slice `index`, .)
            pairs[:, 1] -= pairs[:, 0]
            outside = np.concatenate((outside + p, outside))  # (2^(i+1),) p of the complement: 0 for all, unrounded
        return math.fsum(g * ((self.shards - 1 + outside) / self.shards) ** self.requests)

    def mean_over_sizes(self, totals: Sequence[Fraction]) -> float:
        """Compute E[F(depth)] from the sum of F over the sets of k clean slices, (L+1,): exact, rounded once."""

        def ways(untouched: int) -> int:
            hit = self.shards * self.slices - untouched
            return hit**self.requests if self.subjects is None else math.comb(hit * self.subjects, self.requests)

        def ways_exactly(size: int) -> int:
            others = self.slices - size
            return sum((-1) ** j * math.comb(others, j) * ways(size + j) for j in range(others + 1))

        scale = math.lcm(*(total.denominator for total in totals))
        total: int = sum(int(total * scale) * ways_exactly(size) for size, total in enumerate(totals))
        mean: float = total / (scale * ways(0))
        return mean

    def draw(self, samples: int, seed: int) -> np.ndarray[Any, Any]:
        """Draw which slices of the shard are clean, (samples, L) bool."""
        import numpy as np

        if samples < 2:
            raise ValueError(f"samples: wanted at least 2, got {samples}")
        generator = np.random.default_rng(seed)
        if self.subjects is None:
            hits = generator.binomial(self.requests, 1 / self.shards, samples)  # (samples,)
            return generator.multinomial(hits, self.prior) == 0
        elsewhere = (self.shards - 1) * self.slices * self.subjects
        if (total := elsewhere + self.slices * self.subjects) >= 10**9:
            raise ValueError(f"subjects: wanted less than 1e9 in all shards to draw from, got {total}")
        colors = [self.subjects] * self.slices + [elsewhere]
        drawn = generator.multivariate_hypergeometric(colors, self.requests, samples, method="marginals")
        return drawn[:, :-1] == 0


def _depths(tree: StageTree, clean: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Find the depth of the deepest live node of every draw: (samples, L) bool -> (samples,)."""
    import numpy as np

    packed = np.packbits(clean, axis=0).T.copy()  # (L, samples / 8)
    lengths = [len(path) for path in tree.sequences]  # ascending
    paths = np.array([path + (0,) * (lengths[-1] - len(path)) for path in tree.sequences])  # (B, depth)
    starts = np.searchsorted(lengths, range(1, lengths[-1] + 1))  # the first sequence that is so deep
    depths = np.zeros(8 * packed.shape[1], dtype=np.int64)
    for left in range(0, packed.shape[1], 256):  # 2,048 draws: a megabyte for 4,096 sequences
        part = packed[:, left : left + 256]  # (L, 256)
        live = np.full((len(paths), part.shape[1]), 255, dtype=np.uint8)  # (B, 256)
        for depth, start in enumerate(starts):
            live = live[start - len(paths) :] & part[paths[start:, depth]]
            reached = np.bitwise_or.reduce(live, axis=0)  # (256,)
            if not reached.any():
                break
            depths[8 * left : 8 * (left + part.shape[1])] += np.unpackbits(reached)
    return depths[: len(clean)]


def _estimate(values: Sequence[float], depths: np.ndarray[Any, Any]) -> Estimate:
    import numpy as np

    drawn = np.array(values, dtype=float)[depths]  # (samples,)
    return Estimate(float(drawn.mean()), float(drawn.std(ddof=1)) / math.sqrt(len(drawn)))
