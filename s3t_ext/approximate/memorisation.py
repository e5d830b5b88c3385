"""How much of a record a model holds by heart, by proxies; and RUM, which unlearns the least memorised first."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.approximate.work import Batch, Records, Work, answers, join

LEARNING = ("confidence", "max-confidence", "entropy", "binary-accuracy")
PROXIES = (*LEARNING, "holdout-retraining", "loss-curvature")
EXAMPLE: tuple[
    Mapping[str, Any], ...
] = (  # of RUM with NegGrad+, as the authors' code gives it for low, medium and high memorisation
    {"alpha": 0.99, "epochs": 5, "learning_rate": 0.01},
    {"alpha": 0.97, "epochs": 5, "learning_rate": 0.01},
    {"alpha": 0.97, "epochs": 10, "learning_rate": 0.001},
)


def rum(
    work: Work,
    *,
    proxy: str = "confidence",
    checkpoints: Sequence[nn.Module] = (),
    methods: Sequence[str] = ("neggrad-plus",) * 3,
    settings: Sequence[Mapping[str, Any]] = EXAMPLE,
) -> None:
    """Unlearn the forgotten in equal parts, from the least memorised to the most, each part by a method of its own.

    Args:
        proxy: of ``PROXIES``; ``checkpoints``: see ``memorisation``.
        methods: a method for each part; ``settings``: theirs, as many; the default is the authors' example.

    Notes:
        "What makes unlearning hard and what to do about it" (NeurIPS 2024; arXiv 2406.01257), with proxies
        for memorisation (arXiv 2410.16516). A part counts as retained until its turn, as in the authors' code.
    """
    if not methods or len(methods) != len(settings):
        raise ValueError(f"settings: expected those of each of {len(methods)} methods, got {len(settings)}")
    from s3t_ext.approximate.methods import check_inside, run_inside  # the table names this file

    for method, own in zip(methods, settings):
        check_inside(work, method, own)
    scores = memorisation(work, work.forget, proxy, checkpoints)
    parts = scores.argsort(stable=True).tensor_split(len(methods))
    for number, (rows, method, own) in enumerate(zip(parts, methods, settings)):
        if len(rows):
            work.note(part=number + 1, records=len(rows), memorisation=float(scores[rows].mean()))
            kept = join([work.retain, *(work.forget[later] for later in parts[number + 1 :])])
            run_inside(work.on(forget=work.forget[rows], retain=kept), method, **own)


def memorisation(work: Work, records: Records, proxy: str, checkpoints: Sequence[nn.Module] = ()) -> Tensor:
    """Score records (n,) by a proxy; of each the greater the score, the more a record is memorised.

    Args:
        proxy: ``confidence``, ``max-confidence``, ``entropy`` or ``binary-accuracy``: minus the mean over checkpoints
            of p_y, max p, sum p log p, or [argmax p = y]: what is learnt late is learnt by heart;
            ``holdout-retraining``: the symmetric KL divergence to a copy that was trained on with ``work.val``;
            ``loss-curvature``: of the loss around the record, mean over checkpoints.
        checkpoints: the model after each epoch of its training, as published; none: the model as it is now, where
            what was memorised well looks like what was easy: a weaker proxy.

    Notes:
        arXiv 2410.16516; true memorisation is P[f(x) = y] trained with a record less that without it. Of
        texts the mean over counted tokens. They may choose what to look at, never slices.
    """
    if proxy not in PROXIES:
        raise ValueError(f"proxy: expected one of {PROXIES}, got {proxy!r}")
    if work.task == "regression" and proxy != "loss-curvature":
        raise ValueError(f"proxy: expected 'loss-curvature' for a regression, got {proxy!r}")
    if proxy == "holdout-retraining":
        return holdout_retraining(work, records)
    of = _curvature if proxy == "loss-curvature" else _learning
    found = [
        torch.cat([of(work.on(model=model), part, proxy) for part in work.batches(records, 256, shuffle=False)])
        for model in checkpoints or [work.model]
    ]
    return torch.stack(found).mean(0)


def learning_event(proxy: str, p: Tensor, labels: Tensor) -> Tensor:
    """Give p_y, max p, sum p log p or [argmax p = y] of each of (k, C) probabilities: the less, the more memorised."""
    if proxy == "confidence":
        return p.gather(-1, labels[:, None])[:, 0]
    if proxy == "max-confidence":
        return p.amax(-1)
    if proxy == "entropy":
        return torch.xlogy(p, p).sum(-1)
    return (p.argmax(-1) == labels).to(p.dtype)


@torch.no_grad()
def _learning(work: Work, batch: Batch, proxy: str) -> Tensor:
    inputs, labels = batch
    assert labels is not None
    return -answers(work.task, work.outputs(inputs), labels, lambda x, y: learning_event(proxy, x.softmax(-1), y))


def holdout_retraining(
    work: Work, records: Records, *, epochs: int = 10, batch: int = 32, learning_rate: float = 0.01
) -> Tensor:
    """Give each record's ``(KL(p | q) + KL(q | p)) / 2``, p of the model, q of a copy trained on with ``work.val``.

    Args:
        learning_rate: of SGD with momentum 0.9, as in the authors' code; its epochs and rate are not published.
    """
    if work.val is None or not len(work.val) or work.val.task != work.task:
        got = "none" if work.val is None or not len(work.val) else f"labels of {work.val.task}"
        raise ValueError(
            "val: the proxy 'holdout-retraining' needs records that the model was not trained on, with labels of "
            f"{work.task}, got {got}"
        )
    other = work.on(model=copy.deepcopy(work.model))
    optimizer = torch.optim.SGD(other.weights().values(), learning_rate, 0.9)
    for _ in range(epochs):
        for part in other.batches(work.val, batch):
            other.step(optimizer, other.losses(part).mean())
    found = []
    with torch.no_grad():
        for inputs, labels in work.batches(records, 256, shuffle=False):
            assert labels is not None
            both = torch.stack([work.outputs(inputs), other.outputs(inputs)], -1).log_softmax(-2)  # (..., C, 2)
            found.append(answers(work.task, both, labels, _divergence))
    return torch.cat(found)


def _divergence(both: Tensor, _: Tensor) -> Tensor:
    p, q = both.unbind(-1)  # (k, C) log probabilities
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2


def _curvature(work: Work, batch: Batch, _: str, draws: int = 10, h: float = 1e-3) -> Tensor:
    """Estimate ``tr H^2 = E |H v|^2``, H the Hessian of each record's loss by its input, v of random signs.

    Notes:
        "Memorization Through the Lens of Curvature of Loss Function Around Samples" (ICML 2024): 10 draws, h = 1e-3.
    """
    inputs, labels = batch
    if not inputs.is_floating_point():
        raise ValueError("proxy: 'loss-curvature' needs inputs of numbers, got token ids; take one of the others")

    def gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(work.losses((x, labels)).sum(), x)[0].flatten(1)  # (n, F)

    with torch.enable_grad():
        start = gradient(inputs.clone())
        total = start.new_zeros(len(inputs))
        for _draw in range(draws):
            sign = torch.randint(2, inputs.shape, generator=work.generator).to(inputs) * 2 - 1
            total += ((gradient(inputs + h * sign) - start) / h).square().sum(1) / draws
    return total
