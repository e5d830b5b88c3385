"""Proxies of memorisation by closed forms and on wrong labels, which can be learnt by heart alone; and RUM's order."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small import Net, blobs, line
from torch import Tensor, nn

from s3t_ext.approximate import METHODS, Method, Records, unlearn
from s3t_ext.approximate.memorisation import PROXIES, memorisation
from s3t_ext.approximate.work import Work, join, losses

CLEAN, HELD = blobs(150, seed=1), blobs(100, seed=2)
WRONG = Records(CLEAN.inputs[:15], (CLEAN.labels[:15] + 1) % 3)  # all of them members, a tenth mislabelled
TABLE = join([WRONG, CLEAN[torch.arange(15, 150)]])


def work(model: nn.Module, records: Records, val: Records | None = None) -> Work:
    return Work(model, records, records, str(records.task), torch.Generator().manual_seed(0), val)


def said(*p: float) -> nn.Linear:
    """Answer with these probabilities, whatever is asked."""
    model = nn.Linear(1, len(p))
    nn.init.zeros_(model.weight)
    model.bias.data.copy_(torch.tensor(p).log())
    return model


@pytest.fixture(scope="module")
def epochs() -> list[nn.Module]:
    """The model after each of twenty epochs; in the last it holds all of the table."""
    torch.manual_seed(0)
    model, kept = Net(4, 64, 3), []
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(400):
        optimizer.zero_grad()
        losses("classification", model(TABLE.inputs), TABLE.labels).mean().backward()
        optimizer.step()
        if step % 20 == 19:
            kept.append(copy.deepcopy(model))
    return kept


@pytest.mark.parametrize(
    ("proxy", "falls"),
    [
        ("confidence", 0.2),
        ("max-confidence", 0.7),
        ("entropy", 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)),
        ("binary-accuracy", 0.0),
    ],
)
def test_learning_events_have_the_other_sign_and_are_means_over_epochs(proxy, falls) -> None:
    one = Records(torch.zeros(2, 1), torch.tensor([1, 1]))
    model = said(0.7, 0.2, 0.1)
    assert memorisation(work(model, one), one, proxy).tolist() == pytest.approx([-falls] * 2, abs=1e-6)
    sure = said(1e-30, 1.0, 1e-30)
    best = 0.0 if proxy == "entropy" else 1.0
    both = memorisation(work(model, one), one, proxy, [model, sure])
    assert both.tolist() == pytest.approx([-(falls + best) / 2] * 2, abs=1e-6)


def test_confidence_of_a_text_is_the_mean_over_counted_tokens() -> None:
    turn = nn.Embedding.from_pretrained(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    text = Records(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[-100, 1, 0, -100]]))
    assert memorisation(work(turn, text), text, "confidence").item() == pytest.approx(-(0.75 + 0.5) / 2)


def test_curvature_of_a_quadratic() -> None:
    """l = (a x - y)^2: the Hessian is 2 a^2, and its square's trace 4 a^4."""
    model = nn.Linear(2, 1)
    model.weight.data.copy_(torch.tensor([[1.5, 0.0]]))
    found = memorisation(work(model, line(5, 2)), line(5, 2), "loss-curvature")
    assert found.tolist() == pytest.approx([4 * 1.5**4] * 5, rel=1e-2)
    double = Records(line(5, 2).inputs.double(), line(5, 2).labels.double())
    assert memorisation(work(model.double(), double), double, "loss-curvature").dtype == torch.float64


def test_holdout_retraining_is_the_symmetric_divergence_to_a_model_that_went_on() -> None:
    """Of two classes: a held-out record moves p = (0.5, 0.5) to q; 10 epochs of one batch, by hand."""
    model, one = said(0.5, 0.5), Records(torch.zeros(1, 1), torch.tensor([0]))
    model.weight.requires_grad_(False)
    given = work(model, one, val=one)
    b, speed = 0.0, 0.0
    for _ in range(10):  # the logits move apart: +b, -b
        speed = 0.9 * speed - (1 / (1 + math.exp(-2 * b)) - 1)
        b += 0.01 * speed
    q = 1 / (1 + math.exp(-2 * b))
    wanted = ((0.5 - q) * math.log(0.5 / q) + (0.5 - (1 - q)) * math.log(0.5 / (1 - q))) / 2
    assert memorisation(given, one, "holdout-retraining").item() == pytest.approx(wanted, rel=1e-4)
    assert model.bias.unique().numel() == 1, "a copy was trained"


@pytest.mark.parametrize("proxy", PROXIES)
def test_what_only_memory_explains_scores_highest(proxy, epochs) -> None:
    found = memorisation(work(epochs[-1], TABLE, HELD), TABLE, proxy, epochs)
    above = (found[:15, None] > found[15:]).float() + 0.5 * (found[:15, None] == found[15:])
    assert above.mean() > 0.85, "the area under the curve that tells wrong labels from the rest"


def keys(records: Records) -> list[Any]:
    return [tuple(row) for row in records.inputs.tolist()]


def test_rum_takes_the_least_memorised_first_and_keeps_the_rest_till_their_turn(monkeypatch, epochs) -> None:
    seen: list[tuple[list[Any], list[Any], float]] = []

    def spy(work: Work, *, mark: float) -> None:
        seen.append((keys(work.forget), keys(work.retain), mark))

    monkeypatch.setitem(METHODS, "spy", Method(spy))
    gone, kept = TABLE[torch.arange(5, 35)], join([TABLE[torch.arange(5)], TABLE[torch.arange(35, 150)]])
    settings = {"methods": ["spy"] * 3, "settings": [{"mark": m} for m in (0.1, 0.2, 0.3)], "checkpoints": epochs}
    trace = unlearn("rum", epochs[-1], gone, kept, seed=0, **settings).trace
    scores = memorisation(work(epochs[-1], gone), gone, "confidence", epochs)
    order = [keys(gone)[i] for i in scores.argsort(stable=True).tolist()]
    assert [forget for forget, _, _ in seen] == [order[:10], order[10:20], order[20:]]
    assert [sorted(retain) for _, retain, _ in seen] == [sorted(keys(kept) + order[at:]) for at in (10, 20, 30)]
    assert [mark for *_, mark in seen] == [0.1, 0.2, 0.3]
    assert len(set(order[20:]) & set(keys(WRONG))) >= 8, "of the ten mislabelled"
    told = [note["memorisation"] for note in trace]
    assert told == sorted(told)
    few = unlearn("rum", epochs[-1], gone[torch.arange(2)], kept, seed=0, **settings)
    assert [note["records"] for note in few.trace] == [1, 1]


def test_what_does_not_fit_is_refused(epochs) -> None:
    gone, kept = TABLE[torch.arange(9)], TABLE[torch.arange(9, 150)]
    for settings, says in (
        ({"proxy": "magic"}, "proxy: expected one of .*'holdout-retraining'.*, got 'magic'"),
        ({"proxy": "holdout-retraining"}, "val: the proxy 'holdout-retraining' needs records"),
        ({"methods": ["fine-tune"]}, "settings: expected those of each of 1 methods, got 3"),
        ({"methods": ["iau"] * 3}, "alpha: no setting of iau"),
    ):
        with pytest.raises(ValueError, match=says):
            unlearn("rum", epochs[-1], gone, kept, seed=0, **settings)
    for val, got in (
        (Records(HELD.inputs), "labels of None"),
        (line(9, 4), "labels of regression"),
        (HELD[torch.arange(0)], "none"),
    ):
        says = f"trained on, with labels of classification, got {got}"
        with pytest.raises(ValueError, match=says):
            unlearn("rum", epochs[-1], gone, kept, val=val, seed=0, proxy="holdout-retraining")
    with pytest.raises(ValueError, match="rum is for classification and causal, not regression"):
        unlearn("rum", nn.Linear(3, 1), line(4), line(9, seed=1), seed=0)
    with pytest.raises(ValueError, match="expected 'loss-curvature' for a regression, got 'entropy'"):
        memorisation(work(nn.Linear(3, 1), line(4)), line(4), "entropy")
    text = Records(torch.tensor([[0, 1]]), torch.tensor([[-100, 1]]))
    with pytest.raises(ValueError, match="'loss-curvature' needs inputs of numbers, got token ids"):
        memorisation(work(nn.Embedding(2, 2), text), text, "loss-curvature")


def test_an_untouched_model_and_no_gradients_left(epochs) -> None:
    before: list[Tensor] = [p.clone() for p in epochs[-1].parameters()]
    for proxy in PROXIES:
        memorisation(work(epochs[-1], TABLE, HELD), TABLE, proxy)
    assert all(torch.equal(x, y) for x, y in zip(before, epochs[-1].parameters()))
    assert not TABLE.inputs.requires_grad
