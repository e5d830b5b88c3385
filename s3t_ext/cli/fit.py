"""``s3t fit``: a table becomes a store with every node of its plan trained."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.cli.settings import add_settings, settings
from s3t_ext.models.files import BUILT_IN
from s3t_ext.system.wording import counted

if TYPE_CHECKING:
    from s3t_ext.system.config import Config
    from s3t_ext.system.data.schema import Schema
    from s3t_ext.system.data.tables import Table
    from s3t_ext.system.folder import StoreFolder

DECLARED = {
    "shards": "m, each a model of its own; together they answer",
    "slices": "L of each shard: stages of training, and what a deletion costs one of",
    "strategy": "which sequences are trained, see `s3t plan` (default: subsets to 6 slices, else rotation)",
    "budget": "of the strategy: sequences, or slice-passes",
    "placement": "stack: every stage adapts every layer; layers: each its own group of layers",
    "targets": "layers that take adapters: all-linear, names with commas between, or a regular expression",
    "rank": "of an adapter",
    "scale": "alpha / rank",
    "lr": "peak learning rate; about 2e-3 suits pretrained encoders",
    "weight_decay": "of AdamW",
    "dropout": "chance that an adapter in training does not see an element of its input",
    "steps": "of each stage, or L numbers with commas between, one for each depth",
    "batch": "records in a step",
    "accumulate": "passes that a step is divided in",
    "clip": "greatest norm of a node's gradient, 0: any",
    "head": "frozen, trained or base (default: by task)",
    "precision": "of the base: float32 or bfloat16",
    "combine": "of answers: probabilities, logits or vote",
    "ensemble": "best: the deepest node of each shard answers; maximal: all that no live one continues",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the table and what is declared about them."""
    parser.add_argument("store", metavar="STORE", help="folder to make, or to go on with")
    parser.add_argument(
        "table", metavar="TABLE", help=".csv, .tsv, .jsonl, .npz, or a folder of images: subject, input, label"
    )
    parser.add_argument(
        "--schema",
        help="JSON: task, classes, shape or max_length, names of columns; see README. This and what else was declared "
        "may be left out for a store that is there",
    )
    parser.add_argument("--model", help=f"folder or hub name of a base model, or a built-in one: {', '.join(BUILT_IN)}")
    parser.add_argument("--public", metavar="TABLE", help="declared public part: a built-in model is pretrained on it")
    parser.add_argument("--public-epochs", type=int, metavar="N", help="of that pretraining (default 30)")
    parser.add_argument("--patch", type=int, metavar="P", help="side of a patch of the built-in vit (default 2)")
    parser.add_argument(
        "--evaluation",
        metavar="TABLE",
        help="declared, undeletable evaluation part: accuracy is told; of a regression the root mean square error, of "
        "a causal store the nats a token of the completions",
    )
    parser.add_argument("--key", metavar="FILE", help="64 hex digits to derive all streams from (default: drawn)")
    parser.add_argument("--deadline-days", type=int, help="to erase a request within (default 30)")
    parser.add_argument("--grow", action="store_true", help="a table of new records opens new shards of the store")
    parser.add_argument("--grow-shards", type=int, metavar="N", help="how many (default: as many as at first)")
    parser.add_argument(
        "--readmit",
        metavar="SUBJECT",
        action="append",
        default=[],
        help="a deleted person whose records in the new table are taken all the same; on record",
    )
    parser.add_argument("--floor", type=float, metavar="D", help="the least mean depth, which `s3t status` looks at")
    parser.add_argument("--shard-floor", type=float, metavar="D", help="the least depth of each shard, likewise")
    add_settings(parser)
    from s3t_ext.system.config import Config

    group = parser.add_argument_group("plan and training, declared once for the store")
    kinds: dict[str, Any] = {"int": int, "int | None": int, "float": float, "int | tuple[int, ...]": _numbers}
    for field in dataclasses.fields(Config):
        default = "" if field.default in ("", None) else f" (default {field.default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kinds.get(str(field.type), str),
            default=None,
            help=DECLARED[field.name] + default,
        )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Fit and report."""
    from s3t_ext.system.data.tables import read_table
    from s3t_ext.system.folder import Floor, StoreFolder

    there = StoreFolder(args.store) if (Path(args.store) / "store.json").exists() else None
    config, schema, given_base = _declared(args, there)
    key = _key(Path(args.key)) if args.key else None
    floor = None if args.floor is args.shard_floor is None else Floor(args.floor or 0, args.shard_floor or 0)
    how = settings(args)

    from s3t_ext.system.evaluate import evaluate
    from s3t_ext.system.fit import fit
    from s3t_ext.system.serve import Service

    reading = there.base if there else given_base
    public_schema = dataclasses.replace(schema, classes=schema.public_classes or schema.classes)
    public = read_table(args.public, public_schema, reading) if args.public else None
    evaluation = read_table(args.evaluation, schema, reading) if args.evaluation else None
    parts = {"public": public, "evaluation": evaluation}
    declared = {part: {name for names in table.subjects for name in names} for part, table in parts.items() if table}
    with tempfile.TemporaryDirectory() as scratch:
        base: Path | str | None = given_base
        if base is None and there is None:
            base = _base(args, public_schema, public, Path(scratch) / "base")
        report = fit(
            args.store,
            args.table,
            schema,
            base,
            config,
            key=key,
            declared=declared,
            deadline_days=args.deadline_days,
            settings=how,
            progress=not args.json,
            grow=args.grow,
            grow_shards=args.grow_shards,
            readmit=args.readmit,
            floor=floor,
        )
    if evaluation:
        with Service(args.store) as service:
            report |= evaluate(service, evaluation)
    text = (
        f"{counted(report['nodes'], 'node')} in {args.store} ({report['trained']} trained now) on "
        f"{counted(report['records'], 'record')} in {report['seconds']:.1f} s"
    )
    if "memory" in report["training"]:
        told = report["training"]
        text += (
            f"; {counted(told['memory']['nodes'], 'node')} a pass at most, {told['lanes']} side by side, "
            f"{told['peak_bytes'] / 2**30:.2f} GiB at the peak"
        )
    if report["generations"] > 1:
        text += f", in {report['generations']} generations of shards"
    if report["dropped"]:
        text += f"; dropped {counted(report['dropped'], 'record')} of deleted subjects"
    if "accuracy" in report:
        text += f"; accuracy on the evaluation part {report['accuracy']:.4f}"
    for column, error in report.get("rmse", {}).items():
        text += f"; root mean square error of {column} on the evaluation part {error:.6g}"
    if "nats" in report:
        text += f"; {report['nats']:.4f} nats a token of the evaluation part's completions"
    return 0, report, text


def _declared(args: argparse.Namespace, there: StoreFolder | None) -> tuple[Config, Schema, str | None]:
    """Read what is declared, and check all that needs no torch; what is not given is that of the store that is there.

    Returns:
        Configuration, schema, and the folder of the base model; None: a built-in one, or the store's own.
    """
    from s3t_ext.models.files import local_folder
    from s3t_ext.system.config import Config, check_combine
    from s3t_ext.system.creation import check_new
    from s3t_ext.system.data.schema import Schema
    from s3t_ext.system.data.tables import check_first_row

    if there is None:
        check_new(Path(args.store), args.grow)
        for name in ("schema", "model"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name}: expected it for a new store, got none; see `s3t fit --help`")
    _check_built_in(args, there)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    if "," in str(given.get("targets", "")):
        given["targets"] = tuple(given["targets"].split(","))
    config = dataclasses.replace(there.config, **given) if there else Config(**given)
    schema = Schema.load(args.schema) if args.schema is not None or there is None else there.schema
    check_combine(config.combine, schema)
    for table in filter(None, (args.table, args.public, args.evaluation)):
        check_first_row(table, schema)
    if args.model is None or args.model in BUILT_IN:
        return config, schema, None
    local_folder(args.model)
    return config, schema, args.model


def _check_built_in(args: argparse.Namespace, there: StoreFolder | None) -> None:
    """Refuse what is said of a built-in model and is not so, or of another one."""
    from s3t_ext.models.files import read_description

    own = read_description(there.base) if there else {}
    model = own.get("architecture") if args.model is None else args.model
    if there and args.model in BUILT_IN and own.get("architecture") != args.model:
        got = own.get("architecture", "another one")
        raise ValueError(f"--model: expected what {args.store} was made with, {got!r}, got {args.model!r}")
    if args.patch is not None and (model != "vit" or args.patch < 1):
        raise ValueError(f"--patch: expected at least 1, beside --model vit alone, got {args.patch} and {model!r}")
    if there and args.patch not in (None, patch := own.get("arguments", {}).get("patch", 2)):
        raise ValueError(f"--patch: expected what {args.store} was made with, {patch}, got {args.patch}")
    if args.public_epochs is not None and args.public_epochs < 1:
        raise ValueError(f"--public-epochs: expected at least 1, got {args.public_epochs}")
    if args.public_epochs is not None and (model not in BUILT_IN or not args.public):
        raise ValueError(
            "--public-epochs: expected it beside a built-in --model and --public alone, which nothing else is "
            f"pretrained on, got {model!r} and {args.public or 'no public part'}"
        )


def _numbers(text: str) -> int | tuple[int, ...]:
    """Read a whole number, or several with commas between them."""
    found = tuple(int(part) for part in text.split(","))
    return found if len(found) > 1 else found[0]


def _key(path: Path) -> bytes:
    from s3t_ext.ledger.identity import Key

    return bytes.fromhex(Key.from_hex(path.read_text().strip()).hex())


def _base(args: argparse.Namespace, schema: Schema, public: Table | None, scratch: Path) -> Path:
    """Give the folder of a new built-in base model, pretrained on a public part."""
    from s3t_ext.models.folder import build, save_model
    from s3t_ext.models.pretrain import pretrain
    from s3t_ext.system.training.progress import Progress

    if schema.is_text:
        raise ValueError(f"--model: expected a folder with a tokenizer for texts, got the built-in {args.model!r}")
    import torch

    how = {"shape": list(schema.shape), **({"patch": args.patch} if args.patch is not None else {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(args.model, how)
    if public is not None:
        epochs = args.public_epochs or 30
        bar = Progress(epochs, enabled=not args.json)
        inputs = schema.scaled(public.inputs)
        pretrain(
            net,
            inputs,
            public.labels,
            schema.outputs,
            epochs=epochs,
            tell=lambda epoch, told: bar.advance(1, f"pretraining on the public part  epoch {epoch}  {told:.4f}"),
        )
    save_model(scratch, net, args.model, how)
    return scratch
