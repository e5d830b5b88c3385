"""Streams of deletion requests, for many repetitions at once: a request is one number, shard * L + slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from s3t_ext.plan.prior import check_prior

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 1 << 16  # slices (or requests, of a stream held whole) of the repetitions that run together: cache-sized
BLOCK = 1 << 20  # requests drawn at once, over these repetitions


class Stream(Protocol):
    """A law of request streams over m shards of L slices.

    `length` gives the requests after which a stream ends, None if never; `reachable` a mask (m*L,) of what may ever be
    hit; `blocks` the requests of `repeats` independent streams in order, each block (repeats, T) of int64.
    """

    def length(self, shards: int, slices: int) -> int | None: ...

    def reachable(self, shards: int, slices: int) -> NDArray[np.bool_]: ...

    def blocks(
        self, shards: int, slices: int, repeats: int, generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]: ...


@dataclass(frozen=True)
class Independent:
    """Independent requests: a uniformly drawn shard, in it a slice by the prior (None: uniform)."""

    prior: Sequence[float] | None = None

    def length(self, shards: int, slices: int) -> None:
        return None

    def reachable(self, shards: int, slices: int) -> NDArray[np.bool_]:
        import numpy as np

        return np.tile(np.array(check_prior(slices, self.prior)) > 0, shards)

    def blocks(
        self, shards: int, slices: int, repeats: int, generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]:
        size = (repeats, _columns(shards, slices, repeats))
        prior = None if self.prior is None else check_prior(slices, self.prior)
        while True:
            if prior is None:
                yield generator.integers(shards * slices, size=size)
            else:
                yield generator.integers(shards, size=size) * slices + generator.choice(slices, size=size, p=prior)


@dataclass(frozen=True)
class Bursts:
    """Cohorts: a slice index (a tier) is drawn by the prior; `size` requests in a row hit it, each in any shard."""

    size: int
    prior: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_count("size", self.size)

    def length(self, shards: int, slices: int) -> None:
        return None

    def reachable(self, shards: int, slices: int) -> NDArray[np.bool_]:
        return Independent(self.prior).reachable(shards, slices)

    def blocks(
        self, shards: int, slices: int, repeats: int, generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]:
        import numpy as np

        prior = check_prior(slices, self.prior)
        columns = _columns(shards, slices, repeats)
        tiers = np.empty((repeats, 0), dtype=np.int64)  # of the cohorts from number `first` on
        first = start = 0
        while True:
            cohorts = np.arange(start, start + columns) // self.size
            tiers, first = tiers[:, cohorts[0] - first :], int(cohorts[0])  # the cohort that goes on keeps its tier
            new = int(cohorts[-1]) + 1 - first - tiers.shape[1]
            tiers = np.concatenate([tiers, generator.choice(slices, size=(repeats, new), p=prior)], axis=1)
            yield generator.integers(shards, size=(repeats, columns)) * slices + tiers[:, cohorts - first]
            start += columns


@dataclass(frozen=True)
class Replay:
    """A history, request by request as (shard, slice), the same in every repetition."""

    requests: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError("requests: wanted at least one (shard, slice), got none")

    def length(self, shards: int, slices: int) -> int:
        return len(self.requests)

    def reachable(self, shards: int, slices: int) -> NDArray[np.bool_]:
        import numpy as np

        hit = np.zeros(shards * slices, dtype=bool)
        hit[self._flat(shards, slices)] = True
        return hit

    def blocks(
        self, shards: int, slices: int, repeats: int, generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]:
        import numpy as np

        flat = np.array(self._flat(shards, slices), dtype=np.int64)
        columns = _columns(shards, slices, repeats)
        for start in range(0, len(flat), columns):
            part = flat[start : start + columns]
            yield np.broadcast_to(part, (repeats, len(part)))

    def _flat(self, shards: int, slices: int) -> list[int]:
        for number, (shard, slice_) in enumerate(self.requests, 1):
            if not (0 <= shard < shards and 0 <= slice_ < slices):
                raise ValueError(
                    f"requests: wanted shards in 0..{shards - 1} and slices in 0..{slices - 1}, "
                    f"got ({shard}, {slice_}) as request {number}"
                )
        return [shard * slices + slice_ for shard, slice_ in self.requests]


@dataclass(frozen=True)
class Finite:
    """Equal slices of `subjects` subjects each, deleted in uniformly random order until none is left.

    Each repetition draws the whole order at once, m*L*n numbers.
    """

    subjects: int

    def __post_init__(self) -> None:
        check_count("subjects", self.subjects)

    def length(self, shards: int, slices: int) -> int:
        return shards * slices * self.subjects

    def reachable(self, shards: int, slices: int) -> NDArray[np.bool_]:
        import numpy as np

        return np.ones(shards * slices, dtype=bool)

    def blocks(
        self, shards: int, slices: int, repeats: int, generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]:
        import numpy as np

        owners = np.arange(self.length(shards, slices)) // self.subjects  # (m*L*n,) the slice of each subject
        yield generator.permuted(np.broadcast_to(owners, (repeats, len(owners))), axis=1)


def chunks(
    stream: Stream, shards: int, slices: int, repeats: int, seed: int
) -> Iterator[tuple[int, int, Iterator[NDArray[np.int64]]]]:
    """Split `repeats` streams into chunks; yield the first repetition of each, their number, and their blocks.

    Notes:
        A chunk draws from a PCG64 of its own (SeedSequence(seed).spawn) and its size depends on m, L and the stream
        alone: with equal seeds all plans meet the same requests, however far each simulation reads on.
    """
    import numpy as np

    size = max(1, CHUNK // max(shards * slices, stream.length(shards, slices) or 0))
    starts = range(0, repeats, size)
    for start, sequence in zip(starts, np.random.SeedSequence(seed).spawn(len(starts))):
        count = min(size, repeats - start)
        yield start, count, stream.blocks(shards, slices, count, np.random.Generator(np.random.PCG64(sequence)))


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless the argument `name` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: wanted an integer of at least {least}, got {value!r}")


def _columns(shards: int, slices: int, repeats: int) -> int:
    """Give the requests of a block: two for each slice, since one needs many times more only by bad luck or a prior."""
    return max(1, min(BLOCK // repeats, 2 * shards * slices))
