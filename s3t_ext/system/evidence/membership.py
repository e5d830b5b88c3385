"""Membership inference: scores of an attack from a model's outputs, and how well they tell members from others.

Arrays in, arrays out; no torch. A score is higher where the attack holds a record the likelier to have been trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

TINY = float(np.finfo(np.float32).tiny)  # a probability of 0 has a finite logarithm
SLACK = 0.03  # a difference of AUC up to this, or to three standard errors, is none
FEW = 32  # models of a record below which its variance is not estimated from them alone


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute each record's loss.

        l = -log p_y

    Args:
        probabilities: (..., n, C), rows sum to 1; ``labels``: (n,) indices of classes.

    Returns:
        (..., n) float64, finite.
    """
    return -_logarithm(_of_label(np.asarray(probabilities, np.float64), labels))  # (..., n)


def logit_confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scale the confidence in the label so that over models it is about normal.

        phi = log p_y - log sum_{c != y} p_c

    Args and Returns: as ``log_loss``.

    Notes:
        Carlini et al., Membership Inference Attacks From First Principles (S&P 2022), section V-C. The sum over the
        other classes keeps digits that 1 - p_y would cancel.
    """
    p = np.array(probabilities, np.float64)  # (..., n, C)
    own = _of_label(p, labels)  # (..., n)
    p[..., np.arange(len(labels)), labels] = 0
    return _logarithm(own) - _logarithm(p.sum(-1))


def by_loss(loss: np.ndarray) -> np.ndarray:
    """Score records by their loss alone: -l, (n,).

    Notes:
        The loss threshold of Yeom et al., Privacy Risk in Machine Learning (CSF 2018), at every threshold.
    """
    return -np.asarray(loss, np.float64)


def by_calibrated_loss(loss: np.ndarray, reference: np.ndarray, saw: np.ndarray) -> np.ndarray:
    """Score records by how much easier they are than for models that never saw them.

        mean_{k: not saw[k]} l_k - l

    Args:
        loss: (n,) of the audited model; ``reference``: (K, n) of reference models;
        saw: (K, n) bool, whether a model was trained on a record.

    Returns:
        (n,) float64.

    Raises:
        ValueError: a record has no reference model that never saw it.

    Notes:
        Difficulty calibration: Watson et al., On the Importance of Difficulty Calibration in Membership Inference
        Attacks (ICLR 2022), with the loss as the score.
    """
    return _mean(reference, ~_checked(reference, saw)) - np.asarray(loss, np.float64)


def by_likelihood_ratio(phi: np.ndarray, reference: np.ndarray, saw: np.ndarray) -> np.ndarray:
    """Score records by a Gaussian of each record's confidence over models without it, and with it where there are any.

        online:   log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)
        offline:  (phi - mu_out) / s_out, where any record lacks a model that saw it

    Args:
        phi: (n,) ``logit_confidence`` of the audited model; ``reference``: (K, n) of reference models;
        saw: (K, n) bool, whether a model was trained on a record.

    Returns:
        (n,) float64.

    Raises:
        ValueError: a record has no reference model that never saw it.

    Notes:
        LiRA: Carlini et al. (S&P 2022), Algorithm 1 and equation 4, whose 1 - Pr[Z > phi] grows with the offline score
        and would round to ties. With fewer than 32 models a record, the variance is pooled over records.
    """
    saw = _checked(reference, saw)
    phi, reference = np.asarray(phi, np.float64), np.asarray(reference, np.float64)
    out, spread_out = _mean(reference, ~saw), _spread(reference, ~saw)  # (n,), (n,)
    if not saw.any(0).all():
        return (phi - out) / spread_out
    return norm.logpdf(phi, _mean(reference, saw), _spread(reference, saw)) - norm.logpdf(phi, out, spread_out)


def auc(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Estimate the area under the ROC curve and its standard error.

        AUC = mean over pairs of [x > y] + [x = y] / 2
        SE^2 = var_i(V_i) / m + var_j(W_j) / n,  V_i, W_j the means of that over the pairs of member i, of other j

    Args:
        members: (m,) scores; ``others``: (n,) scores; at least two each.

    Returns:
        AUC and SE.

    Notes:
        DeLong, DeLong and Clarke-Pearson (Biometrics 1988), by midranks, so ties are exact. A perfect separation has
        SE 0.
    """
    above, below = _placements(members, others)
    return float(above.mean()), _error(above, below)


def auc_difference(
    members: np.ndarray, others: np.ndarray, members_there: np.ndarray, others_there: np.ndarray
) -> tuple[float, float]:
    """Estimate the difference of two models' AUC on the same records, and its standard error.

    Args:
        members, others: (m,) and (n,) scores by the one model; the other two: of the same records by the other.

    Returns:
        AUC - AUC there, and the SE of that: as of ``auc``, with the differences of V and W in their place.

    Notes:
        DeLong et al. (1988) for correlated curves: the records' common difficulty cancels.
    """
    here, there = _placements(members, others), _placements(members_there, others_there)
    above, below = here[0] - there[0], here[1] - there[1]  # (m,), (n,)
    return float(above.mean()), _error(above, below)


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float = 0.01) -> float:
    """Give the greatest share of members above a threshold that at most ``fpr`` of the others reach.

    Args:
        members: (m,) scores; ``others``: (n,) scores; ``fpr``: at least 0.

    Returns:
        TPR of a threshold that there is: a tie is above with all it ties with, and nothing is interpolated. With n
        below 1 / fpr no other may reach it.
    """
    members, others = np.sort(members), np.sort(others)
    thresholds = np.unique(members)  # a threshold between members' scores counts no more of them
    reached = len(others) - np.searchsorted(others, thresholds)  # others >= threshold
    allowed = thresholds[reached <= fpr * len(others) * (1 + 1e-12)]
    return float(np.mean(members >= allowed[0])) if len(allowed) else 0.0


def attacks(
    probabilities: np.ndarray, labels: np.ndarray, references: np.ndarray, saw: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Score records by every attack.

    Args:
        probabilities: (n, C) of the audited model; ``labels``: (n,);
        references: (K, n, C) of reference models, K may be 0; ``saw``: (K, n) bool.

    Returns:
        (n,) scores by attack: ``loss``, and with references ``calibrated`` and ``lira``.
    """
    loss = log_loss(probabilities, labels)
    scores = {"loss": by_loss(loss)}
    if len(references):
        phi, of_references = logit_confidence(probabilities, labels), logit_confidence(references, labels)
        scores["calibrated"] = by_calibrated_loss(loss, log_loss(references, labels), saw)
        scores["lira"] = by_likelihood_ratio(phi, of_references, saw)
    return scores


def bound(error: float) -> float:
    """Give the difference of AUC from which on it is one: max(0.03, 3 SE)."""
    return max(SLACK, 3 * error)


def compare(
    models: Mapping[str, np.ndarray],
    oracles: Sequence[str],
    labels: np.ndarray,
    references: np.ndarray,
    saw: np.ndarray,
    members: np.ndarray,
    others: np.ndarray,
) -> dict[str, Any]:
    """Attack members against others by every model, and hold the model ``served`` against oracles.

    Args:
        models: probabilities (n, C) by name; ``oracles``: which of them; ``labels``, ``references``, ``saw``: as of
            ``attacks``, of the same n records; ``members``, ``others``: indices into them.

    Returns:
        members, others (how many), attacks (by attack and model: auc, se, tpr at 1% FPR; of an oracle also the
        difference of served from it, difference_se, bound, within).
    """
    rows, m = np.concatenate([members, others]), len(members)
    scores = {name: attacks(p[rows], labels[rows], references[:, rows], saw[:, rows]) for name, p in models.items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for attack, served in scores["served"].items():
        found[attack] = {}
        for name, by_attack in scores.items():
            score = by_attack[attack]
            area, error = auc(score[:m], score[m:])
            told = {"auc": area, "se": error, "tpr": tpr_at_fpr(score[:m], score[m:])}
            if name in oracles:
                gap, error = auc_difference(served[:m], served[m:], score[:m], score[m:])
                within = abs(gap) <= bound(error)
                told |= {"difference": gap, "difference_se": error, "bound": bound(error), "within": within}
            found[attack][name] = told
    return {"members": m, "others": len(others), "attacks": found}


def _of_label(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return p[..., np.arange(len(labels)), labels]


def _logarithm(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, TINY))


def _checked(reference: np.ndarray, saw: np.ndarray) -> np.ndarray:
    saw = np.asarray(saw, bool)
    if saw.shape != np.shape(reference):
        raise ValueError(f"saw: expected the shape of reference, {np.shape(reference)}, got {saw.shape}")
    if saw.all(0).any():
        raise ValueError(
            f"saw: expected a reference model without it for each record, got none for record {saw.all(0).argmax()}"
        )
    return saw


def _mean(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.where(of, values, 0).sum(0) / of.sum(0)  # (n,)


def _spread(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Give each record's standard deviation over its models; the pooled one where it has few."""
    count = of.sum(0)  # (n,)
    squares = np.where(of, (values - _mean(values, of)) ** 2, 0).sum(0)  # (n,)
    pooled = squares.sum() / max(1, (count - 1).sum())
    own = squares / np.maximum(1, count - 1)
    return np.sqrt(np.maximum(np.where(count < FEW, pooled, own), TINY))


def _placements(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the share of others below each member (m,), and of members above each other (n,); a tie is a half."""
    m, n = len(members), len(others)
    if min(m, n) < 2:
        raise ValueError(f"members, others: expected at least two scores each, got {m} and {n}")
    ranks = rankdata(np.concatenate([members, others]))  # midranks
    above = (ranks[:m] - rankdata(members)) / n  # (m,)
    below = 1 - (ranks[m:] - rankdata(others)) / m  # (n,)
    return above, below


def _error(above: np.ndarray, below: np.ndarray) -> float:
    return float(np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)))
