"""What ``s3t unlearn`` tells: the table of methods, and of a run what was promised, what it cost and what to doubt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from s3t_ext.approximate import Method, Records, Result

MEASURES = {"classification": "accuracy", "regression": "R^2", "causal": "accuracy of tokens"}
WORDS = {"retain": "kept records", "features": "a model with a head", "initial (made here)": "the untrained adapter"}
Scores = dict[str, dict[str, "float | None"]]  # of each part of the records: utility, loss


def not_given(method: Method) -> set[str]:
    """Name the settings that are tensors or models: none of them can be given in words."""
    kinds = {name: str(parameter.annotation) for name, parameter in method.settings.items()}
    return {name for name, kind in kinds.items() if any(word in kind for word in ("Module", "Tensor", "Importance"))}


def scores(model: nn.Module, parts: Mapping[str, Records]) -> Scores:
    """Score a model on parts of the records: utility, and the mean loss, which moves before any answer does."""
    import torch

    from s3t_ext.approximate.work import losses, utility

    found: Scores = {}
    for name, part in parts.items():
        each = []
        with torch.no_grad():
            for x, y in zip(part.inputs.split(256), part.labels.split(256), strict=True):  # type: ignore[union-attr]
                each.append(losses(str(part.task), model(x), y))
        values = {"utility": utility(model, part), "loss": float(torch.cat(each).mean())} if len(part) else {}
        found[name] = {key: _plain(values.get(key)) for key in ("utility", "loss")}  # R^2 of one record is no number
    return found


def holds(before: float | None, after: float | None, floor: float) -> bool:
    """Tell whether a score is at least a fraction of what it was, or of as much under zero."""
    if before is None or after is None:
        return floor == 0
    return after >= before - (1 - floor) * abs(before)


def differ(model: nn.Module, done: nn.Module) -> bool:
    """Tell whether any weight differs."""
    import torch

    return not all(torch.equal(a, b) for a, b in zip(model.parameters(), done.parameters(), strict=True))


def doubts(adapter: Path, forget: Records, retain: Records, before: Scores) -> list[str]:
    """Say what makes a run doubtful: records that stay or come back, an adapter that never learnt them."""
    from s3t_ext.approximate import Records
    from s3t_ext.approximate.folder import ABOUT

    said = []
    if (adapter / ABOUT).exists():
        said.append("this adapter has forgotten before: who was forgotten then must not be in TABLE, or is kept now")
    bare = [Records(part.inputs, part.labels) for part in (forget, retain)]
    if len(retain) and (twins := bare[0].shared(bare[1])):
        said.append(f"{twins} forgotten records are among the kept, too, equal in every byte: these remain")
    name, most = max((("forgotten", forget), ("kept", retain)), key=lambda part: len(part[1]))
    counts = most.labels.bincount() if most.task == "classification" and most.labels is not None else None
    right = before[name]["utility"] or 0
    if counts is not None and counts.count_nonzero() > 1 and right <= float(counts.max()) / len(most):
        said.append(
            "the adapter answers no better than one class for all would: check --base, and the order of the schema's "
            "classes"
        )
    return said


def told(done: Result, name: str, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Give what a run says of itself, with every setting, as JSON takes it."""
    from s3t_ext.approximate import METHODS

    settings = _defaults(METHODS[name])
    return {
        "guarantee": done.guarantee.value,
        "method": name,
        "settings": {key: _plain(given.get(key, default)) for key, default in settings.items()},
        "seed": seed,
        "seconds": round(done.cost["seconds"], 3),
        "cost": {key: value for key, value in done.cost.items() if key != "seconds"},
        "trace": [{key: _plain(value) for key, value in row.items()} for row in done.trace],
    }


def _defaults(method: Method) -> dict[str, Any]:
    return {name: _plain(p.default) for name, p in method.settings.items() if name not in not_given(method)}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else str(value)


def text(report: dict[str, Any]) -> str:
    """Write a report; the guarantee stands first."""
    number = report["records"]
    ended = "the budget ended before the method did; nothing may be said of them"
    said = {
        "exact retrain": "the adapter was trained anew and never met them; what its base learnt is as it was",
        "none": ended if report["changed"] else "not one weight changed: nothing was forgotten",
    }
    lines = [
        f"{report['guarantee'].upper()}: {report['method']} on {number['forgotten']} of "
        f"{number['forgotten'] + number['kept']} records; "
        + said.get(report["guarantee"], "meant to remove their influence; nothing proves that it did"),
        f"{report['measure'] + ', mean loss':<29}{'before':>6}{'after':>18}{'records':>19}",
    ]
    for name, count in number.items():
        cells = [report[when][name][key] for when in ("before", "after") for key in ("utility", "loss")]
        lines.append(f"  {name:<18}" + "".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in cells) + f"{count:>9}")
    lines.append(
        f"{report['seconds']:.1f} s, {report['cost'].get('steps', 0)} steps; seed {report['seed']}, "
        + ", ".join(f"{name}={value}" for name, value in report["settings"].items())
    )
    lines += report["doubts"]
    if not report["changed"]:
        lines.append("nothing was written; take larger steps or more of them, or a longer --budget")
    elif report["collapsed"]:
        lines.append(
            f"COLLAPSED: {report['measure']} ({report['judged']}) fell under {report['floor']:g} of what it was, or "
            "cannot be told: nothing was written; take smaller steps or fewer, or --floor 0 to have it all the same"
        )
    else:
        lines.append(f"written to {report['out']}")
    return "\n".join(lines)


def methods() -> tuple[int, dict, str]:
    """Print the table of methods."""
    from s3t_ext.approximate import METHODS

    report: dict[str, Any] = {}
    lines = []
    for name, method in METHODS.items():
        needs = [what for what in ("retain", "labels", "features") if getattr(method, what)]
        needs += [f"{method.original} (made here)"] if method.original else []
        report[name] = {
            "about": (inspect.getdoc(method.run) or "").splitlines()[0],
            "needs": needs,
            "tasks": list(method.tasks),
            "deterministic": method.deterministic,
            "guarantee": method.guarantee.value,
            "settings": _defaults(method),
        }
        lines += [
            f"{name}: {report[name]['about']}",
            f"    needs {', '.join(WORDS.get(need, need) for need in needs)}; for {', '.join(method.tasks)}",
            f"    {', '.join(f'{n}={v}' for n, v in report[name]['settings'].items())}",
        ]
    lines += [
        "All that is needed comes from TABLE and ADAPTER; the last line of each is its settings, for --set.",
        """Those of methods inside: --set "settings={'epochs': 3}" of prune-first; of rum a list, one a method.""",
        "What settings mean: in Python, help(s3t_ext.approximate.METHODS[NAME].run).",
    ]
    return 0, report, "\n".join(lines)
