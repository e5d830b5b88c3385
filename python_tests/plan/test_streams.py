"""Request streams: the law of each, what ends, what is refused."""

import itertools
import re

import numpy as np
import pytest

from s3t_ext.plan import streams
from s3t_ext.plan.streams import Bursts, Finite, Independent, Replay, chunks

PRIOR = (0.5, 0.3, 0, 0.2)
HISTORY = [(0, 1), (2, 3), (0, 1), (1, 0), (2, 2)] * 7


def draw(stream, shards, slices, repeats, length, seed=0):
    """Read the first `length` requests of every repetition, (R, length)."""
    rows = []
    for _, count, blocks in chunks(stream, shards, slices, repeats, seed):
        parts, seen = [], 0
        while seen < length:
            parts.append(next(blocks))
            assert parts[-1].shape[0] == count
            seen += parts[-1].shape[1]
        rows.append(np.concatenate(parts, axis=1)[:, :length])
    return np.concatenate(rows)


@pytest.mark.parametrize("stream", [Independent(), Independent(PRIOR), Bursts(1, PRIOR), Bursts(5), Bursts(7, PRIOR)])
def test_every_slice_is_hit_as_often_as_its_prior_says(stream):
    shards, slices, repeats, length = 3, 4, 500, 140
    requests = draw(stream, shards, slices, repeats, length)
    share = np.tile(stream.prior or (0.25,) * 4, shards) / shards  # (m*L,)
    counts = np.stack([np.bincount(row, minlength=shards * slices) for row in requests])  # (R, m*L)
    assert counts.shape[1] == shards * slices
    error = counts.std(axis=0, ddof=1) / np.sqrt(repeats)
    assert (abs(counts.mean(axis=0) - length * share) <= 4 * error).all()
    assert (stream.reachable(shards, slices) == (share > 0)).all()
    assert len({tuple(row) for row in requests}) == repeats


@pytest.mark.parametrize("stream", [Independent(), Independent(PRIOR)])
def test_independent_requests_do_not_know_of_one_another(stream):
    requests = draw(stream, 2, 4, 400, 100)
    share = np.tile(stream.prior or (0.25,) * 4, 2) / 2
    same = (requests[:, 1:] == requests[:, :-1]).mean(axis=1)
    assert abs(same.mean() - (share**2).sum()) <= 4 * same.std() / 20


@pytest.mark.parametrize("size", [1, 3, 24, 25, 100])  # a block of 12 slices has 24 columns
def test_a_burst_stays_in_its_tier_and_goes_to_any_shard(size):
    requests = draw(Bursts(size), 3, 4, 50, 600)
    cohorts = (requests % 4)[:, : 600 // size * size].reshape(50, -1, size)
    assert (cohorts == cohorts[:, :, :1]).all()
    changes = (cohorts[:, 1:, 0] != cohorts[:, :-1, 0]).mean()
    assert changes == pytest.approx(0.75, abs=0.1)  # the next cohort draws its tier afresh
    assert (requests // 4)[:, 1:][requests[:, 1:] // 4 != requests[:, :-1] // 4].size == pytest.approx(
        50 * 599 * 2 / 3, rel=0.03
    )


def test_a_history_is_replayed_in_every_repetition():
    stream = Replay(HISTORY)
    assert stream.length(3, 4) == 35 > 24  # more than one block
    (_, count, blocks), *rest = chunks(stream, 3, 4, 2, 0)
    blocks = np.concatenate(list(blocks), axis=1)
    assert (count, rest) == (2, [])
    assert blocks.tolist() == [[4 * shard + slice_ for shard, slice_ in HISTORY]] * 2
    assert np.flatnonzero(stream.reachable(3, 4)).tolist() == [1, 4, 10, 11]


def test_every_subject_of_a_finite_slice_leaves_once():
    stream = Finite(3)
    assert stream.length(2, 4) == 24
    requests = draw(stream, 2, 4, 30, 24)
    assert (np.sort(requests, axis=1) == np.repeat(np.arange(8), 3)).all()
    assert len({tuple(row) for row in requests}) == 30
    assert stream.reachable(2, 4).all()


def test_orders_of_finite_subjects_are_equally_likely():
    requests = draw(Finite(1), 1, 3, 6000, 3)
    counts = np.array([(requests == order).all(axis=1).sum() for order in itertools.permutations(range(3))])
    assert (abs(counts - 1000) <= 4 * np.sqrt(6000 * 1 / 6 * 5 / 6)).all()


@pytest.mark.parametrize("stream", [Independent(PRIOR), Bursts(5, PRIOR), Finite(2)])
def test_a_seed_names_the_requests_and_a_chunk_has_streams_of_its_own(stream, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 100)
    assert [part[:2] for part in chunks(stream, 2, 4, 30, 5)] == (
        [(0, 6), (6, 6), (12, 6), (18, 6), (24, 6)] if stream == Finite(2) else [(0, 12), (12, 12), (24, 6)]
    )
    requests = draw(stream, 2, 4, 30, 16, seed=5)
    assert (requests == draw(stream, 2, 4, 30, 16, seed=5)).all()
    assert len({tuple(row) for row in requests}) == 30
    assert (requests != draw(stream, 2, 4, 30, 16, seed=6)).any()


def test_bad_streams_are_refused():
    for wanted, make in (
        ("size: wanted an integer of at least 1, got 0", lambda: Bursts(0)),
        ("subjects: wanted an integer of at least 1, got True", lambda: Finite(True)),
        ("requests: wanted at least one (shard, slice), got none", lambda: Replay([])),
        (
            "requests: wanted shards in 0..2 and slices in 0..2, got (2, 3) as request 2",
            lambda: Replay(HISTORY).reachable(3, 3),
        ),
        ("shards in 0..1 and slices in 0..3, got (2, 3)", lambda: Replay(HISTORY).reachable(2, 4)),
        ("got (-1, 0) as request 1", lambda: Replay([(-1, 0)]).reachable(2, 4)),
        ("got (0, -1) as request 1", lambda: Replay([(0, -1)]).reachable(2, 4)),
        ("prior: wanted 3 probabilities", lambda: Independent(PRIOR).reachable(2, 3)),
        ("prior: wanted 3 probabilities", lambda: Bursts(2, PRIOR).reachable(2, 3)),
    ):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            make()
