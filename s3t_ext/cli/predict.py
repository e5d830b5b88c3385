"""``s3t predict``: answers from the live nodes of all shards."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from s3t_ext.cli.store import opened

if TYPE_CHECKING:
    import numpy as np

    from s3t_ext.system.serve import Service


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the inputs and how answers combine."""
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "file", metavar="FILE", help="a table with the input columns of the schema, or a folder of images"
    )
    parser.add_argument("--combine", help="probabilities, logits or vote (default: as the store declares)")
    parser.add_argument("--ensemble", help="best or maximal (default: as the store declares)")
    parser.add_argument("--tokens", type=int, help="how many a causal store writes at most (default: 64, or what fits)")
    parser.add_argument("--temperature", type=float, help="0 (default): the likeliest token; above: drawn")
    parser.add_argument("--seed", type=int, help="of what is drawn, beside the prompt (default 0)")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Predict and print one answer a line: a label, numbers of a regression in its units, or a causal store's text."""
    task = opened(args.store, args.file, inputs=True).schema.task
    for name in ("tokens", "temperature", "seed"):
        if task != "causal" and getattr(args, name) is not None:
            raise ValueError(f"--{name}: expected it of a causal store alone, got a {task} store")
    if args.seed is not None and not args.temperature:
        raise ValueError("--seed: expected it beside a --temperature above 0 alone: otherwise nothing is drawn")

    from s3t_ext.system.data.tables import read_inputs
    from s3t_ext.system.evaluate import predict_all
    from s3t_ext.system.serve import Service

    with Service(args.store, args.combine, ensemble=args.ensemble) as service:
        schema = service.folder.schema
        if schema.task == "causal":
            return _written(service, read_inputs(args.file, schema, service.folder.base), args)
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


def _written(service: Service, prompts: np.ndarray, args: argparse.Namespace) -> tuple[int, dict, str]:
    from s3t_ext.models.tokens import tokenizer

    answer = service.generate(prompts, args.tokens, args.temperature or 0.0, args.seed or 0)
    words = tokenizer(service.folder.base)
    texts = [words.decode(ids) for ids in answer.tokens]
    report = {"texts": texts, "depths": list(answer.depths), "nodes": list(answer.nodes), "epoch": answer.epoch}
    return 0, report, "\n".join(text.replace("\n", "\\n") for text in texts)
