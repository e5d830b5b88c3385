"""Attack scores and their metrics against closed forms and examples worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm

from s3t_ext.system.evidence import membership as m


def by_pairs(members, others) -> float:
    return float(np.mean([(x > y) + 0.5 * (x == y) for x, y in itertools.product(members, others)]))


@pytest.mark.parametrize(
    ("members", "others", "area"),
    [
        ([3, 4, 5], [0, 1, 2], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1, 1], [1, 1], 0.5),
        ([1, 3], [2, 2], 0.5),
        ([2, 3], [1, 2], 3.5 / 4),
    ],
)
def test_auc_of_small_examples(members, others, area) -> None:
    assert m.auc(np.array(members, float), np.array(others, float))[0] == pytest.approx(area, abs=1e-15)


def test_auc_and_its_error_are_those_of_the_pairs(rng) -> None:
    """DeLong's variance from its definition, over the matrix of pairs; scores in tenths, so that a third are ties."""
    members, others = rng.integers(2, 12, 23) / 10, rng.integers(0, 10, 31) / 10
    pairs = (members[:, None] > others) + 0.5 * (members[:, None] == others)  # (m, n)
    wanted = math.sqrt(pairs.mean(1).var(ddof=1) / 23 + pairs.mean(0).var(ddof=1) / 31)
    assert m.auc(members, others) == pytest.approx((by_pairs(members, others), wanted), abs=1e-12)
    assert (pairs == 0.5).sum() > 20


def test_auc_of_two_normals_has_its_closed_form(rng) -> None:
    """AUC = Phi(d / sqrt 2); and the error is the spread of the estimate."""
    found = np.array([m.auc(rng.normal(1, 1, 200), rng.normal(0, 1, 100)) for _ in range(400)])  # (400, 2)
    assert found[:, 0].mean() == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=4 * found[:, 1].mean() / 20)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.12)


def test_error_without_signal_is_that_of_the_rank_sum(rng) -> None:
    found = [m.auc(rng.normal(size=60), rng.normal(size=40))[1] for _ in range(300)]
    assert np.mean(found) == pytest.approx(math.sqrt((60 + 40 + 1) / (12 * 60 * 40)), rel=0.03)


def test_difference_knows_that_the_records_are_the_same(rng) -> None:
    """Common difficulty cancels; independent scores add up as variances do; a model equals itself with certainty."""
    members, others = rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)
    assert m.auc_difference(members, others, members, others) == (0.0, 0.0)
    near = m.auc_difference(members, others, members + rng.normal(0, 0.1, 300), others + rng.normal(0, 0.1, 300))
    again = rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)
    apart = m.auc_difference(members, others, *again)
    assert near[1] < apart[1] / 4
    assert apart[1] == pytest.approx(math.hypot(m.auc(members, others)[1], m.auc(*again)[1]), rel=0.15)
    assert apart[0] == pytest.approx(m.auc(members, others)[0] - m.auc(*again)[0], abs=1e-12)


@pytest.mark.parametrize(
    ("members", "others", "fpr", "rate"),
    [
        ([5, 4, 1], list(range(4)), 0.01, 2 / 3),  # nobody else may reach the threshold: 4
        ([3, 3, 1], [3, 0, 0, 0], 0.01, 0.0),  # a tie with another is not above it
        ([3, 3, 1], [3, 0, 0, 0], 0.25, 1.0),  # one of four may: 3 alone reaches 1 as well
        ([2, 2, 2], [2] * 4, 1.0, 1.0),
        ([9] * 3, [0] * 100, 0.01, 1.0),
    ],
)
def test_tpr_is_that_of_a_threshold_that_there_is(members, others, fpr, rate) -> None:
    assert m.tpr_at_fpr(np.array(members, float), np.array(others, float), fpr) == pytest.approx(rate)


def test_tpr_at_one_percent_of_a_hundred_allows_one(rng) -> None:
    others = np.arange(100.0)
    assert m.tpr_at_fpr(np.array([98.5, 97.5, 99.5, 0]), others) == 0.5  # 98.5: of the others 99 alone is above
    members = rng.integers(0, 120, 50).astype(float)
    best = max((np.mean(members >= t) for t in np.arange(121) if np.mean(others >= t) <= 0.01), default=0)
    assert m.tpr_at_fpr(members, others) == best


def test_losses_and_confidences() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], np.float32)  # (3, 3)
    y = np.array([0, 0, 0])
    assert m.log_loss(p, y)[0] == pytest.approx(-math.log(0.7), rel=1e-6)
    assert m.logit_confidence(p, y)[0] == pytest.approx(math.log(0.7 / 0.3), rel=1e-6)
    for values in (m.log_loss(p, y), m.logit_confidence(p, y)):
        assert np.isfinite(values).all(), "a probability of 0 or 1 is no infinity"
    logits = np.array([[40.0, 0.0, -40.0]])
    sure = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert m.logit_confidence(sure, np.array([0]))[0] == pytest.approx(40.0), "1 - p would have rounded to 0"


def test_calibrated_loss_leaves_out_models_that_saw_the_record() -> None:
    reference = np.array([[1.0, 9.0], [3.0, 5.0], [8.0, 7.0]])  # (3, 2)
    saw = np.array([[False, True], [False, False], [True, False]])
    assert m.by_calibrated_loss(np.array([0.5, 1.0]), reference, saw).tolist() == [1.5, 5.0]
    with pytest.raises(ValueError, match="got none for record 1"):
        m.by_calibrated_loss(np.zeros(2), reference[:1], saw[:1])
    with pytest.raises(ValueError, match="saw: expected the shape"):
        m.by_calibrated_loss(np.zeros(2), reference, saw[:1])


def test_likelihood_ratio_of_a_hand_worked_example() -> None:
    """Out models 0 and 2, in models 4 and 6; pooled variances 2 and 2: log N(3; 5, 2) - log N(3; 1, 2) = 0."""
    reference, saw = np.array([[0.0], [2.0], [4.0], [6.0]]), np.array([[False], [False], [True], [True]])
    for phi, wanted in ((3.0, 0.0), (5.0, 4.0), (1.0, -4.0)):
        assert m.by_likelihood_ratio(np.array([phi]), reference, saw)[0] == pytest.approx(wanted)
    assert m.by_likelihood_ratio(np.array([3.0]), reference[:2], saw[:2])[0] == pytest.approx(2 / math.sqrt(2))


@pytest.mark.parametrize(("models", "ratio"), [(4, 1.0), (31, 1.0), (32, 10.0)])
def test_variances_are_pooled_where_models_are_few(rng, models, ratio) -> None:
    reference = rng.normal(size=(models, 1)) * [1.0, 10.0]  # (K, 2), of one shape
    reference -= reference.mean(0)
    score = m.by_likelihood_ratio(np.ones(2), reference, np.zeros((models, 2), bool))
    assert score[0] / score[1] == pytest.approx(ratio)


def test_likelihood_ratio_is_the_best_attack_where_its_model_holds(rng) -> None:
    """Records of different difficulty: the loss alone sees little, the ratio comes near the optimum Phi(d / sqrt 2)."""
    n, models, shift = 2000, 64, 1.5
    difficulty = 5 * rng.normal(size=n)
    saw = np.zeros((models, n), bool)
    saw[::2] = True
    reference = difficulty + rng.normal(size=(models, n)) + shift * saw
    member = np.arange(n) < n // 2
    phi = difficulty + rng.normal(size=n) + shift * member
    ratio = m.by_likelihood_ratio(phi, reference, saw)
    assert m.auc(ratio[member], ratio[~member])[0] == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=0.02)
    assert m.auc(phi[member], phi[~member])[0] < 0.65
    offline = m.by_likelihood_ratio(phi, reference[1::2], saw[1::2])
    assert m.auc(offline[member], offline[~member])[0] > 0.82


def test_every_attack_at_once(rng) -> None:
    p = rng.dirichlet(np.ones(3), size=(5, 8))  # (1 + 4, 8, 3)
    labels, saw = rng.integers(0, 3, 8), np.zeros((4, 8), bool)
    scores = m.attacks(p[0], labels, p[1:], saw)
    assert list(scores) == ["loss", "calibrated", "lira"]
    assert all(score.shape == (8,) for score in scores.values())
    assert list(m.attacks(p[0], labels, p[:0], saw[:0])) == ["loss"]


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (0, 3)])
def test_too_few_scores_are_refused(sizes) -> None:
    with pytest.raises(ValueError, match="at least two scores each"):
        m.auc(np.zeros(sizes[0]), np.zeros(sizes[1]))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
