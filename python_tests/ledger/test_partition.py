"""Placement: a function of key and subject alone, uniform over the cells."""

import inspect

import pytest

from s3t_ext.ledger import Key, place

KEY = Key(bytes(range(32)))


def test_placement_is_fixed():
    """Stored placements hang on these values: they may never change."""
    assert [place(KEY, subject, 5, 4) for subject in ("ann", "bob", "eve", "ü")] == [(4, 0), (0, 1), (1, 0), (2, 0)]


def test_placement_knows_no_other_record():
    assert list(inspect.signature(place).parameters) == ["key", "subject", "shards", "slices", "generation"]
    users = [f"user {index}" for index in range(500)]
    before = {user: place(KEY, user, 5, 4) for user in users}
    assert {user: place(KEY, user, 5, 4) for user in reversed(users[100:])}.items() <= before.items()


def test_placement_is_uniform():
    from scipy.stats import chisquare

    counts = [0] * 35
    for index in range(35_000):
        shard, slice_ = place(KEY, f"user {index}", 5, 7)
        counts[shard * 7 + slice_] += 1
    assert chisquare(counts).pvalue > 1e-3


def test_another_key_places_elsewhere():
    users = [f"user {index}" for index in range(400)]
    same = sum(place(KEY, user, 5, 4) == place(KEY.derive("other"), user, 5, 4) for user in users)
    assert same < 60  # 20 expected


def test_no_cells_are_refused():
    with pytest.raises(ValueError, match="0 shards of 4 slices"):
        place(KEY, "ann", 0, 4)
