"""The table of methods, and the one call that checks what they are given and runs them."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping
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
from s3t_ext.approximate.work import Diverged, Guarantee, OutOfBudget, Records, Result, Work

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
        The copy, what may be said of it, its cost and trace. Nothing approximate is exact: audit it. Where no weight
        changed, the guarantee is ``NONE``, whatever the method.

    Raises:
        ValueError: an argument does not fit the method; nothing was run.
        Diverged: the loss or the weights are no longer finite; a ValueError, too.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    chosen = METHODS[method]
    task = _check(method, chosen, model, forget, retain, initial, settings)
    _check_numbers({"forget": forget, "retain": retain, "val": val}, {"model": model, "initial": initial})
    _check_apart(forget, retain, val)
    check_seed(seed)
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
        raise Diverged(f"{method}: the weights are no longer finite ({wrong[0]}, ...): take smaller steps or fewer")
    if not differ(model, work.model):
        guarantee = Guarantee.NONE
    cost = {"seconds": time.perf_counter() - start, **work.cost}
    return Result(work.model.eval(), guarantee, cost, work.trace)


def run_inside(work: Work, method: str, **settings: Any) -> None:
    """Run a method on another's work, checked by ``check_inside``."""
    check_inside(work, method, settings)
    METHODS[method].run(work, **settings)


def check_inside(work: Work, method: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a method does not fit another's work, as ``unlearn`` would."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings: expected those of {method} by their names, as {{'epochs': 1}}, got {settings!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    _check(method, METHODS[method], work.model, work.forget, work.retain, work.initial, settings)


def differ(model: nn.Module, done: nn.Module) -> bool:
    """Tell whether any weight differs."""
    return not all(torch.equal(a, b) for a, b in zip(model.parameters(), done.parameters(), strict=True))


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that no generator takes."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a whole number of at most 64 bits, got {seed}")


def _check_numbers(parts: Mapping[str, Records | None], models: Mapping[str, nn.Module | None]) -> None:
    """Raise ValueError where records or weights are not finite, or parts are of other types than the forgotten."""
    known = {name: records for name, records in parts.items() if records is not None}
    forget = known["forget"]
    for name, records in known.items():
        for kind in ("inputs", "labels"):
            given, like = getattr(records, kind), getattr(forget, kind)
            if given is None:
                continue
            if like is not None and given.dtype != like.dtype and (kind == "inputs" or records.task == forget.task):
                raise ValueError(f"{name}: expected {kind} of {like.dtype}, as of forget, got {given.dtype}")
            if len(wrong := (~given.isfinite()).nonzero()):
                value, row = given[tuple(wrong[0])].item(), wrong[0, 0].item()
                raise ValueError(f"{name}: expected finite numbers, got {value} in the {kind} of record {row}")
    for name, model in models.items():
        for weight, p in model.named_parameters() if model else ():
            if not p.isfinite().all():
                raise ValueError(f"{name}: expected finite weights, got NaN or infinity in {weight}")


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
    settings: Mapping[str, Any],
) -> str:
    """Say the task, or raise ValueError for what does not fit a method."""
    if not len(forget):
        raise ValueError("forget: expected at least one record, got none")
    given = [forget] if retain is None else [forget, retain]
    tasks = {records.task for records in given} - {None}
    if len(tasks) > 1:
        raise ValueError(f"labels: expected those of one task, got {sorted(map(str, tasks))}")
    missing = {
        "retain": retain is None or not len(retain),
        "labels": any(records.labels is None for records in given),
        "features": not (hasattr(model, "features") and hasattr(model, "head")),
    }
    fit = [
        other
        for other, m in sorted(METHODS.items())
        if set(m.tasks) & (tasks or set(method.tasks)) and not (m.original and initial is None)
        if not any(getattr(m, need) for need, none in missing.items() if none)
    ]
    if method.retain and missing["retain"] and settings.get(method.instead) is None:
        also = f"; give them, or {method.instead}" if method.instead else f"; {fit} need none" if fit else ""
        raise ValueError(f"retain: {name} needs records that are kept, got none{also}")
    if method.labels and missing["labels"]:
        also = f"; {fit} need none" if fit else ""
        raise ValueError(f"labels: {name} needs labels of all records, got none{also}")
    task = str(tasks.pop()) if tasks else "classification"
    if task not in method.tasks:
        also = f"; expected one of {fit}" if fit else ""
        raise ValueError(f"method: {name} is for {' and '.join(method.tasks)}, not {task}{also}")
    if method.features and missing["features"]:
        raise ValueError(f"model: {name} needs a model with `features` and `head`, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected weights that require gradients, the ones to change, got none")
    if method.original == "initial" and initial is None:
        raise ValueError(f"initial: {name} needs the model as it was before it met any record, got none")
    if initial is not None:
        mine, its = ({n: tuple(p.shape) for n, p in each.state_dict().items()} for each in (model, initial))
        if wrong := sorted(n for n in mine.keys() | its.keys() if mine.get(n) != its.get(n)):
            raise ValueError(
                f"initial: expected the model's weights by name and shape, {wrong[0]} {mine.get(wrong[0])} for one, "
                f"got {its.get(wrong[0])}"
            )
    known = method.settings
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{unknown[0]}: no setting of {name}; expected some of {sorted(known)}")
    if unset := [n for n, p in known.items() if p.default is p.empty and n not in settings]:
        raise ValueError(f"{unset[0]}: {name} needs it: {(inspect.getdoc(method.run) or '').splitlines()[0]}")
    for setting, value in settings.items():
        _check_setting(setting, value, known[setting].default)
    return task


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Raise ValueError for a count or a rate that is too small, or no number where one is wanted."""
    least = 1 if name in ("batch", "latent") else 0
    if name.endswith(("epochs", "batch", "latent")) and not (type(value) is int and value >= least):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if isinstance(default, tuple) and not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list or tuple, got {value!r}")
    if type(default) is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if name.endswith("rate") and value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
