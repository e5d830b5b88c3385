"""``s3t unlearn``: an approximate method on an adapter outside any exact store."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3t_ext.approximate import Method, Records, Result
    from s3t_ext.system.data.schema import Schema
    from s3t_ext.system.data.tables import Table

FLOOR = 0.9
MEASURES = {"classification": "accuracy", "regression": "R^2", "causal": "accuracy of tokens"}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the adapter, the table, whom to forget and how."""
    parser.add_argument(
        "adapter", metavar="ADAPTER", nargs="?", help="folder of PEFT's; with head.safetensors over a base's features"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new folder, which PeftModel.from_pretrained loads")
    parser.add_argument("--methods", action="store_true", help="print all methods, what they need and their settings")
    parser.add_argument("--method", metavar="NAME", help="of `s3t unlearn --methods`")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub name (default: the one that the adapter names)")
    parser.add_argument(
        "--table", metavar="TABLE", help="what the adapter was trained on: what is not forgotten is kept"
    )
    parser.add_argument("--schema", metavar="FILE", help="as of `s3t fit` (default: schema.json beside TABLE)")
    parser.add_argument("--test", metavar="TABLE", help="records that it never met: utility is told on them, too")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--subject", metavar="NAME", nargs="+", help="forget people, as in the table")
    who.add_argument("--subjects", metavar="FILE", help="forget people, one a line; - is standard input")
    who.add_argument("--class", metavar="NAME", nargs="+", dest="classes", help="forget all records of classes")
    who.add_argument("--rows", metavar="1-20,35", help="forget rows of TABLE, the first one is 1")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a setting of the method, as alpha=5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop the method there; status 1")
    parser.add_argument(
        "--floor",
        type=float,
        default=FLOOR,
        help="least utility on what is kept (without such records: on --test), as a fraction of what it was; under it "
        f"nothing is written, status 1 (default {FLOOR})",
    )


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Unlearn and report; status 1 where utility collapsed or the budget ended it."""
    if args.methods:
        return _methods()
    schema = _check(args)

    from s3t_ext.approximate import METHODS, unlearn
    from s3t_ext.approximate.adapter import before_training, load_adapter, save_adapter
    from s3t_ext.system.data.tables import read_table

    if args.method not in METHODS:
        raise ValueError(f"--method: expected one of {sorted(METHODS)}, got {args.method!r}")
    method = METHODS[args.method]
    settings = _settings(args.set, method)
    table = read_table(args.table, schema, args.base)
    gone = _chosen(args, table, schema)
    forget, retain = _records(table, schema, gone), _records(table, schema, [not g for g in gone])
    test = _records(read_table(args.test, schema, args.base), schema) if args.test else None
    if not len(retain) and test is None:
        raise ValueError("--test: expected a table to judge what is left by, for nothing of TABLE is kept; got none")
    model = load_adapter(args.adapter, args.base, schema.task, schema.outputs, schema.is_text, args.seed)
    if method.original == "initial":
        settings["initial"] = before_training(model, args.seed)
    parts = {"forgotten": forget, "kept": retain, "test": test}
    before = _utilities(model, parts)
    kept = retain if len(retain) else None
    done = unlearn(args.method, model, forget, kept, seed=args.seed, budget=args.budget, **settings)
    after = _utilities(done.model, parts)
    judged = "kept" if len(retain) else "test"
    report = _report(args, done, method, settings, parts, {"before": before, "after": after})
    report["collapsed"] = not _holds(before[judged], after[judged], args.floor)
    report["judged"] = judged
    report["equal"] = len(_contents(forget) & _contents(retain))
    if not report["collapsed"]:
        about = ("guarantee", "method", "settings", "seed", "records", "utility", "measure")
        save_adapter(done.model, args.adapter, args.out, {name: report[name] for name in about})
    complete = done.guarantee is method.guarantee
    return int(report["collapsed"] or not complete), report, _text(report)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> Schema:
    """Refuse what can be refused before anything is loaded; give the schema."""
    from s3t_ext.store.files import exists
    from s3t_ext.system.data.schema import Schema

    for name in ("adapter", "out", "method", "table"):
        if not getattr(args, name):
            word = name.upper() if name in ("adapter", "out") else f"--{name}"
            raise ValueError(f"{word}: expected one, got none; see `s3t unlearn --help` and `s3t unlearn --methods`")
    if not (args.subject or args.subjects or args.classes or args.rows):
        raise ValueError("--subject, --subjects, --class or --rows: expected one that says what to forget, got none")
    if not args.floor >= 0:
        raise ValueError(f"--floor: expected a fraction of at least 0, got {args.floor}")
    adapter = Path(args.adapter)
    _refuse_exact(adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"ADAPTER: expected a folder as PEFT saves it, got {adapter} without adapter_config.json")
    if exists(args.out):
        raise ValueError(f"OUT: expected a new folder, got {args.out}, which exists: name another, or move it away")
    if store := _store_of(Path(args.out)):
        raise ValueError(f"OUT: expected a new folder outside of stores, got {args.out}, which lies in {store}")
    if args.base is None:
        args.base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not args.base:
            raise ValueError("--base: expected the model that the adapter was trained on, for it names none")
    schema = Path(args.schema) if args.schema else Path(args.table).with_name("schema.json")
    if not schema.exists():
        raise ValueError(f"--schema: expected a file that says how TABLE is read, got none, and {schema} is not there")
    return Schema.load(schema)


def _refuse_exact(adapter: Path) -> None:
    """Refuse a store, what lies in one, and what one exported: their lineage carries exact receipts."""
    if store := _store_of(adapter):
        raise ValueError(
            f"ADAPTER: {store} is a store, whose deletions carry exact receipts; an approximate method would void "
            f"them: `s3t delete {store} SUBJECT` forgets exactly"
        )
    if (adapter / "s3t.json").exists():
        raise ValueError(
            f"ADAPTER: {adapter} was exported from a store, whose receipts name it as exact; `s3t delete` there and "
            "`s3t export` again forgets exactly"
        )


def _store_of(path: Path) -> Path | None:
    """Give the store that a path is, or lies in."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / "store.json").exists()), None)


def _settings(given: list[str], method: Method) -> dict[str, Any]:
    """Read ``name=value`` as the kinds of the method's defaults; names are checked where it is called."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        parameter = method.settings.get(name)
        default = parameter.default if parameter else None
        if name == method.original or callable(default) or "Tensor" in str(parameter):
            raise ValueError(f"--set: {name} is no word or number, and cannot be given here")
        found[name] = _value(name, value, default)
    return found


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if type(default) is float and type(value) is int:
        return float(value)
    if default in (None, inspect.Parameter.empty) or type(value) is type(default):
        return value
    raise ValueError(f"--set: {name}: expected {type(default).__name__}, as {default!r}, got {text!r}")


# --- records ---------------------------------------------------------------------------------------------------------


def _chosen(args: argparse.Namespace, table: Table, schema: Schema) -> list[bool]:
    """Say of each row of the table whether it is to be forgotten; refuse what is not there."""
    if args.rows:
        rows = _rows(args.rows, len(table))
        return [i in rows for i in range(len(table))]
    if args.classes:
        if not schema.classes:
            raise ValueError(f"--class: expected none for the task {schema.task!r}; use --rows, got {args.classes}")
        if unknown := sorted(set(args.classes) - set(schema.classes)):
            raise ValueError(f"--class: expected one of {list(schema.classes)[:12]}, got {unknown[0]!r}")
        gone = [schema.classes[label] in args.classes for label in table.labels]
        if not any(gone):
            raise ValueError(f"--class: expected one with records in {args.table}, got {args.classes}, which have none")
        return gone
    return _by_people(args, table, schema)


def _by_people(args: argparse.Namespace, table: Table, schema: Schema) -> list[bool]:
    from s3t_ext.cli.delete import subjects_in
    from s3t_ext.ledger.identity import normalise_subject

    names = args.subject
    if args.subjects:
        names = subjects_in(sys.stdin.buffer.read() if args.subjects == "-" else Path(args.subjects).read_bytes())
        if not names:
            raise ValueError(f"--subjects: expected one a line, got none in {args.subjects}")
    people = {normalise_subject(name, schema.normalise): name for name in names}
    there = {name for each in table.subjects for name in each}
    if lacking := [name for normal, name in people.items() if normal not in there]:
        raise ValueError(
            f"--subject: expected people of {args.table}, as {min(there)!r}, got {lacking[0]!r}, who has no record"
        )
    return [any(name in people for name in each) for each in table.subjects]


def _rows(text: str, count: int) -> set[int]:
    """Read ``1-20,35`` as indices from 0."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first) <= count):
            raise ValueError(f"--rows: expected rows of 1 to {count} as 1-20,35, got {part!r}")
        found |= set(range(int(first) - 1, int(last or first)))
    return found


def _records(table: Table, schema: Schema, rows: list[bool] | None = None) -> Records:
    import torch

    from s3t_ext.approximate import Records

    inputs, labels = (torch.from_numpy(part) for part in (schema.scaled(table.inputs), table.labels))
    records = Records(inputs, labels, tuple(f"row {i}" for i in range(1, len(table) + 1)))
    return records if rows is None else records[torch.tensor(rows)]


def _contents(records: Records) -> set[Any]:
    from s3t_ext.approximate import Records

    return set(Records(records.inputs, records.labels).keys()) if len(records) else set()


# --- what is told ----------------------------------------------------------------------------------------------------


def _utilities(model: Any, parts: Mapping[str, Records | None]) -> dict[str, float | None]:
    from s3t_ext.approximate.work import utility

    found = {name: utility(model, part) for name, part in parts.items() if part is not None and len(part)}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}  # R^2 of one record


def _holds(before: float | None, after: float | None, floor: float) -> bool:
    if before is None or after is None:
        return floor == 0
    return after >= before - (1 - floor) * abs(before)


def _report(
    args: argparse.Namespace,
    done: Result,
    method: Method,
    settings: Mapping[str, Any],
    parts: Mapping[str, Records | None],
    utility: dict[str, Any],
) -> dict[str, Any]:
    used = {name: p.default for name, p in method.settings.items()} | dict(settings)
    task = next(str(part.task) for part in parts.values() if part is not None)
    return {
        "guarantee": done.guarantee.value,
        "out": str(args.out),
        "method": args.method,
        "settings": {name: _plain(value) for name, value in used.items() if name != method.original},
        "seed": args.seed,
        "records": {name: len(part) for name, part in parts.items() if part is not None},
        "measure": MEASURES[task],
        "utility": utility,
        "floor": args.floor,
        "seconds": round(done.cost["seconds"], 3),
        "cost": {name: value for name, value in done.cost.items() if name != "seconds"},
        "trace": [{name: _plain(value) for name, value in told.items()} for told in done.trace],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else str(value)


def _text(report: dict[str, Any]) -> str:
    number = report["records"]
    said = {
        "exact retrain": "the adapter was trained anew and never met them; what its base learnt is as it was",
        "none": "the budget ended before the method did; nothing may be said of them",
    }
    lines = [
        f"{report['guarantee'].upper()}: {report['method']} on {number['forgotten']} of "
        f"{number['forgotten'] + number['kept']} records; "
        + said.get(report["guarantee"], "meant to remove their influence, proved by nothing: attack it"),
        f"{report['measure']:<20}{'before':>8}{'after':>8}{'records':>9}",
    ]
    for name, count in number.items():
        cells = [report["utility"][when].get(name) for when in ("before", "after")]
        lines.append(f"  {name:<18}" + "".join(f"{'-' if v is None else f'{v:.4f}':>8}" for v in cells) + f"{count:>9}")
    lines.append(
        f"{report['seconds']:.1f} s, {report['cost'].get('steps', 0)} steps; seed {report['seed']}, "
        + ", ".join(f"{name}={value}" for name, value in report["settings"].items())
    )
    if report["equal"]:
        lines.append(f"{report['equal']} forgotten records are among the kept, too, equal in every byte: these remain")
    if report["collapsed"]:
        lines.append(
            f"COLLAPSED: {report['measure']} ({report['judged']}) fell under {report['floor']:g} of what it was, or "
            "cannot be told: nothing was written; take smaller steps or fewer, or --floor 0 to have it all the same"
        )
    else:
        lines.append(f"written to {report['out']}")
    return "\n".join(lines)


def _methods() -> tuple[int, dict, str]:
    """Print the table of methods."""
    from s3t_ext.approximate import METHODS

    report: dict[str, Any] = {}
    lines = []
    for name, method in METHODS.items():
        needs = [what for what in ("retain", "labels", "features") if getattr(method, what)]
        needs += [method.original] if method.original else []
        settings = {n: _plain(p.default) for n, p in method.settings.items() if p.default is not p.empty}
        said = (inspect.getdoc(method.run) or "").splitlines()[0]
        report[name] = {
            "about": said,
            "needs": needs,
            "tasks": list(method.tasks),
            "deterministic": method.deterministic,
            "guarantee": method.guarantee.value,
            "settings": settings,
        }
        lines += [
            f"{name}: {said}",
            f"    needs {', '.join(needs) or 'nothing beside the forgotten'}; for {', '.join(method.tasks)}",
            f"    {', '.join(f'{n}={v}' for n, v in settings.items())}",
        ]
    return 0, report, "\n".join(lines)
