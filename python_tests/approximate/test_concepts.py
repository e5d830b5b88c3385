"""Concept inference and poisoning: concepts, places and attributions where the answer is known; a class that goes."""

from __future__ import annotations

import pytest
import torch
from small import Net, blobs, trained
from torch import Tensor, nn

from s3t_ext.approximate import Records, unlearn
from s3t_ext.approximate.concepts import Concepts, integrated_gradients, places, sparse_head
from s3t_ext.approximate.work import Work, utility


class Corners(nn.Module):
    """See an image (1, 4, 4) as the mean of each of its corners, and each corner as a class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.head.weight)

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Words(nn.Module):
    """Sum what each token says, linearly."""

    def __init__(self, tokens: int = 20, classes: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tokens, 8), nn.Linear(8, classes)

    def features(self, x: Tensor) -> Tensor:
        return (self.embed(x.clamp(min=0)) * (x >= 0)[..., None]).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def spied_on(monkeypatch, seen: list[Records]) -> None:
    """Keep the records that are trained on at the end."""
    descend = Work.descend

    def spy(work: Work, optimizer: torch.optim.Optimizer, records: Records, *rest) -> None:
        seen.append(records)
        descend(work, optimizer, records, *rest)

    monkeypatch.setattr(Work, "descend", spy)


def corners(count: int) -> Records:
    """Draw images bright in one corner, which is their class."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    x = 0.1 * torch.rand(count, 1, 4, 4, generator=chance)
    for corner in range(4):
        top, left = 2 * (corner // 2), 2 * (corner % 2)
        x[labels == corner, :, top : top + 2, left : left + 2] += 1
    return Records(x, labels)


@pytest.mark.parametrize("bank", ["means", "cavs"])
def test_each_class_is_its_own_concept_where_classes_are_axes(bank) -> None:
    data = corners(80)
    seen = Corners().features(data.inputs)
    found = Concepts((seen, data.labels), bank, 1)
    if bank == "means":
        torch.testing.assert_close(found.directions[3], seen[data.labels == 3].mean(0) - seen.mean(0))
    assert found.chosen[:, 0].tolist() == [0, 1, 2, 3]
    own, e = found.directions, torch.eye(4) - 0.25
    assert torch.cosine_similarity(own, e, dim=1).min() > 0.99  # a corner against the other three
    torch.testing.assert_close(found.scores(found.mean + own).diagonal(), torch.ones(4))  # <c, c> / |c|^2
    assert (
        found.presence(Corners().features(data.inputs[data.labels == 2]), 2).min()
        > found.presence(Corners().features(data.inputs[data.labels != 2]), 2).max()
    )


def test_a_sparse_head_drops_what_tells_nothing_and_all_where_it_costs_too_much() -> None:
    chance = torch.Generator().manual_seed(0)
    which = torch.arange(200) % 2
    scores = torch.stack([2.0 * which - 1, torch.randn(200, generator=chance)], 1)
    found = sparse_head(scores, which, 0.05)
    assert found[0, 0] < -0.5 < 0.5 < found[1, 0]
    assert torch.equal(found[:, 1], torch.zeros(2))
    # at the minimum the slope of the cross entropy is the penalty's
    slope = ((scores @ found.t()).softmax(1) - nn.functional.one_hot(which)).t() @ scores / 200
    assert slope[:, 0].tolist() == pytest.approx([0.05, -0.05], abs=1e-4)
    assert torch.equal(sparse_head(scores, which, 0.6), torch.zeros(2, 2))


def test_places_cover_an_image_by_half_steps() -> None:
    found = places((3, 4, 4), 0.5)
    assert found.shape == (9, 4, 4)
    assert torch.equal(found.sum((1, 2)), torch.full((9,), 4))
    assert len({tuple(each.flatten().tolist()) for each in found}) == 9
    assert torch.equal(places((4,), 0.25), torch.eye(4, dtype=torch.bool))


def test_the_patch_hides_the_concept_of_the_class(monkeypatch) -> None:
    data, seen = corners(80), []
    gone, kept = data[data.labels == 1], data[data.labels != 1]
    spied_on(monkeypatch, seen)
    model = Corners()
    with torch.no_grad():
        model.head.weight[3, 1] = 0.5  # to the model, corner 1 looks a little like class 3
    found = unlearn("concept-poisoning", model, gone, kept, seed=0, side=0.5, top=1, epochs=1)
    poisoned = seen[0][torch.arange(20)]
    assert poisoned.labels.tolist() == [3] * 20
    assert poisoned.inputs[:, :, :2, 2:].max() < 0.2  # what was bright
    rest = torch.ones(4, 4, dtype=torch.bool)
    rest[:2, 2:] = False
    assert torch.equal(poisoned.inputs[..., rest], gone.inputs[..., rest])
    assert torch.equal(seen[0].inputs[20:], kept.inputs)
    assert found.trace[0] == {"forgotten": 1, "donor": 3, "concepts": [1]}


def work_on(model: nn.Module) -> Work:
    none = Records(torch.zeros(0, 5))
    return Work(model, none, none, "classification", torch.Generator())


def test_attributions_of_a_linear_model_are_each_tokens_own() -> None:
    torch.manual_seed(0)
    model, tokens = Words(classes=2), torch.randint(20, (5,))
    with torch.no_grad():
        own = model.embed(tokens) @ (model.head.weight[1] - model.head.weight[0])
    torch.testing.assert_close(integrated_gradients(work_on(model), tokens, 1), own)
    assert not model.embed._forward_hooks
    assert integrated_gradients(work_on(model.bfloat16()), tokens, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("flat", [False, True])
def test_attributions_of_any_model_sum_to_what_the_text_adds(flat) -> None:
    torch.manual_seed(0)
    tokens, above = torch.randint(20, (5,)), nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3))

    class Curved(Words):
        def forward(self, x: Tensor) -> Tensor:
            return above(self.embed(x.flatten() if flat else x).view(len(x), -1))  # flat: all texts as one

    model = Curved()
    with torch.no_grad():
        odds = [out[0, 1] - out[0, [0, 2]].logsumexp(0) for out in (model(tokens[None]), above(torch.zeros(1, 40)))]
        gap = odds[0] - odds[1]
    share = integrated_gradients(work_on(model), tokens, 1, 200)
    assert share.sum().item() == pytest.approx(gap.item(), abs=1e-3)
    assert share.abs().max() > 0.01
    with pytest.raises(ValueError, match="model: texts need an embedding layer"):
        integrated_gradients(work_on(nn.Linear(5, 3)), tokens, 1)


def words(count: int) -> Records:
    """Draw texts of chance tokens, 3 to 19, with one of tokens 0 to 2 somewhere: the class; padded by two."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    tokens = torch.randint(4, 20, (count, 6), generator=chance)
    tokens[torch.arange(count), torch.randint(6, (count,), generator=chance)] = labels
    return Records(torch.nn.functional.pad(tokens, (0, 2), value=-1), labels)


def test_a_class_of_texts_goes_by_its_word(monkeypatch) -> None:
    data, seen = words(150), []
    gone, kept = data[data.labels == 0], data[data.labels != 0]
    model = trained(data, Words())
    spied_on(monkeypatch, seen)
    found = unlearn("concept-poisoning", model, gone, kept, seed=0, mask=3, top=1, learning_rate=0.05).model
    poisoned = seen[0].inputs[: len(gone)]
    assert torch.equal(poisoned == 3, gone.inputs == 0)  # the word is masked, and it alone
    assert torch.equal(poisoned[gone.inputs != 0], gone.inputs[gone.inputs != 0])
    assert utility(found, kept) > 0.95
    with pytest.raises(ValueError, match="mask: texts need the id of a token"):
        unlearn("concept-poisoning", model, gone, kept, seed=0)


@pytest.mark.parametrize("labels", ["donor", "random"])
def test_no_record_keeps_its_label_where_its_class_stays(labels, monkeypatch) -> None:
    data, seen = blobs(100), []
    spied_on(monkeypatch, seen)
    gone, kept = data[torch.arange(30)], data[torch.arange(30, 100)]
    unlearn("concept-poisoning", trained(data, steps=50), gone, kept, seed=0, labels=labels, epochs=1)
    assert (seen[0].labels[:30] != gone.labels).all()
    assert torch.equal(seen[0].labels[30:], kept.labels)


@pytest.mark.parametrize("labels", ["donor", "random"])
def test_a_class_goes_and_the_others_stay(labels) -> None:
    data = blobs(200)
    gone, kept = data[data.labels == 0], data[data.labels != 0]
    model = trained(data)
    found = unlearn("concept-poisoning", model, gone, kept, seed=0, labels=labels, learning_rate=0.02)
    assert utility(model, gone) > 0.99
    assert utility(found.model, gone) < 0.1
    assert utility(found.model, kept) > 0.95


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bank": "clip"}, "bank: expected 'cavs' or 'means', got 'clip'"),
        ({"labels": "true"}, "labels: expected 'donor' or 'random', got 'true'"),
        ({"retain": Records(torch.zeros(1, 4), torch.tensor([0]))}, "retain: expected records of other classes than 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    gone = Records(torch.ones(3, 4), torch.tensor([0, 0, 0]), ("a", "b", "c"))
    given = {"retain": Records(torch.ones(2, 4), torch.tensor([1, 2]), ("d", "e")), "seed": 0} | change
    with pytest.raises(ValueError, match=says):
        unlearn("concept-poisoning", Net(4, 5, 3), gone, given.pop("retain"), **given)
