"""Unlearning of a regression: Blindspot and Gaussian fine-tuning, and what is measured of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3t_ext.approximate.work import Batch, Records, Work, join


def blindspot(
    work: Work,
    *,
    beta: float = 50.0,
    blind_epochs: int = 2,
    blind_learning_rate: float = 0.01,
    epochs: int = 1,
    batch: int = 256,
    learning_rate: float = 1e-3,
) -> None:
    """Imitate, on forgotten records, a model that saw only a little, and only of the others.

    The blind model b is the initial one after ``blind_epochs`` on the retained records. Then, over all records, with
    u the share of forgotten ones in a batch and att as in ``attention``, descend by Adam
    ``u (mean |f(x_f) - b(x_f)| + beta sum_layers mean (att(f) - att(b))^2) + (1 - u) mean |f(x_r) - y_r|``.

    Args:
        beta: weight of the attention maps, in units of the target: 50 for ages of 1 to 101 years.
        blind_epochs, blind_learning_rate: of b, by Adam on the absolute error.
        epochs, batch, learning_rate: as in the authors' code, like all defaults here.

    Notes:
        Blindspot unlearning of "Deep regression unlearning" (ICML 2023, arXiv 2210.08196), algorithm 1. Means over
        records and places are those of the code. Maps are taken behind the model's numbered blocks, else behind
        each layer that has weights.
    """
    assert work.initial is not None
    blind = copy.deepcopy(work.model)
    blind.load_state_dict(work.initial.state_dict())
    exposed = work.on(model=blind)
    optimizer = torch.optim.Adam(exposed.weights().values(), blind_learning_rate)
    exposed.descend(optimizer, work.retain, lambda kept: _error(exposed, kept), blind_epochs, batch, model="blind")

    def loss(part: Batch) -> Tensor:
        inputs, flagged = part
        assert flagged is not None
        gone, kept = flagged[:, -1] == 1, flagged[:, -1] == 0
        share, total = gone.float().mean(), torch.zeros(())
        if gone.any():
            with watched(work.model) as seen:
                outputs = work.outputs(inputs[gone])
            with torch.no_grad(), watched(blind) as wanted:
                target = exposed.outputs(inputs[gone])
            maps = sum((attention(a) - attention(b)).square().mean() for a, b in zip(seen, wanted, strict=True))
            total = share * ((outputs - target).abs().mean() + beta * maps)
        if kept.any():
            total = total + (1 - share) * _error(work, (inputs[kept], flagged[kept, :-1]))
        return total

    everything = join([_flagged(work.forget, 1), _flagged(work.retain, 0)])
    optimizer = torch.optim.Adam(work.weights().values(), learning_rate)
    work.descend(optimizer, everything, loss, epochs, batch, model="unlearned")


def gaussian(work: Work, *, epochs: int = 1, batch: int = 256, learning_rate: float = 1e-3) -> None:
    """Replace each forgotten label by a draw from ``N(mean y, sd y)``, y all labels, and train on with all records.

    Args:
        epochs, batch, learning_rate: of Adam on the absolute error, as in the authors' code.

    Notes:
        Gaussian fine-tuning, in the code Gaussian amnesiac, of "Deep regression unlearning" (ICML 2023), algorithm 2.
    """
    everything = join([work.forget, work.retain]).labels
    assert everything is not None
    false = Records(work.forget.inputs, redrawn(everything, len(work.forget), work.generator))
    optimizer = torch.optim.Adam(work.weights().values(), learning_rate)
    records = join([false, Records(work.retain.inputs, work.retain.labels)])
    work.descend(optimizer, records, lambda part: _error(work, part), epochs, batch)


def redrawn(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw labels (count, C), each target from the normal distribution with mean and deviation of labels (n, C)."""
    noise = torch.randn(count, labels.shape[1], generator=generator).to(labels)
    return labels.mean(0) + labels.std(0) * noise


# --- attention maps --------------------------------------------------------------------------------------------------


def attention(activations: Tensor) -> Tensor:
    """Map activations to where they are strong: mean squares over channels, of Euclidean length 1.

    Args:
        activations: (n, channels, *places), (n, places, channels) of a sequence, or (n, units): each a place.

    Returns:
        (n, places).
    """
    squares = activations.square()
    if squares.ndim > 2:
        squares = squares.mean(2 if squares.ndim == 3 else 1)
    return F.normalize(squares.flatten(1))


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, inside the ``with`` block, what comes out of each numbered block, or of each layer with weights."""
    found: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    handles = [layer.register_forward_hook(keep) for layer in (lists[0] if lists else leaves)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# --- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def absolute_error(model: nn.Module, records: Records) -> float:
    """Give the mean absolute error, in units of the target."""
    assert records.labels is not None
    return float((model(records.inputs) - records.labels).abs().mean())


@torch.no_grad()
def prediction_distance(model: nn.Module, oracle: nn.Module, records: Records) -> float:
    """Give the 1-d Wasserstein distance between two models' predictions of the same records, mean over targets."""
    mine, theirs = (each(records.inputs).sort(0).values for each in (model, oracle))  # (n, C)
    return float((mine - theirs).abs().mean())


def relearn_steps(
    model: nn.Module,
    training: Records,
    forget: Records,
    error: float,
    *,
    seed: int,
    batch: int = 256,
    learning_rate: float = 0.01,
    limit: int = 1000,
) -> int:
    """Count the steps on all training records after which forgotten ones are predicted as well as before.

    Args:
        error: the absolute error on ``forget`` to come down to: 1.05 times the original model's.
        limit: of steps; it is the answer where they do not suffice.

    Notes:
        By Adam on the absolute error, on a copy. The anamnesis index is the ratio of this count to a retrained
        model's: near 1 is good, near 0 says that the records were still there.
    """
    work = Work(copy.deepcopy(model), forget, training, "regression", torch.Generator().manual_seed(seed))
    optimizer, steps = torch.optim.Adam(work.weights().values(), learning_rate), 0
    while True:
        for part in work.batches(training, batch):
            work.step(optimizer, _error(work, part))
            steps += 1
            if steps == limit or absolute_error(work.model, forget) <= error:
                return steps


def _error(work: Work, part: Batch) -> Tensor:
    inputs, labels = part
    assert labels is not None
    return (work.outputs(inputs) - labels).abs().mean()


def _flagged(records: Records, flag: int) -> Records:
    """Write into a last column of the labels who is forgotten, so that batches tell."""
    assert records.labels is not None
    return Records(records.inputs, F.pad(records.labels, (0, 1), value=flag))
