"""Strategies: ways to choose a shard's stage tree, by their names in the literature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from s3t_ext.plan.matching import bms
from s3t_ext.plan.prior import check_prior
from s3t_ext.plan.tree import NodePath, StageTree, check_budget, check_slices

SUBSETS_USUAL = 6
SUBSETS_LIMIT = 16  # 65,535 nodes; one slice more doubles them
RAREST = 1e-200  # a deletion probability below it counts as 0: 1/p must stay finite


def sisa(slices: int) -> StageTree:
    """Build one sequence, 0..L-1: the plan of SISA (Bourtoule et al., S&P 2021)."""
    check_slices(slices)
    return StageTree.from_sequences(slices, [range(slices)])


def rotation(slices: int, budget: int) -> StageTree:
    """Build `budget` sequences by iterative cyclic rotation.

    B <= L: the rotations of 0..L-1 at offsets floor(j*L/B), evenly spaced. B > L: all L rotations, then for prefix
    lengths 1, 2, ... every sequence so far with that prefix kept and its suffix rotated. They come in rounds of L, one
    for each first slice; the last, incomplete round is evenly spaced too.

    Args:
        slices: L.
        budget: number of sequences B, 1..L!.

    Notes:
        S3T, Algorithm 1. With B = L every slice heads one sequence and stands once at each position.
    """
    check_budget(slices, budget)
    chosen: list[NodePath] = []
    rounds = _rotation_rounds(slices)
    while len(chosen) < budget:
        wanted = min(budget - len(chosen), slices)
        candidates = next(rounds)
        chosen += [candidates[j * slices // wanted] for j in range(wanted)]
    return StageTree.from_sequences(slices, chosen)


def _rotation_rounds(slices: int) -> Iterator[list[NodePath]]:
    """Yield L new sequences at a time, one for each first slice; all rounds together are the L! permutations."""
    identity = tuple(range(slices))
    found = [identity[shift:] + identity[:shift] for shift in range(slices)]
    yield found
    for kept in range(1, slices - 1):
        base = list(found)
        for shift in range(1, slices - kept):
            turned = [path[:kept] + path[kept + shift :] + path[kept : kept + shift] for path in base]
            found += turned
            for start in range(0, len(turned), slices):
                yield turned[start : start + slices]


def random(slices: int, budget: int, *, seed: int = 0) -> StageTree:
    """Draw `budget` distinct sequences, every set of B permutations with the same probability.

    Args:
        slices: L.
        budget: number of sequences B, 1..L!.
        seed: integer of at least 0; see `conditional` for what it fixes.
    """
    check_budget(slices, budget)
    return _draw([1.0] * slices, budget, seed)


def conditional(slices: int, budget: int, *, prior: Sequence[float] | None = None, seed: int = 0) -> StageTree:
    """Draw `budget` distinct sequences in which slices of low deletion probability tend to come first.

        P[next slice = s | prefix] = (1 / p_s) / sum over the slices u that are left of 1 / p_u

    This is the Plackett-Luce law of permutations; slices with p = 0 come first of all. The sequences are drawn from it
    one by one without replacement, whatever B.

    Args:
        slices: L.
        budget: number of sequences B, 1..L!.
        prior: probability p of each slice to be hit by a request, (L,); uniform where not given, which is `random`.
        seed: integer of at least 0, of NumPy's PCG64. Machines with one NumPy release agree unless two arrival times
            are equal but for rounding.

    Notes:
        S3T names the strategy; its released code draws by 1 - p, which hardly tells slices apart when L is large.
        Distinct by construction: stochastic beam search (Kool, van Hoof and Welling, ICML 2019).
    """
    check_budget(slices, budget)
    return _draw([1 / max(p, RAREST) for p in check_prior(slices, prior)], budget, seed)


def _draw(weights: Sequence[float], budget: int, seed: int) -> StageTree:
    """Draw distinct sequences from the Plackett-Luce law of these weights, without replacement.

    Every sequence is the end of an exponential wait at the rate of its probability; the B that end first are the draw.
    A prefix ends with the first sequence below it, so its wait is exponential too, and the B first prefixes of each
    length hold the draw. Waits have no memory: beyond the first of its children, the others begin anew.
    """
    import numpy as np

    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: wanted an integer of at least 0, got {seed!r}")
    generator = np.random.Generator(np.random.PCG64(seed))
    paths = np.empty((1, 0), dtype=np.int64)  # (n, depth), n <= B
    left = np.arange(len(weights))[None]  # (n, L - depth) slices not on the path
    log_rate, log_end = np.zeros(1), np.full(1, -np.inf)  # (n,) in logarithms: a rate falls to 1/L!; the first end is 0
    while width := left.shape[1]:
        share = np.array(weights)[left]  # (n, L - depth)
        share /= share.sum(axis=1, keepdims=True)
        wait = generator.standard_exponential(share.shape) / share  # (n, L - depth)
        wait -= wait.min(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            log_wait = np.log(wait) - log_rate[:, None]  # (n, L - depth), -inf for the first child
        latest = log_end.max() if len(left) == budget else np.inf  # first children alone fill the beam by then
        row, column = np.nonzero(log_wait <= latest)
        ends = np.logaddexp(log_end[row], log_wait[row, column])
        kept = np.sort(np.argsort(ends, kind="stable")[:budget])
        row, column, log_end = row[kept], column[kept], ends[kept]  # (n,) of the next length
        log_rate = log_rate[row] + np.log(share[row, column])
        paths = np.column_stack([paths[row], left[row, column]])
        left = left[row][np.arange(width) != column[:, None]].reshape(len(row), width - 1)
    return StageTree.from_sequences(len(weights), paths.tolist())


def subsets(slices: int) -> StageTree:
    """Build one node for each non-empty subset of slices: the ideal depth, whatever is dirty.

    The parent of a subset is its predecessor in a symmetric chain: read a member as `)` and a non-member as `(`, match
    the brackets, and take out the last unmatched member; the foot of a chain hangs below the subset without its last
    member. Full chains make the number of sequences the least there can be, C(L, floor(L/2)), and one is 0..L-1.

    Raises:
        ValueError: L is above 16; the message says how many stages it would take.

    Notes:
        2^L - 1 nodes and L*2^(L-1) slice-passes. Chains: Greene and Kleitman, J. Combin. Theory A 20 (1976).
    """
    check_slices(slices)
    if slices > SUBSETS_LIMIT:
        raise ValueError(
            f"slices: subsets trains every subset, {2**slices - 1} stages for {slices} slices: "
            f"wanted at most {SUBSETS_LIMIT} slices, or another strategy"
        )
    paths: list[NodePath] = [()]
    for subset in range(1, 1 << slices):
        last = _last_unmatched(subset)
        paths.append((*paths[subset ^ (1 << last)], last))  # less a bit, so it is there already
    return StageTree.from_sequences(slices, paths)


def _last_unmatched(subset: int) -> int:
    unmatched, opened = -1, 0
    for index in range(subset.bit_length()):
        if not subset >> index & 1:
            opened += 1
        elif opened:
            opened -= 1
        else:
            unmatched = index
    return unmatched if unmatched >= 0 else subset.bit_length() - 1


def _greedy(slices: int, budget: float | None, *, prior: Sequence[float] | None) -> StageTree:
    from s3t_ext.plan.greedy import greedy  # which starts from the strategies here

    return greedy(slices, budget, prior=prior)


STRATEGIES: dict[str, Callable[..., StageTree]] = {
    "sisa": sisa,
    "rotation": rotation,
    "bms": bms,
    "conditional": conditional,
    "random": random,
    "subsets": subsets,
    "greedy": _greedy,
}
BUDGETED = frozenset({"rotation", "bms", "conditional", "random"})  # the others fix their own sequences
PRICED = frozenset({"greedy"})  # a budget in slice-passes
WEIGHED = frozenset({"bms", "conditional", "greedy"})  # read a prior
SEEDED = frozenset({"conditional", "random"})  # draw


def usual(slices: int, budget: int | None = None) -> str:
    """Name the strategy where none is named: `subsets` to 6 slices; above, or with a budget, `rotation`.

    Notes:
        At 6 slices `subsets` takes 1.5 times the slice-passes of `rotation` with B = L, at 8 slices 3.6 times.
    """
    return "subsets" if slices <= SUBSETS_USUAL and budget is None else "rotation"


def build(
    strategy: str, slices: int, budget: float | None = None, *, prior: Sequence[float] | None = None, seed: int = 0
) -> StageTree:
    """Build the tree of a strategy by name.

    Args:
        strategy: a name in `STRATEGIES`.
        slices: number of slices L of a shard.
        budget: number of sequences, for those in `BUDGETED` (default L); slice-passes for those in `PRICED`
            (default what `rotation` costs).
        prior: probability of each slice to be hit by a request, (L,), for those in `WEIGHED` (default uniform).
        seed: of those that draw; the others give the same tree for every seed.

    Raises:
        ValueError: unknown strategy, L < 1, a budget outside 1..L!, no such prior, or a budget or a prior for a
            strategy that takes none.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: wanted one of {', '.join(sorted(STRATEGIES))}, got {strategy!r}")
    arguments: dict[str, Any] = {}
    if strategy in BUDGETED:
        arguments["budget"] = slices if budget is None else budget
    elif strategy in PRICED:
        arguments["budget"] = budget
    elif budget is not None:
        raise ValueError(f"budget: {strategy} fixes its own sequences, wanted none, got {budget!r}")
    if strategy in WEIGHED:
        arguments["prior"] = prior
    elif prior is not None:
        raise ValueError(f"prior: {strategy} reads none, wanted one of {', '.join(sorted(WEIGHED))}, which do")
    if strategy in SEEDED:
        arguments["seed"] = seed
    return STRATEGIES[strategy](slices, **arguments)
