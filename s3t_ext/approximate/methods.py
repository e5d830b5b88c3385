"""The table of methods, and the one call that checks what they are given and runs them."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s3t_ext.approximate.concepts import concept_poisoning
from s3t_ext.approximate.dampening import ssd, ssd_label_free
from s3t_ext.approximate.influence import iau, iau_released
from s3t_ext.approximate.laf import laf, laf_repair
from s3t_ext.approximate.memorisation import rum
from s3t_ext.approximate.references import fine_tune, gradient_ascent, neggrad_plus, retrain
from s3t_ext.approximate.regression import blindspot, gaussian
from s3t_ext.approximate.sparsity import l1_sparse, prune_first
from s3t_ext.approximate.work import Guarantee, OutOfBudget, Records, Result, Work

ALL = ("classification", "regression", "causal")


@dataclass(frozen=True)
class Method:
    """A method and what it declares.

    Attributes:
        run: changes ``work.model``; its keyword arguments are the method's settings.
        after: what ``run`` does first, whose settings are the method's, too; None: nothing.
        retain: needs retained records; ``labels``: needs labels; ``features``: the model must give representations.
        instead: a setting that stands in for retained records; empty: none does.
        original: what of the original training it needs, an argument of ``unlearn``; empty: nothing.
        tasks: of ``classification``, ``regression``, ``causal``.
        deterministic: gives the same bits for every seed.
        guarantee: of a run that ended.
    """

    run: Callable[..., None]
    after: Callable[..., None] | None = None
    retain: bool = True
    labels: bool = True
    features: bool = False
    instead: str = ""
    original: str = ""
    tasks: tuple[str, ...] = ALL
    deterministic: bool = False
    guarantee: Guarantee = Guarantee.APPROXIMATE

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Give the settings by name."""
        runs = [self.after, self.run] if self.after else [self.run]
        given = [p for run in runs for p in inspect.signature(run).parameters.values()]
        return {p.name: p for p in given if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "retrain": Method(retrain, original="initial", guarantee=Guarantee.EXACT_RETRAIN),
    "fine-tune": Method(fine_tune),
    "gradient-ascent": Method(gradient_ascent, retain=False),
    "neggrad-plus": Method(neggrad_plus),
    "laf": Method(laf, labels=False, features=True, tasks=("classification",)),
    "laf-repair": Method(laf_repair, laf, features=True, tasks=("classification",)),
    "concept-poisoning": Method(concept_poisoning, features=True, tasks=("classification",)),
    "blindspot": Method(blindspot, original="initial", tasks=("regression",)),
    "gaussian": Method(gaussian, tasks=("regression",)),
    "ssd": Method(ssd, instead="stored", deterministic=True),
    "ssd-label-free": Method(ssd_label_free, labels=False, instead="stored", deterministic=True),
    "iau": Method(iau, deterministic=True),
    "iau-released": Method(iau_released, deterministic=True),
    "prune-first": Method(prune_first),
    "l1-sparse": Method(l1_sparse),
    "rum": Method(rum, tasks=("classification", "causal")),
}


def unlearn(
    method: str,
    model: nn.Module,
    forget: Records,
    retain: Records | None = None,
    *,
    val: Records | None = None,
    initial: nn.Module | None = None,
    seed: int,
    budget: float | None = None,
    **settings: Any,
) -> Result:
    """Make a copy of a model forget records, by an approximate method.

    Args:
        method: of ``METHODS``.
        model: maps inputs to logits or values, see ``Work``; what may change are its weights that require gradients.
        forget: records to be forgotten; ``retain``: the others of its training, where the method needs them.
        val: records that a method may look at to choose, never trained on.
        initial: the model as it was before it met any record, where the method begins there: of the same weights'
            names and shapes; what is exact is so only if it never met what is forgotten.
        seed: of all random choices.
        budget: seconds by the clock after which the method stops where it stands, with the guarantee ``NONE``.
        **settings: of the method: ``METHODS[method].settings``.

    Returns:
        The copy, what may be said of it, its cost and trace. Nothing approximate is exact: audit it.

    Raises:
        ValueError: an argument does not fit the method; nothing was run. Or the weights are no longer finite.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    chosen = METHODS[method]
    task = _check(method, chosen, model, forget, retain, initial, settings)
    _check_apart(forget, retain, val)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget: expected more than 0 seconds, got {budget}")
    start = time.perf_counter()
    work = Work(
        copy.deepcopy(model).eval(),
        forget,
        forget[torch.arange(0)] if retain is None else retain,
        task,
        torch.Generator().manual_seed(seed),
        val,
        initial,
        start + (budget or float("inf")),
    )
    guarantee = chosen.guarantee
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            chosen.run(work, **settings)
        except OutOfBudget:
            guarantee = Guarantee.NONE
            work.note(stopped=f"after {budget} seconds, before its end")
    wrong = [name for name, p in work.model.named_parameters() if not p.isfinite().all()]
    if wrong:
        raise ValueError(f"{method}: the weights are no longer finite ({wrong[0]}, ...): take smaller steps or fewer")
    cost = {"seconds": time.perf_counter() - start, **work.cost}
    return Result(work.model.eval(), guarantee, cost, work.trace)


def run_inside(work: Work, method: str, **settings: Any) -> None:
    """Run a method on another's work, checked by ``check_inside``."""
    check_inside(work, method, settings)
    METHODS[method].run(work, **settings)


def check_inside(work: Work, method: str, settings: dict[str, Any]) -> None:
    """Raise ValueError where a method does not fit another's work, as ``unlearn`` would."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    _check(method, METHODS[method], work.model, work.forget, work.retain, work.initial, settings)


def _check_apart(forget: Records, retain: Records | None, val: Records | None) -> None:
    """Raise ValueError where a record is in two of the sets."""
    named: list[tuple[str, Records | None, str, Records | None]]
    named = [("retain", retain, "not to be forgotten", forget), ("val", val, "not to be forgotten", forget)]
    named += [("val", val, "never trained on", retain)]
    for name, records, wanted, other in named:
        if records is not None and other is not None and (both := records.shared(other)):
            raise ValueError(
                f"{name}: expected records that are {wanted}, got {both} that are in both sets; where two records are "
                "equal by chance, give names"
            )


def _check(
    name: str,
    method: Method,
    model: nn.Module,
    forget: Records,
    retain: Records | None,
    initial: nn.Module | None,
    settings: dict[str, Any],
) -> str:
    """Say the task, or raise ValueError for what does not fit a method."""
    if not len(forget):
        raise ValueError("forget: expected at least one record, got none")
    if method.retain and (retain is None or not len(retain)) and settings.get(method.instead) is None:
        without = sorted(other for other, m in METHODS.items() if not m.retain)
        also = f"give them, or {method.instead}" if method.instead else f"{without} need none"
        raise ValueError(f"retain: {name} needs records that are kept, got none; {also}")
    given = [forget] if retain is None else [forget, retain]
    if method.labels and any(records.labels is None for records in given):
        without = sorted(other for other, m in METHODS.items() if not m.labels)
        raise ValueError(f"labels: {name} needs labels of all records, got none; {without} need none")
    tasks = {records.task for records in given} - {None}
    if len(tasks) > 1:
        raise ValueError(f"labels: expected those of one task, got {sorted(map(str, tasks))}")
    task = str(tasks.pop()) if tasks else "classification"
    if task not in method.tasks:
        fit = sorted(other for other, m in METHODS.items() if task in m.tasks)
        raise ValueError(f"method: {name} is for {' and '.join(method.tasks)}, not {task}; expected one of {fit}")
    if method.features and not (hasattr(model, "features") and hasattr(model, "head")):
        raise ValueError(f"model: {name} needs a model with `features` and `head`, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected weights that require gradients, the ones to change, got none")
    if method.original == "initial" and initial is None:
        raise ValueError(f"initial: {name} needs the model as it was before it met any record, got none")
    known = method.settings
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{unknown[0]}: no setting of {name}; expected some of {sorted(known)}")
    if missing := [n for n, p in known.items() if p.default is p.empty and n not in settings]:
        raise ValueError(f"{missing[0]}: {name} needs it: {(inspect.getdoc(method.run) or '').splitlines()[0]}")
    for setting, value in settings.items():
        _check_setting(setting, value, known[setting].default)
    return task


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Raise ValueError for a count or a rate that is too small, or no number where one is wanted."""
    least = 1 if name == "batch" else 0
    if name.endswith(("epochs", "batch")) and not (type(value) is int and value >= least):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if type(default) is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if name.endswith("rate") and value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
