"""What every method works on and with: records, a copy of the model, a seeded generator, the loops and the clock."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.models.heads import counted, record_losses

Batch = tuple[Tensor, Tensor | None]  # inputs (n, ...), labels


class Guarantee(str, enum.Enum):
    """What may be said of the records that were to be forgotten.

    EXACT_DEACTIVATION: nothing that learnt from them answers. EXACT_RETRAIN: the weights are those of a training that
    never met them. APPROXIMATE: a method meant to remove their influence ran to its end. NONE: it did not, or changed
    no weight.
    """

    EXACT_DEACTIVATION = "exact deactivation"
    EXACT_RETRAIN = "exact retrain"
    APPROXIMATE = "approximate"
    NONE = "none"


@dataclass(frozen=True)
class Records:
    """Records of a data set.

    Args:
        inputs: (n, ...), as the model takes them.
        labels: (n,) int64 of classes; (n, C) float of a regression; (n, l) int64 in line with token ids (n, l),
            ``models.heads.IGNORED`` where no loss is taken; None where a method needs none.
        names: one of each record, by which two sets are told apart; None: by their bytes.

    Raises:
        ValueError: not as many labels or names as inputs, or labels of another shape.
    """

    inputs: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for what, given in (("labels", self.labels), ("names", self.names)):
            if given is not None and len(given) != len(self.inputs):
                raise ValueError(f"{what}: expected {len(self.inputs)}, one for each record, got {len(given)}")
        _ = self.task

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def task(self) -> str | None:
        """``classification``, ``regression`` or ``causal``, as the labels say; None without labels."""
        if self.labels is None:
            return None
        if self.labels.is_floating_point() and self.labels.ndim == 2:
            return "regression"
        if self.labels.dtype == torch.int64 and self.labels.ndim == 1:
            return "classification"
        if self.labels.dtype == torch.int64 and self.labels.shape == self.inputs.shape:
            return "causal"
        raise ValueError(
            "labels: expected (n,) int64 of classes, (n, C) float of a regression, or int64 of the shape of token "
            f"ids, got {tuple(self.labels.shape)} {self.labels.dtype}"
        )

    def __getitem__(self, rows: Tensor) -> Records:
        """Choose records by their indices (k,) or a mask (n,)."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        labels = None if self.labels is None else self.labels[rows]
        return Records(self.inputs[rows], labels, self.names and tuple(self.names[i] for i in rows.tolist()))

    def shared(self, other: Records) -> int:
        """Count the records that are in another set, too: by name where both have names, else by every byte."""
        if self.names is not None and other.names is not None:
            return len(set(self.names) & set(other.names))
        labelled = self.labels is not None and other.labels is not None
        mine, theirs = (
            _bytes([each.inputs, each.labels] if labelled else [each.inputs])  # type: ignore[list-item]
            for each in (self, other)
        )
        return len(mine & theirs)


@dataclass(frozen=True)
class Result:
    """What a method gives back.

    Attributes:
        model: a copy that has forgotten, in eval mode; the one given is as it was.
        guarantee: see ``Guarantee``.
        cost: seconds (by the clock), steps (of an optimizer), records (passed forward, repetitions counted).
        trace: what the method noted on its way, in order.
    """

    model: nn.Module
    guarantee: Guarantee
    cost: dict[str, float]
    trace: list[dict[str, Any]]


class OutOfBudget(Exception):
    """The time that a method was given is over."""


class Diverged(ValueError):
    """The loss or the weights are no longer finite."""


@dataclass
class Work:
    """A method's material: what it may change is ``model`` alone.

    Attributes:
        model: maps inputs to logits (n, C), values (n, C), or logits of the next token (n, l, vocabulary), in eval
            mode; methods that say so need ``model.features`` (inputs to representations (n, F)) and ``model.head``.
        forget, retain, val: records; without ``retain`` an empty set.
        initial: the model as it was before it met any record, for methods that begin there; it is not changed.
        task: ``classification``, ``regression`` or ``causal``.
        generator: of all random choices.
        deadline: on the clock of ``time.perf_counter``.
    """

    model: nn.Module
    forget: Records
    retain: Records
    task: str
    generator: torch.Generator
    val: Records | None = None
    initial: nn.Module | None = None
    deadline: float = float("inf")
    cost: dict[str, float] = field(default_factory=lambda: {"steps": 0, "records": 0})
    trace: list[dict[str, Any]] = field(default_factory=list)

    def on(self, **other: Any) -> Work:
        """Give the same work with other records or another model; clock, costs and trace are shared."""
        return replace(self, **other)

    # --- weights ---

    def weights(self, scale_free: bool = False) -> dict[str, nn.Parameter]:
        """Give the weights that may change: those that require gradients.

        Args:
            scale_free: of a LoRA adapter B alone, beside weights outside adapters. B A is the same under (c B, A / c),
                so what compares or shrinks single weights must not see both; B = 0 is the base without an adapter.
        """
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: p for name, p in found.items() if not (scale_free and "lora_A" in name)}

    # --- losses ---

    def outputs(self, inputs: Tensor) -> Tensor:
        """Answer inputs; the clock is looked at and the records are counted."""
        return self._counted(self.model, inputs)

    def features(self, inputs: Tensor) -> Tensor:
        """Represent inputs (n, F), by a model that gives representations; clock and records as for ``outputs``."""
        return self._counted(self.model.features, inputs)

    def _look_at_the_clock(self) -> None:
        if time.perf_counter() > self.deadline:
            raise OutOfBudget

    def _counted(self, function: Any, inputs: Tensor) -> Tensor:
        self._look_at_the_clock()
        self.cost["records"] += len(inputs)
        return function(inputs)

    def losses(self, batch: Batch) -> Tensor:
        """Give each record's loss (n,): cross entropy, squared error, or nats a counted token."""
        inputs, labels = batch
        assert labels is not None
        return losses(self.task, self.outputs(inputs), labels)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        """Take one step down a loss, which is given back; raise Diverged where it is no longer finite."""
        self._look_at_the_clock()
        if not loss.isfinite():
            steps = self.cost["steps"]
            raise Diverged(f"the loss is no longer finite after {steps} steps: take smaller steps or fewer")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.cost["steps"] += 1
        return float(loss.detach())

    # --- loops ---

    def batches(self, records: Records, size: int, shuffle: bool = True) -> Iterator[Batch]:
        """Give all records once, in a random order or as they stand."""
        order = torch.randperm(len(records), generator=self.generator) if shuffle else torch.arange(len(records))
        for rows in order.split(size):
            part = records[rows]
            yield part.inputs, part.labels

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        records: Records,
        loss: Callable[[Batch], Tensor],
        epochs: int,
        size: int,
        **told: Any,
    ) -> None:
        """Step down a loss batch by batch, in a new order each epoch, and note its mean beside what is told."""
        for epoch in range(epochs):
            found = [self.step(optimizer, loss(part)) for part in self.batches(records, size)]
            self.note(**told, epoch=epoch, loss=sum(found) / len(found))

    def pairs(self, size: int) -> Iterator[tuple[Batch, Batch]]:
        """Give the batches of all retained records once, each beside one of the forgotten, who come round again."""
        again = self._endless(self.forget, size)
        for kept in self.batches(self.retain, size):
            yield kept, next(again)

    def _endless(self, records: Records, size: int) -> Iterator[Batch]:
        while True:
            yield from self.batches(records, size)

    def note(self, **told: Any) -> None:
        """Write down what happened."""
        self.trace.append(told)


def _bytes(parts: Sequence[Tensor]) -> set[bytes]:
    """Give the bytes of each record, whose parts are tensors (n, ...)."""
    rows = [
        part.reshape(len(part), math.prod(part.shape[1:])).contiguous().view(torch.uint8).cpu().numpy()
        for part in parts
    ]
    return {b"|".join(part[i].tobytes() for part in rows) for i in range(len(rows[0]))}


# --- shared arithmetic -----------------------------------------------------------------------------------------------


def losses(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Give each record's loss (n,): cross entropy, mean squared error over targets, or mean nats a counted token.

    Args:
        outputs: (n, C), or of the task ``causal`` (n, l, vocabulary); ``labels``: see ``Records``.
    """
    return answers(task, outputs, labels, lambda said, right: record_losses(task, said, right))


def answers(task: str, outputs: Tensor, labels: Tensor, each: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Measure each record's answer (n,), of a causal model the mean over its counted tokens.

    Args:
        outputs: (n, C, ...), or of the task ``causal`` (n, l, vocabulary, ...); ``labels``: see ``Records``.
        each: gives a number (k,) for outputs (k, C, ...) and labels (k,).
    """
    if task != "causal":
        return each(outputs, labels)
    rows, columns = counted(labels)
    found = each(outputs[rows, columns], labels[rows, columns + 1])  # (k,)
    zero = torch.zeros(len(labels), dtype=found.dtype, device=found.device)
    count = zero.index_add(0, rows, torch.ones_like(found)).clamp(min=1)
    return zero.index_add(0, rows, found) / count


@torch.no_grad()
def utility(model: nn.Module, records: Records, size: int = 256) -> float:
    """Score a model: accuracy (0..1), of a regression R^2 (at most 1), of a causal model accuracy of counted tokens."""
    assert records.labels is not None
    regression, found = records.task == "regression", []
    for x, y in zip(records.inputs.split(size), records.labels.split(size), strict=True):
        found.append((model(x) - y).square() if regression else hits(model(x), y, records.task).float())
    if regression:
        spread = (records.labels - records.labels.mean(0)).square().sum()
        return float(1 - torch.cat(found).sum() / spread)
    return float(torch.cat(found).mean())


def hits(outputs: Tensor, labels: Tensor, task: str | None) -> Tensor:
    """Say of each record, of a causal model of each counted token, whether the likeliest answer is right."""
    if task == "causal":
        rows, columns = counted(labels)
        return outputs[rows, columns].argmax(-1) == labels[rows, columns + 1]
    return outputs.argmax(-1) == labels


def join(parts: Sequence[Records]) -> Records:
    """Put sets of records together; they have labels and names only if all of them do."""
    labels = [part.labels for part in parts if part.labels is not None]
    names = [part.names for part in parts if part.names is not None]
    return Records(
        torch.cat([part.inputs for part in parts]),
        torch.cat(labels) if len(labels) == len(parts) else None,
        tuple(name for each in names for name in each) if len(names) == len(parts) else None,
    )
