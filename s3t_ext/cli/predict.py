"""``s3t predict``: answers from the live nodes of all shards."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the inputs and how answers combine."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("file", metavar="FILE", help=".csv, .jsonl or .npz with the input column of the schema")
    parser.add_argument("--combine", help="probabilities, logits or vote (default: as the store declares)")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Predict and print one label a line."""
    from s3t_ext.system.serve import Service
    from s3t_ext.system.tables import read_inputs

    with Service(args.store, args.combine) as service:
        answer = service.predict(read_inputs(args.file, service.folder.schema, service.folder.base))
    report = {
        "labels": answer.labels,
        "scores": [[round(float(v), 6) for v in row] for row in answer.scores],
        "depths": list(answer.depths),
        "nodes": list(answer.nodes),
        "epoch": answer.epoch,
    }
    return 0, report, "\n".join(answer.labels)
