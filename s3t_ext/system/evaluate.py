"""How good a store's answers are, on records with known ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from s3t_ext.models.batches import by_length
from s3t_ext.system.data.schema import IGNORED
from s3t_ext.system.data.tables import Table
from s3t_ext.system.serve import Answer, Service

ROWS = 512  # of one forward pass
TOKENS = 512  # of one forward pass of a causal store, whose logits are wide


def predict_all(service: Service, inputs: np.ndarray) -> list[Answer]:
    """Answer for many inputs, some at a time, all by the same nodes: after a deletion on the way, all over again."""
    while True:
        answers = [service.predict(inputs[at : at + ROWS]) for at in range(0, len(inputs), ROWS)]
        if len({answer.nodes for answer in answers}) == 1:
            return answers


def evaluate(service: Service, table: Table) -> dict[str, Any]:
    """Compare answers with a table's own.

    Returns:
        ``accuracy``: the share of right labels; of a regression ``rmse``: sqrt(mean (answer - value)^2) by target, in
        the table's own units; of a causal store ``nats``: the mean of -log p of each token of the completions, given
        all before it, the token that ends a text among them.
    """
    schema = service.folder.schema
    if schema.task == "causal":
        total, count = completion_losses(service, table)
        return {"nats": float(total.sum() / count.sum())}
    answers = predict_all(service, table.inputs)
    if schema.targets:
        wrong = np.concatenate([answer.scores for answer in answers]) - schema.values(table.labels)  # (n, targets)
        errors = np.sqrt((wrong.astype(np.float64) ** 2).mean(0))  # (targets,)
        return {"rmse": {t.column: float(error) for t, error in zip(schema.targets, errors, strict=True)}}
    said = [label for answer in answers for label in answer.labels]
    right = [schema.classes[i] == label for i, label in zip(table.labels, said, strict=True)]
    return {"accuracy": float(np.mean(right))}


def completion_losses(service: Service, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Compute what a causal store loses on completions, each given all before it; all by the same nodes.

    Returns:
        (n,) -log p of each record's completion, and (n,) how many tokens it has, float64.
    """
    from s3t_ext.system.serving.writer import Overtaken, Writer

    writer = Writer(service)
    while True:
        route, (total, count) = service.start()[0], np.zeros((2, len(table)))
        try:
            for rows, x in by_length(torch.from_numpy(table.inputs)):
                for some in torch.arange(len(x)).split(max(1, TOKENS // x.shape[1])):
                    follows = torch.from_numpy(table.labels)[rows[some], 1 : x.shape[1]]  # (k, l - 1)
                    said = writer(input_ids=x[some].clamp(min=0).long()).logits[:, :-1]  # (k, l - 1, V)
                    told = said.log_softmax(-1).flatten(0, 1)
                    each = F.nll_loss(told, follows.flatten(), ignore_index=IGNORED, reduction="none")
                    total[rows[some].numpy()] = each.view(follows.shape).double().sum(1).numpy()
                    count[rows[some].numpy()] = (follows != IGNORED).sum(1).numpy()
        except Overtaken:
            continue
        if writer.valid(route):
            return total, count


def probabilities(service: Service, table: Table) -> np.ndarray:
    """Give what a service says of records: probabilities (n, C) of classes, or (n, 2) of their own answers or not.

        p, 1 - p:  p = exp(-mean over tokens of -log p_t), or exp(-mean over targets of e^2 / 2)

    Notes:
        e is in the units in which targets are learnt.
    """
    schema = service.folder.schema
    if schema.task == "causal":
        total, count = completion_losses(service, table)
        loss = total / np.maximum(count, 1)  # (n,)
    else:
        scores = np.concatenate([answer.scores for answer in predict_all(service, table.inputs)]).astype(np.float64)
        if schema.task == "classification":
            if service.combine != "logits":
                return scores
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            return scores / scores.sum(-1, keepdims=True)
        scales = np.array([target.scale for target in schema.targets], np.float64)
        loss = (((scores - schema.values(table.labels)) * scales) ** 2).mean(1) / 2  # (n,)
    return np.stack([np.exp(-loss), -np.expm1(-loss)], 1)  # (n, 2)
