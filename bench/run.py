"""Time the layer: ``python -m bench.run --quick`` for a first look, ``--set cpu`` or ``--set cuda`` for everything.

Every provider's result is checked before it is timed. Rows are appended to ``results/<device>.csv``. Exit status: 0
done, 1 a provider was wrong or failed (it has no row), 3 the device broke and nothing more can be measured in this
process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bench import report, timing
from bench.cases import SETS, TIMERS, Case
from bench.machine import describe, device_name, threads
from bench.providers import BASELINES, OURS, PROVIDERS, Cannot, Provider, results, step
from bench.roofline import H100, Machine, floor, predict, table
from bench.truth import TYPES, Results, make, plain, wrong

RESULTS = Path(__file__).parent / "results"
SHAPE = ("T", "K", "O", "r", "N", "live", "G", "P", "dtype", "step", "timer")
COLUMNS = (
    *("case", "provider", *SHAPE, "mode", "metric", "p20", "p50", "p80", "unit", "repeats", "predicted", "floor"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
Row = dict[str, object]


class Broken(Exception):
    """The device no longer answers; the message names the provider and the case."""


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file of rows, which is made with its header if it is not there.

    Raises:
        ValueError: the file has another header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    if not fresh:
        with path.open(newline="") as lines:
            header = next(csv.reader(lines))
        if header != list(COLUMNS):
            raise ValueError(f"{path}: expected the columns {list(COLUMNS)}, got {header}; move the file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def ready(
    case: Case, device: str, providers: Iterable[Provider], failures: list[str]
) -> Iterator[tuple[Provider, Callable[[], object]]]:
    """Build and check every provider of a case; give the callables of those that are right."""
    i = make(case, device)
    truth: dict[bool, tuple[Results, Results]] = {}
    for provider in providers:
        adapters = provider.name != "bare"
        if adapters not in truth:
            truth[adapters] = plain(i, TYPES[case.dtype], adapters), plain(i, torch.float64, adapters)
        try:
            built = provider.build(i)
            fault = wrong(results(built, i), *truth[adapters], i)
        except Cannot:
            continue
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _alive(device, provider, case)
        if fault:
            failures.append(f"{provider.name} on {case.name}: {fault}")
            print(f"NOT TIMED: {failures[-1]}", file=sys.stderr, flush=True)
        else:
            yield provider, step(built, i)


def _alive(device: str, provider: Provider, case: Case) -> None:
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Broken(f"{provider.name} on {case.name}: {str(error).splitlines()[0]}") from error


def measure(
    case: Case, device: str, providers: list[Provider], machine: Machine, seconds: float, failures: list[str]
) -> list[Row]:
    """Check and time one case; give one row for each provider that is right."""
    if device == "cpu":
        torch.set_num_threads(threads(case.timer))
    flush = None
    if case.timer == "graph":
        flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device=device)
    with torch.set_grad_enabled(case.step != "fwd"):
        found = list(ready(case, device, providers, failures))
        calls = {provider.name: call for provider, call in found}
        spreads = timing.take(calls, case.timer, seconds, flush) if calls else {}
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


def calibrate(device: str, timers: Iterable[str]) -> tuple[dict[str, Machine], list[Row]]:
    """Measure the ceilings, for each way of timing that the cases need."""
    machines: dict[str, Machine] = {}
    rows: list[Row] = []
    for timer in timers:
        found = timing.calibrate_cuda() if device == "cuda" else timing.calibrate_cpu(threads(timer))
        machines[timer] = timing.machine(device, found)
        for name, value in found.items():
            unit, factor = ("us", 1e6) if name.startswith("launch") else ("GB/s", 1e-9)
            if name.startswith(("product", "fma")):
                unit = "Gop/s"
            rows.append({"case": f"calibration-{timer}", "provider": name, "timer": timer, "metric": "ceiling"})
            rows[-1] |= {"p50": f"{value * factor:.3f}", "unit": unit}
        if device == "cuda":
            # A call from the host costs what the host needs to launch it; the rest is the device's.
            machines["eager"] = machines[timer]._replace(launch=found["launch_eager"])
            machines["graph"] = machines[timer]
            break
    return machines, rows


def chosen(names: list[str], skip: str, quick: bool) -> list[Provider]:
    """Resolve names of providers; ``ours`` and ``baselines`` stand for many.

    Raises:
        ValueError: a name that no provider has.
    """
    picked = []
    for name in names or [n for n, p in PROVIDERS.items() if p.listed and not (quick and n == "compile")]:
        group = {"ours": [n for n in OURS if PROVIDERS[n].listed], "baselines": BASELINES}.get(name, [name])
        picked += [n for n in group if n not in picked]
    for name in picked:
        if name not in PROVIDERS:
            raise ValueError(f"--providers: expected ours, baselines or some of {sorted(PROVIDERS)}, got {name!r}")
    return [PROVIDERS[n] for n in picked if not (skip and re.search(skip, n))]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="eight cases, under two minutes on two cores")
    p.add_argument("--device", choices=tuple(TIMERS), default=os.environ.get("S3T_BENCH_DEVICE") or None)
    p.add_argument("--set", choices=tuple(SETS), help="which cases; default: those of the device")
    p.add_argument("--only", default="", metavar="REGEX", help="only cases whose name it is found in")
    p.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="ours, baselines, or names")
    p.add_argument("--skip", default="", metavar="REGEX", help="without these providers")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after so many; cases are in order of importance")
    p.add_argument("--case-seconds", type=float, default=1.5, help="timing of one case, all its providers together")
    p.add_argument("--cases", action="store_true", help="list the cases and stop")
    p.add_argument("--predict", action="store_true", help="print the roofline of the GPU cases on an H100 and stop")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    start = time.monotonic()
    device = args.device or ("cuda" if torch.cuda.is_available() and not args.quick else "cpu")
    name = args.set or ("quick" if args.quick else "cuda" if args.predict else device)
    cases = [c for c in SETS[name] if re.search(args.only, c.name)]
    if args.predict or args.cases:
        rows = table(tuple(cases), H100) if args.predict else [{"case": c.name} for c in cases]
        writer = csv.DictWriter(sys.stdout, rows[0])
        if args.predict:
            print(
                "# prediction, not measurement: bench/roofline.py with 3.0 TB/s copy, 790 TFLOP/s bf16, 2 us a launch"
            )
        writer.writeheader()
        writer.writerows(rows)
        return 0
    cases = [c for c in cases if c.timer in TIMERS[device]]
    try:
        providers = chosen(args.providers, args.skip, args.quick)
    except ValueError as error:
        parser().error(str(error))
    if not cases:
        parser().error(f"no case of the set {name!r} on {device} matches {args.only!r}")
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with stream:
        return run(cases, device, providers, args, start)


def run(cases: list[Case], device: str, providers: list[Provider], args: argparse.Namespace, start: float) -> int:
    """Calibrate, then measure case after case while time is left; append rows as they come."""
    common = describe(device)
    path = args.out / f"{device_name(device)}.csv"
    machines, rows = calibrate(device, dict.fromkeys(c.timer for c in cases))
    append(path, [row | common for row in rows])
    print(report.ceilings(rows), flush=True)
    done: list[Row] = []
    failures: list[str] = []
    status = 0
    for at, case in enumerate(cases):
        left = args.seconds - (time.monotonic() - start)
        if left <= 0:
            print(
                f"out of time: {len(cases) - at} of {len(cases)} cases not measured, from {case.name} on",
                file=sys.stderr,
            )
            break
        seconds = min(args.case_seconds, left / 2)
        try:
            rows = measure(case, device, providers, machines[case.timer], seconds, failures)
        except Broken as error:
            print(f"device broken by {error}", file=sys.stderr)
            status = 3
            break
        append(path, [row | common | {"utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} for row in rows])
        done += rows
        print(f"{at + 1}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
    print(report.ratios(done))
    print(f"rows appended to {path}; goals and figures: python -m bench.plot")
    for failure in failures:
        print(f"NOT TIMED: {failure}")
    return status or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
