"""Class removal by concept inference and data poisoning: false labels where the concepts of a class sit."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.approximate.work import Records, Work, join

TINY = 1e-12  # what nothing is divided by less than


def concept_poisoning(
    work: Work,
    *,
    bank: str = "cavs",
    top: int = 3,
    labels: str = "donor",
    side: float = 2 / 7,
    mask: int | None = None,
    epochs: int = 20,
    batch: int = 32,
    learning_rate: float = 1e-3,
) -> None:
    """Poison forgotten records where the concepts of their class sit, label them falsely, and train on with all.

    What is hidden of an image is the patch whose exchange for a donor's lowers the class's ``Concepts.presence``
    most; of a text the ``top`` tokens by ``integrated_gradients`` of the class's log odds, behind a mask. The donor's
    class is the one, beside the true one, that the model finds likeliest for the class's records.

    Args:
        bank: of concepts, see ``Concepts``; ``top``: how many make a class: 3 to 5, with 10 forgetting fails.
        labels: ``donor``, in the paper targeted, or ``random``, of the other classes.
        side: of a patch, as a share of an image's; of records without places a run of so many of their numbers.
        mask: id of the token that hides others; texts need it.
        epochs: 20; in the authors' code 30 for CIFAR-100.
        batch, learning_rate: of SGD with momentum 0.9. The code trains the last layer alone, this all that may change.

    Notes:
        "Class machine unlearning for complex data via concepts inference and data poisoning" (arXiv 2405.15662). Its
        concepts are words as CLIP embeds them, and CLIP finds their patches; here both are the model's own. By its
        release false labels forget without any patch, and patches under true labels do not.
    """
    if bank not in ("cavs", "means"):
        raise ValueError(f"bank: expected 'cavs' or 'means', got {bank!r}")
    if labels not in ("donor", "random"):
        raise ValueError(f"labels: expected 'donor' or 'random', got {labels!r}")
    if not 0 < side <= 1:
        raise ValueError(f"side: expected a share above 0 and at most 1, got {side}")
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    texts = not work.forget.inputs.is_floating_point()
    if texts and mask is None:
        raise ValueError("mask: texts need the id of a token that hides others, got None")
    gone, kept = (Records(records.inputs, records.labels) for records in (work.forget, work.retain))
    assert gone.labels is not None
    assert kept.labels is not None
    for label in gone.labels.unique().tolist():
        if not (kept.labels != label).any():
            raise ValueError(f"retain: expected records of other classes than {label}, got none")
    concepts = None if texts else Concepts(_represented(work, join([gone, kept]), batch), bank, top)
    logits = torch.cat([work.outputs(x).detach() for x, _ in work.batches(gone, batch, shuffle=False)])  # (n, C)
    inputs, false = gone.inputs.clone(), gone.labels.clone()
    for label in gone.labels.unique().tolist():
        rows, others = (gone.labels == label).nonzero()[:, 0], kept.labels[kept.labels != label].unique()
        donor = others[logits[rows].mean(0)[others].argmax()]
        drawn = others[torch.randint(len(others), (len(rows),), generator=work.generator)]
        false[rows] = donor if labels == "donor" else drawn
        if concepts is None:
            inputs[rows] = _hidden(work, inputs[rows], label, top, mask or 0)
        else:
            donors = (kept.labels == donor).nonzero()[:, 0]
            donors = donors[torch.randint(len(donors), (len(rows),), generator=work.generator)]
            inputs[rows] = _patched(work, concepts, label, inputs[rows], kept.inputs[donors], side)
        work.note(forgotten=label, donor=int(donor), concepts=concepts.named(label) if concepts else [])
    optimizer = torch.optim.SGD(work.weights().values(), learning_rate, momentum=0.9)
    poisoned = join([Records(inputs, false), kept])
    work.descend(optimizer, poisoned, lambda part: work.losses(part).mean(), epochs, batch)


class Concepts:
    """Directions of representations, one found for each class, and a sparse head that tells classes by them.

    The score of concept c is ``s = <e - mean e, c> / |c|^2``; the head's weights w (classes, concepts) minimise mean
    cross entropy of ``w s / sd s`` plus ``strength |w|_1``. A class's top concepts are those of largest mean ``w s``.

    Args:
        represented: representations (n, F) and their labels (n,).
        bank: ``means`` of classes, or ``cavs``, normals of planes between each class and all others, by ridge
            regression where the field uses a support vector machine.
        top: number of concepts that make a class.
    """

    def __init__(self, represented: tuple[Tensor, Tensor], bank: str, top: int, strength: float = 1e-3) -> None:
        e, labels = represented
        self.classes, which = labels.unique(return_inverse=True)  # (k,), (n,)
        member = F.one_hot(which, len(self.classes)).to(e)  # (n, k)
        self.mean = e.mean(0)
        e = e - self.mean
        if bank == "means":
            self.directions = (e.t() @ member / member.sum(0)).t()  # (k, F)
        else:
            products = e.t() @ e  # (F, F)
            ridge = (1e-3 * products.diagonal().mean() + TINY) * torch.eye(len(products)).to(e)
            self.directions = torch.linalg.solve(products + ridge, e.t() @ (member - member.mean(0))).t()  # (k, F)
        scores = self.scores(e + self.mean)
        spread = scores.std(0).clamp(min=TINY)
        self.weights = sparse_head(scores / spread, which, strength) / spread  # (k, k)
        share = torch.stack([(self.weights[i] * scores[which == i]).mean(0) for i in range(len(self.classes))])
        self.chosen = share.topk(min(top, len(self.classes)), 1).indices  # (k, top)

    def scores(self, e: Tensor) -> Tensor:
        """Say how much of each concept is in representations: (n, k)."""
        return (e - self.mean) @ self.directions.t() / self.directions.square().sum(1).clamp(min=TINY)

    def presence(self, e: Tensor, label: int) -> Tensor:
        """Sum ``w s`` over the top concepts of a class: (n,)."""
        row = int((self.classes == label).nonzero())
        return self.scores(e)[:, self.chosen[row]] @ self.weights[row, self.chosen[row]]

    def named(self, label: int) -> list[int]:
        """Name a class's top concepts by the classes they were found for."""
        return self.classes[self.chosen[int((self.classes == label).nonzero())]].tolist()


def sparse_head(scores: Tensor, which: Tensor, strength: float, steps: int = 300) -> Tensor:
    """Minimise ``mean cross entropy(w s, class) + strength |w|_1`` over w (classes, concepts) by proximal gradients."""
    member = F.one_hot(which).to(scores)
    rate = 2 * len(scores) / torch.linalg.matrix_norm(scores, 2).square()  # 1 / the gradient's Lipschitz constant
    weights = scores.new_zeros(member.shape[1], scores.shape[1])
    for _ in range(steps):
        slope = ((scores @ weights.t()).softmax(1) - member).t() @ scores / len(scores)
        weights = F.softshrink(weights - rate * slope, float(rate * strength))
    return weights


def places(shape: tuple[int, ...], side: float) -> Tensor:
    """List patches of inputs (channels, high, wide), or runs of inputs (F,), half a side apart: (P, ...) bool."""
    area = shape[-2:]
    sides = [max(1, round(side * n)) for n in area]
    starts = [range(0, n - s + 1, max(1, s // 2)) for n, s in zip(area, sides, strict=True)]
    found = torch.zeros([len(each) for each in starts] + list(area), dtype=torch.bool)
    for where in itertools.product(*(range(len(each)) for each in starts)):
        inside = [slice(each[k], each[k] + s) for each, k, s in zip(starts, where, sides, strict=True)]
        found[where][tuple(inside)] = True
    return found.flatten(0, len(area) - 1)


def integrated_gradients(work: Work, tokens: Tensor, label: int, steps: int = 32) -> Tensor:
    """Share a class's log odds among a text's tokens: ``x . mean over a of grad f(a x)``, x embeddings, a in (0, 1).

    Args:
        tokens: (l,) ids without padding; the model's first ``nn.Embedding`` embeds them.
        steps: midpoints a, answered together.

    Returns:
        (l,); their sum comes near the log odds less those of embeddings of zeros.
    """
    layers = [m for m in work.model.modules() if isinstance(m, nn.Embedding)]
    if not layers:
        raise ValueError("model: texts need an embedding layer, nn.Embedding, got none")
    parts = (torch.arange(steps)[:, None, None] + 0.5) / steps  # (steps, 1, 1)
    seen: list[Tensor] = []

    def scale(_layer: nn.Module, _given: object, x: Tensor) -> Tensor:
        each = x.detach().view(steps, len(tokens), -1)  # also of a model that embeds all texts as one
        seen.extend((each[0], (parts.to(each) * each).requires_grad_()))
        return seen[1].view_as(x)

    handle = layers[0].register_forward_hook(scale)
    try:
        logits = work.outputs(tokens.expand(steps, -1))  # (steps, C)
    finally:
        handle.remove()
    others = logits.index_fill(1, torch.tensor(label, device=logits.device), -torch.inf)
    odds = logits[:, label] - others.logsumexp(1)  # log odds; a logit alone means nothing under a softmax
    return (seen[0] * torch.autograd.grad(odds.sum(), seen[1])[0].mean(0)).sum(-1)


def _hidden(work: Work, texts: Tensor, label: int, top: int, mask: int) -> Tensor:
    found = texts.clone()
    for row in found:
        length = int((row >= 0).sum())  # padding is below 0, at the end
        if length:
            share = integrated_gradients(work, row[:length], label)
            row[share.topk(min(top, length)).indices] = mask
    return found


@torch.no_grad()
def _patched(work: Work, concepts: Concepts, label: int, inputs: Tensor, donors: Tensor, side: float) -> Tensor:
    parts = []
    for x, donor in zip(inputs.split(256), donors.split(256), strict=True):
        best, found = x.new_full((len(x),), torch.inf), x
        for place in places(tuple(x.shape[1:]), side):
            changed = torch.where(place.to(x.device), donor, x)
            presence = concepts.presence(work.features(changed), label)
            found = torch.where((presence < best).view(-1, *[1] * (x.ndim - 1)), changed, found)
            best = torch.minimum(best, presence)
        parts.append(found)
    return torch.cat(parts)


@torch.no_grad()
def _represented(work: Work, records: Records, batch: int) -> tuple[Tensor, Tensor]:
    assert records.labels is not None
    return torch.cat([work.features(x) for x, _ in work.batches(records, batch, shuffle=False)]), records.labels
