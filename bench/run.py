"""Time the layer: ``python -m bench.run --quick`` for a first look, ``--set cpu`` or ``--set cuda`` for everything.

Every provider's result is checked before it is timed. Rows are appended to ``results/<device>.csv``, those of --quick
only where --out is given. Exit status: 0 done, 1 a provider was wrong or failed (it has no row), 3 the device broke and
nothing more can be measured in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from bench import report
from bench.cases import SETS, TIMERS, Case
from bench.machine import describe, device_name
from bench.measure import Broken, Log, Row, calibrate, effect, measure
from bench.providers import BASELINES, BROKEN, OURS, PROVIDERS, Provider
from bench.roofline import H100, table
from bench.rows import RESULTS, append

NO_ROWS = "no rows written: --out DIR writes them, and without --quick they go to bench/results"
PREDICTION = "# prediction, not measurement: bench/roofline.py with 3.0 TB/s copy, 790 TFLOP/s bf16, 2 us a launch"


def chosen(names: list[str], skip: str, quick: bool, device: str) -> list[Provider]:
    """Resolve names of providers; ``ours`` and ``baselines`` stand for many, none for all that the device lists.

    Raises:
        ValueError: a name that no provider has.
    """
    picked: list[str] = []
    listed = [n for n, p in PROVIDERS.items() if device in p.listed and not (quick and n.startswith("compile"))]
    groups = {name: [n for n in listed if n in group] for name, group in (("ours", OURS), ("baselines", BASELINES))}
    for name in names or listed:
        group = groups.get(name, [name])
        picked += [n for n in group if n not in picked]
    for name in picked:
        if name not in PROVIDERS:
            raise ValueError(f"--providers: expected ours, baselines or some of {sorted(PROVIDERS)}, got {name!r}")
    return [PROVIDERS[n] for n in picked if not (skip and re.search(skip, n))]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="eight cases, under a minute on two cores; no rows are written")
    p.add_argument("--device", choices=tuple(TIMERS), default=os.environ.get("S3T_BENCH_DEVICE") or None)
    p.add_argument("--set", choices=tuple(SETS), help="which cases; default: those of the device")
    p.add_argument("--only", default="", metavar="REGEX", help="only cases whose name it is found in")
    p.add_argument("--start", default="", metavar="CASE", help="begin with this case of the set")
    p.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="ours, baselines, or names")
    p.add_argument("--skip", default="", metavar="REGEX", help="without these providers")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of rows; default: bench/results, with --quick none")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after so many; cases are in order of importance")
    p.add_argument("--case-seconds", type=float, default=1.0, help="timing of one case, all its providers together")
    p.add_argument("--check", action="store_true", help="check results only: time nothing, write nothing")
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
        listing(cases, args.predict)
        return 0
    cases = [c for c in cases if args.check or c.timer in TIMERS[device]]
    if not cases:
        parser().error(f"no case of the set {name!r} on {device} matches {args.only!r}")
    if args.start:
        found = [at for at, c in enumerate(cases) if c.name == args.start]
        if not found:
            parser().error(f"--start: expected a case of the set {name!r} on {device}, got {args.start!r}")
        cases = cases[found[0] :]
    try:
        providers = chosen(args.providers, args.skip, args.quick, device)
    except ValueError as error:
        parser().error(str(error))
    # A stream of its own: graphs are captured on it, and backward passes run where their forward did.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with stream:
        return run(cases, device, providers, args, start)


def listing(cases: Iterable[Case], predict: bool) -> None:
    """Print the cases, or their roofline."""
    rows: list[Row] = table(tuple(cases), H100) if predict else [{"case": c.name} for c in cases]
    writer = csv.DictWriter(sys.stdout, rows[0] if rows else ["case"], lineterminator="\n")
    try:
        if predict:
            print(PREDICTION)
        writer.writeheader()
        writer.writerows(rows)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is still buffered must go somewhere when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(cases: list[Case], device: str, providers: list[Provider], args: argparse.Namespace, start: float) -> int:
    """Calibrate, then measure case after case while time is left; append rows as they come."""
    common = describe(device)
    folder = args.out or (None if args.quick else RESULTS)  # a first look is no measurement that should stand
    path = folder / f"{device_name(device)}.csv" if folder else None
    machines = {c.timer: H100 for c in cases}
    log, done, status = Log(), [], 0
    if not args.check:
        machines, rows = calibrate(device, dict.fromkeys(c.timer for c in cases))
        print(report.ceilings(rows), flush=True)
        if not BROKEN and any(p.name in OURS for p in providers):
            for timer in machines:
                try:
                    rows.append(effect(timer, device))
                except Exception as error:  # what breaks here breaks its cases too, where it is told apart
                    log.fail(f"time of a deletion ({timer}): {type(error).__name__}: {error}")
        if path:
            append(path, [row | common for row in rows])
    if BROKEN:
        log.fail(f"anything of ours: {BROKEN}")
    for at, case in enumerate(cases):
        left = args.seconds - (time.monotonic() - start)
        if left <= 0:
            print(f"out of time: {len(cases) - at} of {len(cases)} cases not measured, from {case.name}")
            break
        seconds = 0.0 if args.check else min(args.case_seconds, left / 2)
        try:
            rows = measure(case, device, providers, machines[case.timer], seconds, log)
        except Broken as error:
            print(f"device broken by {error}", flush=True)
            status = 3
            break
        if rows and path:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            append(path, [row | common | {"utc": now} for row in rows])
        done += rows
        print(f"{at + 1}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
    if args.check:
        print(f"checked {len(cases)} cases")
    else:
        print(report.ratios(done))
        print(f"rows appended to {path}; goals and figures: python -m bench.plot {path}" if path else NO_ROWS)
    print(log)
    return status or int(bool(log.failures))


if __name__ == "__main__":
    sys.exit(main())
