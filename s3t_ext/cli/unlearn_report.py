"""What ``s3t unlearn`` tells: the table of methods, and of a run what was promised, what it cost and what to doubt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
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

    found: Scores = {name: {"utility": None, "loss": None} for name in parts}
    for name, part in parts.items():
        if not len(part):
            continue
        each = []
        with torch.no_grad():
            for x, y in zip(part.inputs.split(256), part.labels.split(256), strict=True):  # type: ignore[union-attr]
                each.append(losses(str(part.task), model(x), y))
        values = {"utility": utility(model, part), "loss": float(torch.cat(each).mean())}
        found[name] = {key: _plain(value) for key, value in values.items()}  # R^2 of one record is no number
    return found


def holds(before: float | None, after: float | None, floor: float) -> bool:
    """Tell whether a score is at least a fraction of what it was, or of as much under zero."""
    if before is None or after is None:
        return floor == 0
    return after >= before - (1 - floor) * abs(before)


def doubts(parts: Mapping[str, Records], before: Scores, twins: int, again: bool) -> list[str]:
    """Say what makes a run doubtful: records that stay or come back, or were met, an adapter that never learnt them.

    Args:
        parts: forgotten, kept and maybe test; ``before``: their scores; ``twins``: how many forgotten are kept, too.
        again: the adapter has forgotten before.
    """
    import torch

    said = []
    if again:
        said.append("this adapter has forgotten before: who was forgotten then must not be in TABLE, or is kept now")
    if twins:
        said.append(f"{twins} forgotten records are among the kept, too, equal in every byte: these remain")
    table = {name: parts[name] for name in ("forgotten", "kept")}
    if met := {
        name: count for name, part in table.items() if "test" in parts and (count := parts["test"].shared(part))
    }:
        both = " and ".join(f"{count} with the {name}" for name, count in met.items())
        said.append(f"--test shares records, {both}, equal in every byte: these are none that it never met")
    labels = torch.cat([part.labels for part in table.values()])  # type: ignore[misc]
    right = round(sum(len(part) * (before[name]["utility"] or 0) for name, part in table.items()))
    if parts["forgotten"].task == "classification" and right < len(labels) and right <= int(labels.bincount().max()):
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
        "none": report["diverged"] or (ended if report["changed"] else "not one weight changed: nothing was forgotten"),
    }
    if report["twins"]:
        twins = f"met records equal to {report['twins']} of them"
        said["exact retrain"] = f"the adapter was trained anew without them, but {twins}"
    lines = [
        f"{report['guarantee'].upper()}: {report['method']} on {number['forgotten']} of "
        f"{number['forgotten'] + number['kept']} records; "
        + said.get(report["guarantee"], "meant to remove their influence; nothing proves that it did"),
        f"{report['measure'] + ', mean loss':<29}{'before':>6}{'after':>18}{'records':>19}",
    ]
    for name, count in number.items():
        cells = [report[when][name][key] for when in ("before", "after") for key in ("utility", "loss")]
        lines.append(f"  {name:<18}" + "".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in cells) + f"{count:>9}")
    steps = "" if report["diverged"] else f", {report['cost']['steps']} steps"
    lines.append(
        f"{report['seconds']:.1f} s{steps}; seed {report['seed']}, "
        + ", ".join(f"{name}={value}" for name, value in report["settings"].items())
    )
    return "\n".join([*lines, *report["doubts"], _outcome(report)])


def _outcome(report: dict[str, Any]) -> str:
    """Say what was written, or why nothing was and what to change."""
    if report["diverged"]:
        return "COLLAPSED: nothing was written"
    if report["changed"] and not report["collapsed"]:
        return f"written to {report['out']}"
    advice = ["a longer --budget"] if any("stopped" in row for row in report["trace"]) else []
    steps = any(name.endswith("rate") for name in report["settings"])
    change = "a {} change: see its settings in `s3t unlearn --methods`"
    if not report["changed"]:
        advice = advice or ["larger steps or more of them" if steps else change.format("larger")]
        return f"nothing was written; take {advice[0]}"
    advice += ["smaller steps or fewer" if steps else change.format("smaller"), "--floor 0 to have it all the same"]
    return (
        f"COLLAPSED: {report['measure']} ({report['judged']}) fell under {report['floor']:g} of what it was, or cannot "
        f"be told: nothing was written; take {', or '.join(advice)}"
    )


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
