"""One case: build every provider, check its result (and its graph's), time those that are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench import timing
from bench.built import Cannot, results, step
from bench.cases import COMPILED, Case
from bench.machine import threads
from bench.providers import PROVIDERS, Provider
from bench.roofline import Machine, floor, predict
from bench.truth import TYPES, Results, make, plain, wrong

Row = dict[str, object]


class Broken(Exception):
    """The device no longer answers; the message names the provider and the case."""


@dataclass
class Log:
    """Who has no row: providers that were wrong or failed, and how many cases each declines for which reason."""

    failures: list[str] = field(default_factory=list)
    declined: dict[tuple[str, str], int] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"NOT TIMED: {what}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        lines = [f"no row: {name} on {count} case(s): {why}" for (name, why), count in self.declined.items()]
        return "\n".join(lines + [f"NOT TIMED: {failure}" for failure in self.failures])


def ready(
    case: Case, device: str, providers: Iterable[Provider], log: Log
) -> Iterator[tuple[Provider, Callable[[], object]]]:
    """Give the callables of the providers whose result is right."""
    i = make(case, device)
    if case in COMPILED:
        from torch import _dynamo

        _dynamo.reset()  # a call walks the guards of all that its code was compiled for, and there is a limit
    truth: dict[bool, tuple[Results, Results]] = {}
    for provider in providers:
        adapters = provider.name != "bare"
        if adapters not in truth:
            truth[adapters] = plain(i, TYPES[case.dtype], adapters), plain(i, torch.float64, adapters)
        try:
            built = provider.build(i)
            fault = wrong(results(built, i), *truth[adapters], i)
            call = step(built, i)
            if case.timer == "graph" and not fault:
                call, result = timing.capture(call)
                if isinstance(result, torch.Tensor):
                    result.fill_(torch.nan)
                call()
                torch.cuda.synchronize()
                if isinstance(result, torch.Tensor):
                    fault = wrong({"y": result}, *truth[adapters], i)
        except Cannot as why:
            log.declined[provider.name, str(why)] = log.declined.get((provider.name, str(why)), 0) + 1
            continue
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _alive(device, f"{provider.name} on {case.name}")
        if fault:
            log.fail(f"{provider.name} on {case.name}: {fault}")
        else:
            yield provider, call


def _alive(device: str, what: str) -> None:
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Broken(f"{what}: {str(error).partition(chr(10))[0]}") from error


def measure(
    case: Case, device: str, providers: Iterable[Provider], machine: Machine, seconds: float, log: Log
) -> list[Row]:
    """Check and time one case.

    Args:
        machine: its ceilings, for the prediction beside each row.
        seconds: how long to time; 0: only check.

    Returns:
        One row for each provider that is right; none where nothing is timed.
    """
    if device == "cpu":
        torch.set_num_threads(threads(case.timer))
    flush = None
    if case.timer == "graph" and seconds:
        flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device=device)
    with torch.set_grad_enabled(case.step != "fwd"):
        found = list(ready(case, device, providers, log))
        if not found or not seconds:
            return []
        spreads = timing.take({provider.name: call for provider, call in found}, case.timer, seconds, flush)
    rows = []
    for provider, _ in found:
        times = spreads[provider.name]
        expected = predict(case, provider.kind, machine) * 1e6 if provider.kind else float("nan")
        rows.append(
            {"case": case.name, "provider": provider.name, **case.fields(), "mode": provider.mode, "metric": "time"}
            | {name: f"{getattr(times, name) * 1e6:.3f}" for name in ("p20", "p50", "p80")}
            | {"unit": "us", "repeats": times.repeats, "floor": f"{floor(case):.4f}"}
            | {"predicted": "" if expected != expected else f"{expected:.3f}"}
        )
    return rows


def effect(timer: str, device: str) -> Row:
    """Time a deletion at the layer: from the start of the table's rewriting to the first answer without the adapter."""
    i = make(Case(T=64, K=768, O=768, G=20, P=4, timer=timer, dtype="fp32" if device == "cpu" else "bf16"), device)
    with torch.no_grad():
        call = step(PROVIDERS["auto-fast"].build(i), i)
        if timer == "graph":
            call, _ = timing.capture(call)
        dead = torch.full_like(i.ids[:1], -1)

        def delete() -> None:
            i.ids[:1].copy_(dead)
            call()

        sync = torch.cuda.synchronize if device == "cuda" else lambda: None
        spread = timing.spread([timing.best(delete, 1, sync) * 1e6 for _ in range(21)])
    times = {name: f"{getattr(spread, name):.3f}" for name in ("p20", "p50", "p80")}
    return {"case": i.case.name, "provider": "auto-fast", **i.case.fields(), "metric": "effect", "unit": "us", **times}


def calibrate(device: str, timers: Iterable[str]) -> tuple[dict[str, Machine], list[Row]]:
    """Measure the machine's ceilings for each way of timing that is wanted; give them and their rows."""
    if device == "cuda":
        found = timing.calibrate_cuda()
        graph = timing.machine(device, found)
        # A call from the host costs what the host needs to launch it.
        machines = {"graph": graph, "eager": graph._replace(launch=found["launch_eager"], start=0.0)}
        return machines, _ceilings("graph", found)
    machines, rows = {}, []
    for timer in timers:
        found = timing.calibrate_cpu(threads(timer))
        machines[timer] = timing.machine(device, found)
        rows += _ceilings(timer, found)
    return machines, rows


def _ceilings(timer: str, found: dict[str, float]) -> list[Row]:
    rows: list[Row] = []
    for name, value in found.items():
        unit, factor = ("us", 1e6) if name.startswith("launch") else ("GB/s", 1e-9)
        if name.startswith(("product", "loop")):
            unit = "Gop/s"
        figure = f"{value * factor:.3f}"
        rows.append({"case": f"calibration-{timer}", "provider": name, "timer": timer, "metric": "ceiling"})
        rows[-1] |= {"p50": figure, "unit": unit}
    return rows
