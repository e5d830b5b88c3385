"""How good a store's answers are, on records with known ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from s3t_ext.system.data.tables import Table
from s3t_ext.system.serve import Answer, Service

ROWS = 512  # of one forward pass


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
        the table's own units.
    """
    schema = service.folder.schema
    answers = predict_all(service, table.inputs)
    if schema.targets:
        wrong = np.concatenate([answer.scores for answer in answers]) - schema.values(table.labels)  # (n, targets)
        errors = np.sqrt((wrong.astype(np.float64) ** 2).mean(0))  # (targets,)
        return {"rmse": {t.column: float(error) for t, error in zip(schema.targets, errors, strict=True)}}
    said = [label for answer in answers for label in answer.labels]
    right = [schema.classes[i] == label for i, label in zip(table.labels, said, strict=True)]
    return {"accuracy": float(np.mean(right))}
