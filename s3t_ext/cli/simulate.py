"""``s3t simulate``: how long a plan lasts under a stream of requests, by direct simulation beside the exact figures."""

from __future__ import annotations

import argparse
from typing import Any

from s3t_ext.cli.figure import draw_deaths
from s3t_ext.cli.plan import REPEATS, add_plan, plan_of
from s3t_ext.plan import read_history
from s3t_ext.plan.theory import death
from s3t_ext.system.wording import counted

HEALED = 200  # repetitions at most of a system that heals: each is an average over a long time


def add(parser: argparse.ArgumentParser) -> None:
    """Add the simulation's arguments."""
    add_plan(parser)
    parser.set_defaults(repeats=None)
    parser.add_argument("--floor", type=float, help="a mean depth of the shards: also simulate when it falls below")
    parser.add_argument("--burst", type=int, metavar="SIZE", help="so many requests in a row hit the same slice index")
    parser.add_argument("--subjects", type=int, help="subjects of a slice; nobody asks twice (default: without end)")
    parser.add_argument("--replay", metavar="FILE", help="the requests themselves, a line `shard slice` for each")
    parser.add_argument(
        "--heal", type=float, metavar="RATE", help="retrain in the background, RATE slice-passes for each request"
    )
    parser.add_argument("--figure", metavar="FILE", help="draw how many systems are left after how many requests")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Simulate the stopping rules, and beside each give the exact expectation where there is one."""
    from s3t_ext.plan.compare import finite
    from s3t_ext.plan.healing import simulate_healing
    from s3t_ext.plan.simulate import NEVER, simulate

    if args.replay and args.repeats is not None:
        raise ValueError("--repeats: expected none beside --replay, of which nothing is drawn")
    args.repeats = REPEATS if args.repeats is None else args.repeats
    strategy, tree, prior = plan_of(args)
    stream, name = _stream(args, prior)
    half = (args.shards + 1) // 2
    repeats = 1 if args.replay else args.repeats
    result = simulate(tree, args.shards, repeats=repeats, seed=args.seed, stream=stream, j=half, floor=args.floor)
    rules = {"first": 1, "half": half, "last": args.shards}
    exact: dict[str, float | None] = dict.fromkeys((*rules, "floor"))
    if not (args.burst or args.replay):
        for rule, j in rules.items():
            exact[rule] = finite(death(tree, args.shards, j, prior=prior, subjects=args.subjects).mean)
    found = result.summary()
    found["half"] = found.pop(str(half), found["first"])
    report: dict[str, Any] = {
        "strategy": strategy,
        "budget": args.budget,
        "shards": args.shards,
        "slices": args.slices,
        "prior": prior,
        "stream": name,
        "repeats": repeats,
        "seed": args.seed,
    }
    for rule in (*rules, *(["floor"] if args.floor is not None else [])):
        report[rule] = {**found[rule], "exact": exact[rule]}
    if args.heal is not None:
        healing = simulate_healing(
            tree, args.shards, args.heal, repeats=min(repeats, HEALED), seed=args.seed, stream=stream
        )
        report["healing"] = {"rate": args.heal, "repeats": min(repeats, HEALED), **healing.summary()}
    text = _text(report, args)
    if args.figure:
        stops = {**result.stops, "half": result.stops.get(str(half), result.stops["first"])}
        times = {rule: [int(time) for time in stops[rule] if time != NEVER] for rule in rules}
        draw_deaths(args.figure, times, repeats, exact)
        report["figure"] = args.figure
        text += f"\ndrew {args.figure}"
    return 0, report, text


def _stream(args: argparse.Namespace, prior: tuple[float, ...] | None) -> tuple[Any, str]:
    """Make the stream of requests that the arguments name, and say what it is."""
    from s3t_ext.plan.streams import Bursts, Finite, Independent, Replay

    given = [name for name in ("burst", "subjects", "replay") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]}, --{given[1]}: expected one of them, got both")
    if prior is not None and given in (["subjects"], ["replay"]):
        raise ValueError(f"--{given[0]}: expected no prior beside it; it says itself who asks")
    asked = "uniformly" if prior is None else "by the prior"
    if args.burst is not None:
        return Bursts(args.burst, prior), f"bursts of {args.burst} on a slice index drawn {asked}"
    if args.subjects is not None:
        return Finite(args.subjects), f"{counted(args.subjects, 'subject')} a slice, who ask once, in random order"
    if args.replay is not None:
        requests = read_history(args.replay)
        return Replay(requests), f"the {counted(len(requests), 'request')} of {args.replay}"
    return Independent(prior), f"independent, slices hit {asked}"


def _text(report: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [
        f"{report['strategy']}: {counted(args.shards, 'shard')} of {counted(args.slices, 'slice')}; "
        f"{counted(report['repeats'], 'repetition')}, seed"
        f" {args.seed}; requests: {report['stream']}",
        f"{'requests until':<28}{'mean':>11}{'+-':>10}{'exact':>11}{'5 %':>9}{'median':>9}{'95 %':>9}{'reached':>9}",
    ]
    titles = {"first": "the first shard is dead", "half": "half the shards are dead", "last": "the last shard is dead"}
    titles["floor"] = f"mean depth is below {args.floor}"
    for rule, title in titles.items():
        if rule in report:
            row = report[rule]
            quantiles = [row["quantiles"][q] for q in ("0.05", "0.5", "0.95")]
            lines.append(
                f"{title:<28}{_cell(row['mean'], 10, 2)}{_cell(row['se'], 9, 3)}{_cell(row['exact'], 10, 2)}"
                + "".join(_cell(value, 8, 0) for value in quantiles)
                + f"{row['reached']:>9}"
            )
    if "healing" in report:
        row = report["healing"]
        lines.append(
            f"retraining {row['rate']:g} slice-passes a request, in the long run: mean depth"
            f" {_percent(row['depth'], 1)}, shards alive {_percent(row['live'])}, all of them alive"
            f" {_percent(row['available'])} of the time"
        )
    return "\n".join(lines)


def _percent(value: dict[str, float | None], times: int = 100) -> str:
    unit = " %" if times == 100 else ""
    error = "" if value["se"] is None else f" +- {times * value['se']:.2f}"
    return f"{times * value['mean']:.2f}{unit}{error}" if value["mean"] is not None else "-"


def _cell(value: float | None, width: int, digits: int) -> str:
    return f" {'-':>{width}}" if value is None else f" {value:>{width}.{digits}f}"
