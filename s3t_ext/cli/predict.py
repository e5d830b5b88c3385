"""``s3t predict``: answers from the live nodes of all shards."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from s3t_ext.system.serve import Answer, Service

ROWS = 512  # of one forward pass


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the inputs and how answers combine."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "file", metavar="FILE", help="a table with the input columns of the schema, or a folder of images"
    )
    parser.add_argument("--combine", help="probabilities, logits or vote (default: as the store declares)")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Predict and print one answer a line: a label, or the numbers of a regression, in its units, with tabs between."""
    from s3t_ext.system.serve import Service
    from s3t_ext.system.tables import read_inputs

    with Service(args.store, args.combine) as service:
        schema = service.folder.schema
        answers = predict_all(service, read_inputs(args.file, schema, service.folder.base))
    scores = [row for answer in answers for row in answer.scores]
    report: dict = {
        "depths": list(answers[0].depths),
        "nodes": list(answers[0].nodes),
        "epoch": answers[-1].epoch,
    }
    if schema.targets:
        names = [target.column for target in schema.targets]
        report["values"] = [dict(zip(names, map(float, row), strict=True)) for row in scores]
        return 0, report, "\n".join("\t".join(f"{float(v):.7g}" for v in row) for row in scores)
    report["labels"] = [label for answer in answers for label in answer.labels]
    report["scores"] = [[round(float(v), 6) for v in row] for row in scores]
    return 0, report, "\n".join(report["labels"])


def predict_all(service: Service, inputs: np.ndarray) -> list[Answer]:
    """Answer for many inputs, some at a time, all by the same nodes: after a deletion on the way, all over again."""
    while True:
        answers = [service.predict(inputs[at : at + ROWS]) for at in range(0, len(inputs), ROWS)]
        if len({answer.nodes for answer in answers}) == 1:
            return answers
