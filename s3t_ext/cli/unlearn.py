"""``s3t unlearn``: an approximate method on an adapter outside any exact store."""

from __future__ import annotations

import argparse
import ast
import inspect
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.cli.selection import OPTIONS, add_selection, is_selected, selected
from s3t_ext.cli.unlearn_report import MEASURES, doubts, holds, methods, not_given, scores, text, told

if TYPE_CHECKING:
    from s3t_ext.approximate import Method, Records
    from s3t_ext.system.data.schema import Schema
    from s3t_ext.system.data.tables import Table

FLOOR = 0.9


def add(parser: argparse.ArgumentParser) -> None:
    """Add the adapter, the table, whom to forget and how."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="?",
        help="folder as PEFT saves it; head.safetensors in it is its head over the base's features",
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new folder, which PeftModel.from_pretrained loads")
    parser.add_argument("--methods", action="store_true", help="print all methods, what they need and their settings")
    parser.add_argument("--method", metavar="NAME", help="one of those that `s3t unlearn --methods` prints")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name (default: the one that the adapter names)")
    parser.add_argument(
        "--table", metavar="TABLE", help="what the adapter was trained on: what is not forgotten is kept"
    )
    parser.add_argument(
        "--schema", metavar="FILE", help="how TABLE is read, as of `s3t fit` (default: schema.json beside it)"
    )
    parser.add_argument("--test", metavar="TABLE", help="records that it never met: utility is told on them, too")
    parser.add_argument(
        "--val", metavar="TABLE", help="others that it never met; rum needs them with --set proxy=holdout-retraining"
    )
    add_selection(parser)
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the method, as alpha=5; again for another",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="stop the method then: what changed is written, with no guarantee; status 1",
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=FLOOR,
        help="least utility on what is kept (without such records: on --test), as a fraction of what it was; under it "
        f"nothing is written, status 1 (default {FLOOR})",
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Unlearn and report; status 1 where utility collapsed, the budget ended it, or nothing changed."""
    if args.methods:
        return methods()
    schema = _check(args)

    from s3t_ext.approximate import METHODS, Diverged, Guarantee, Result, unlearn
    from s3t_ext.approximate.adapter import before_training
    from s3t_ext.approximate.folder import earlier, load_adapter, round_as_saved, save_adapter
    from s3t_ext.approximate.methods import check_seed, differ
    from s3t_ext.system.data.tables import read_table

    if args.method not in METHODS:
        raise ValueError(f"--method: expected one of {sorted(METHODS)}, got {args.method!r}")
    check_seed(args.seed)
    method, history = METHODS[args.method], earlier(args.adapter)
    settings = _settings(args.set, method)
    table = read_table(args.table, schema, args.base)
    gone = selected(args, table, schema)
    forget, retain = _records(table, schema, gone), _records(table, schema, [not g for g in gone])
    parts = {"forgotten": forget, "kept": retain}
    for name in ("test", "val"):
        if path := getattr(args, name):
            parts[name] = _records(read_table(path, schema, args.base), schema)
    if not (args.test or len(retain)):
        raise ValueError("--test: expected a table to judge what is left by, for nothing of TABLE is kept; got none")
    model = load_adapter(args.adapter, args.base, schema.task, schema.outputs, schema.is_text, args.seed)
    before, initial = scores(model, parts), before_training(model, args.seed)
    kept, val = retain if len(retain) else None, parts.get("val")
    start, diverged = time.perf_counter(), None
    try:
        done = unlearn(
            args.method, model, forget, kept, val=val, initial=initial, seed=args.seed, budget=args.budget, **settings
        )
    except Diverged as error:
        diverged = str(error)
        done = Result(model, Guarantee.NONE, {"seconds": time.perf_counter() - start}, [])
    round_as_saved(done.model, args.adapter)
    if not (changed := differ(model, done.model)):
        done = replace(done, guarantee=Guarantee.NONE)  # rounding may have taken back what changed
    after = {name: dict.fromkeys(told) for name, told in before.items()} if diverged else scores(done.model, parts)
    twins = forget.shared(replace(retain, names=None))
    report = {
        **told(done, args.method, settings, args.seed),
        "budget": args.budget,
        "out": args.out,
        "records": {name: len(part) for name, part in parts.items()},
        "measure": MEASURES[schema.task],
        "before": before,
        "after": after,
        "floor": args.floor,
        "judged": (judged := "kept" if kept else "test"),
        "collapsed": bool(diverged) or not holds(before[judged]["utility"], after[judged]["utility"], args.floor),
        "diverged": diverged,
        "changed": changed,
        "twins": twins,
        "doubts": doubts(parts, before, twins, bool(history)),
        "earlier": history,
    }
    if changed and not report["collapsed"]:
        passing = ("out", "seconds", "cost", "trace", "collapsed", "diverged", "changed", "twins")
        about = {name: value for name, value in report.items() if name not in passing}
        save_adapter(done.model, args.adapter, args.out, about)
    return int(report["collapsed"] or done.guarantee is not method.guarantee), report, text(report)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> Schema:
    """Refuse what can be refused before anything is loaded; give the schema."""
    from s3t_ext.models.files import read_object
    from s3t_ext.store.files import exists
    from s3t_ext.system.data.schema import Schema

    for name in ("adapter", "out", "method", "table"):
        if not getattr(args, name):
            word = name.upper() if name in ("adapter", "out") else f"--{name}"
            raise ValueError(f"{word}: expected one, got none; see `s3t unlearn --help` and `s3t unlearn --methods`")
    if not is_selected(args):
        raise ValueError(f"{OPTIONS}: expected one that says what to forget, got none")
    if not args.floor >= 0:
        raise ValueError(f"--floor: expected a fraction of at least 0, got {args.floor}")
    adapter = Path(args.adapter)
    _refuse_exact(adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"ADAPTER: expected a folder as PEFT saves it, got {adapter} without adapter_config.json")
    if exists(args.out):
        raise ValueError(f"OUT: expected a new folder, got {args.out}, which exists: name another, or move it away")
    above = next(folder for folder in Path(args.out).absolute().parents if exists(folder))
    if not above.is_dir():
        raise ValueError(f"OUT: expected a new folder, got {args.out}, below {above}, which is no folder")
    if owner := _within(Path(args.out), "store.json", "s3t.json"):
        raise ValueError(f"OUT: expected a new folder outside of stores and exports, got {args.out}, inside {owner}")
    if args.base is None:
        args.base = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
        if not args.base:
            raise ValueError("--base: expected the model that the adapter was trained on, for it names none")
    schema = Path(args.schema) if args.schema else Path(args.table).with_name("schema.json")
    if not schema.exists():
        raise ValueError(f"--schema: expected a file that says how TABLE is read, got none, and {schema} is not there")
    return Schema.load(schema)


def _refuse_exact(adapter: Path) -> None:
    """Refuse a store, what lies in one, and what one exported: their lineage carries exact receipts."""
    if store := _within(adapter, "store.json"):
        raise ValueError(
            f"ADAPTER: {store} is a store, whose deletions carry exact receipts; an approximate method would void "
            f"them: `s3t delete {store} SUBJECT` forgets exactly"
        )
    if export := _within(adapter, "s3t.json"):
        raise ValueError(
            f"ADAPTER: {export} was exported from a store, whose receipts name it as exact; `s3t delete` there and "
            "`s3t export` again forgets exactly"
        )


def _within(path: Path, *marks: str) -> Path | None:
    """Give the folder with one of these files that a path is, or lies in."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if any((folder / mark).exists() for mark in marks)), None)


def _settings(given: list[str], method: Method) -> dict[str, Any]:
    """Read ``name=value`` as the kinds of the method's defaults."""
    found, known = dict[str, Any](), sorted(method.settings.keys() - not_given(method))
    for word in given:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {word!r}")
        if name not in known:
            raise ValueError(f"--set: expected a setting of the method, {' or '.join(known)}, got {name!r}")
        found[name] = _value(name, value, method.settings[name].default)
    return found


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if (type(default), type(value)) in ((float, int), (tuple, list)):
        return type(default)(value)
    if default in (None, inspect.Parameter.empty) or type(value) is type(default):
        return value
    raise ValueError(f"--set: {name}: expected {type(default).__name__}, as {default!r}, got {text!r}")


def _records(table: Table, schema: Schema, rows: list[bool] | None = None) -> Records:
    import torch

    from s3t_ext.approximate import Records

    inputs, labels = (torch.from_numpy(part) for part in (schema.scaled(table.inputs), table.labels))
    if rows is None:
        return Records(inputs, labels)
    return Records(inputs, labels, tuple(f"row {i}" for i in range(1, len(table) + 1)))[torch.tensor(rows)]
