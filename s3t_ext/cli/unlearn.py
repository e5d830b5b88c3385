"""``s3t unlearn``: an approximate method on an adapter outside any exact store."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.cli.selection import OPTIONS, add_selection, is_selected, selected

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
    add_selection(parser)
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

    import torch

    from s3t_ext.approximate import METHODS, unlearn
    from s3t_ext.approximate.adapter import before_training, load_adapter, save_adapter
    from s3t_ext.system.data.tables import read_table

    if args.method not in METHODS:
        raise ValueError(f"--method: expected one of {sorted(METHODS)}, got {args.method!r}")
    method = METHODS[args.method]
    settings = _settings(args.set, method)
    table = read_table(args.table, schema, args.base)
    gone = selected(args, table, schema)
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
    report["told"] = _doubts(args, forget, retain, before)
    if all(torch.equal(a, b) for a, b in zip(model.parameters(), done.model.parameters(), strict=True)):
        report["told"].append("not one weight changed: nothing was forgotten")
    if not report["collapsed"]:
        about = ("guarantee", "method", "settings", "seed", "records", "utility", "measure")
        save_adapter(done.model, args.adapter, args.out, {name: report[name] for name in about})
    complete = done.guarantee is method.guarantee
    return int(report["collapsed"] or not complete), report, _text(report)


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
    if store := _store_of(Path(args.out)):
        raise ValueError(f"OUT: expected a new folder outside of stores, got {args.out}, which lies in {store}")
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
        if name in _not_given(method):
            raise ValueError(f"--set: {name} is no word or number, and cannot be given here")
        found[name] = _value(name, value, default)
    return found


def _not_given(method: Method) -> tuple[str, str]:
    """Name the settings that are tensors or models: none of them can be given in words."""
    return method.original, method.instead


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


def _records(table: Table, schema: Schema, rows: list[bool] | None = None) -> Records:
    import torch

    from s3t_ext.approximate import Records

    inputs, labels = (torch.from_numpy(part) for part in (schema.scaled(table.inputs), table.labels))
    records = Records(inputs, labels, tuple(f"row {i}" for i in range(1, len(table) + 1)))
    return records if rows is None else records[torch.tensor(rows)]


# --- what is told ----------------------------------------------------------------------------------------------------


def _utilities(model: Any, parts: Mapping[str, Records | None]) -> dict[str, float | None]:
    from s3t_ext.approximate.work import utility

    found = {name: utility(model, part) for name, part in parts.items() if part is not None and len(part)}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}  # R^2 of one record


def _doubts(
    args: argparse.Namespace, forget: Records, retain: Records, before: Mapping[str, float | None]
) -> list[str]:
    """Say what makes the run doubtful: records that stay or come back, an adapter that never learnt them."""
    from s3t_ext.approximate import Records
    from s3t_ext.approximate.adapter import ABOUT

    said = []
    if (Path(args.adapter) / ABOUT).exists():
        said.append("this adapter has forgotten before: who was forgotten then must not be in TABLE, or is kept now")
    known = [set(Records(part.inputs, part.labels).keys()) for part in (forget, retain) if len(part)]
    if twins := len(set.intersection(*known)) if len(known) > 1 else 0:
        said.append(f"{twins} forgotten records are among the kept, too, equal in every byte: these remain")
    name, most = max((("forgotten", forget), ("kept", retain)), key=lambda part: len(part[1]))
    counts = most.labels.bincount() if most.task == "classification" and most.labels is not None else None
    if counts is not None and counts.count_nonzero() > 1 and (before[name] or 0) <= float(counts.max()) / len(most):
        said.append(
            "the adapter answers no better than one class for all would: check --base, and the order of the schema's "
            "classes"
        )
    return said


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
        "settings": {name: _plain(value) for name, value in used.items() if name not in _not_given(method)},
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
    lines += report["told"]
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
        needs += [f"{method.original} (made here)"] if method.original else []
        settings = {n: _plain(p.default) for n, p in method.settings.items() if n not in _not_given(method)}
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
