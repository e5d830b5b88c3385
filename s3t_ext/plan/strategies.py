"""Strategies: ways to choose a shard's stage tree, by their names in the literature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from s3t_ext.plan.tree import Path, StageTree

SUBSETS_LIMIT = 16  # 65,535 nodes; one slice more doubles them


def sisa(slices: int) -> StageTree:
    """Build one sequence, 0..L-1: the plan of SISA (Bourtoule et al., S&P 2021)."""
    _check_slices(slices)
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
    _check_slices(slices)
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= math.factorial(slices):
        raise ValueError(f"budget: wanted 1..{slices}! = {math.factorial(slices)} sequences, got {budget!r}")
    chosen: list[Path] = []
    rounds = _rotation_rounds(slices)
    while len(chosen) < budget:
        wanted = min(budget - len(chosen), slices)
        candidates = next(rounds)
        chosen += [candidates[j * slices // wanted] for j in range(wanted)]
    return StageTree.from_sequences(slices, chosen)


def _rotation_rounds(slices: int) -> Iterator[list[Path]]:
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
    _check_slices(slices)
    if slices > SUBSETS_LIMIT:
        raise ValueError(
            f"slices: subsets trains every subset, {2**slices - 1} stages for {slices} slices: "
            f"wanted at most {SUBSETS_LIMIT} slices, or another strategy"
        )
    paths: list[Path] = [()]
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


STRATEGIES: dict[str, Callable[..., StageTree]] = {"sisa": sisa, "rotation": rotation, "subsets": subsets}
BUDGETED = frozenset({"rotation"})


def build(strategy: str, slices: int, budget: int | None = None) -> StageTree:
    """Build the tree of a strategy by name.

    Args:
        strategy: a name in `STRATEGIES`.
        slices: number of slices L of a shard.
        budget: number of sequences, for `rotation` (default L); the other strategies fix it themselves.

    Raises:
        ValueError: unknown strategy, L < 1, a budget outside 1..L!, or a budget for a strategy that takes none.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: wanted one of {', '.join(sorted(STRATEGIES))}, got {strategy!r}")
    if strategy in BUDGETED:
        return STRATEGIES[strategy](slices, slices if budget is None else budget)
    if budget is not None:
        raise ValueError(f"budget: {strategy} fixes its own sequences, wanted none, got {budget!r}")
    return STRATEGIES[strategy](slices)


def _check_slices(slices: int) -> None:
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise ValueError(f"slices: wanted an integer of at least 1, got {slices!r}")
