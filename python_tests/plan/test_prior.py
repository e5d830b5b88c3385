"""Priors and declared histories: what is accepted, and what the refusals say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3t_ext.plan.prior import check_prior, prior_of, read_history


def test_a_prior_is_uniform_unless_given():
    assert check_prior(4) == (0.25,) * 4
    assert check_prior(3, [0.5, 0.25, 0.25]) == (0.5, 0.25, 0.25)
    assert check_prior(2, [1, 0]) == (1, 0)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=12))
def test_rounding_in_the_sum_is_divided_out(weights):
    near = [w / sum(weights) * (1 + 1e-7) for w in weights]
    assert sum(check_prior(len(near), near)) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("slices", "prior", "wanted"),
    [
        (0, None, "slices: wanted an integer of at least 1, got 0"),
        (True, None, "slices: wanted an integer of at least 1, got True"),
        (3, [0.5, 0.5], "prior: wanted 3 probabilities, one for each slice, got 2"),
        (2, [1.5, -0.5], "at least 0, got -0.5 for slice 1"),
        (2, [float("nan"), 1], "at least 0, got nan for slice 0"),
        (2, [0.5, 0.6], "sum to 1, got a sum of 1.1"),
    ],
)
def test_bad_priors_are_refused(slices, prior, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        check_prior(slices, prior)


def test_a_history_is_read_and_counted(tmp_path):
    file = tmp_path / "history"
    file.write_text("# shard slice\n0 1\n3,1  # again\n\n 2, 0\n")
    assert read_history(file) == [(0, 1), (3, 1), (2, 0)]
    assert prior_of(read_history(file), 3) == (2 / 6, 3 / 6, 1 / 6)
    with pytest.raises(ValueError, match=re.escape("slices in 0..0, got 1")):
        prior_of(read_history(file), 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "wanted at least one request"),
        ("# nothing\n\n", "wanted at least one request"),
        ("0 1\n0 x\n", "line 2: wanted `shard slice`, two integers from 0 on, got '0 x'"),
        ("0 1 2\n", "line 1"),
        ("0 -1\n", "line 1"),
    ],
)
def test_bad_histories_are_refused(tmp_path, text, wanted):
    file = tmp_path / "history"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        read_history(file)
