"""``s3t plan``: the cost and the life of a plan, before any training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from s3t_ext.cli.figure import draw_plans
from s3t_ext.plan import STRATEGIES, StageTree, build, check_prior, prior_of, read_history
from s3t_ext.plan.strategies import BUDGETED, SUBSETS_USUAL, WEIGHED, usual
from s3t_ext.system.wording import counted

REQUESTS = (1, 2, 3, 4, 6, 8)
REPEATS = 20_000
STOPS = ("first", "half", "last")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the plan's arguments."""
    add_plan(parser)
    parser.add_argument("--floor", type=float, help="a depth: also how many requests until the expected depth is below")
    parser.add_argument("--rank", type=int, help="of the adapters, for their bytes (default 8)")
    parser.add_argument("--layers", type=int, help="adapted layers of the model, for the adapters' bytes")
    parser.add_argument("--widths", help="of the linear maps of a layer, as 768x2304,768x768: inputs x outputs")
    parser.add_argument("--placement", help="stack (default) or layers, for their bytes")
    parser.add_argument("--item-size", type=int, help="bytes of a number (default 4)")
    parser.add_argument("--figure", metavar="FILE", help="draw the expected depth of every strategy")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add what names a plan and a prior, for this command and ``s3t simulate``."""
    parser.add_argument("--shards", type=int, default=5, help="m (default 5)")
    parser.add_argument("--slices", type=int, default=4, help="L, slices of a shard (default 4)")
    names = ", ".join(STRATEGIES)
    parser.add_argument(
        "--strategy",
        help=f"one of {names} (default subsets to {SUBSETS_USUAL} slices, above rotation), or a tree's FILE",
    )
    parser.add_argument(
        "--budget",
        type=int,
        help="bounds what each shard trains: of rotation, bms, conditional and random the number of its sequences, 1 "
        "to L! (default L); of greedy its slice-passes, a node at depth i costs i (default: as rotation); others "
        "take none",
    )
    parser.add_argument("--prior", help="probability that a request hits each slice of its shard, as 0.4,0.3,0.2,0.1")
    parser.add_argument(
        "--history", metavar="FILE", help="a prior from declared requests, a line `shard slice` for each"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"of what is sampled (default {REPEATS})")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled (default 0)")


def plan_of(args: argparse.Namespace) -> tuple[str, StageTree, tuple[float, ...] | None]:
    """Make the plan and the prior that the arguments name: strategy, tree, prior (None: uniform)."""
    for name in ("shards", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    prior = _prior(args)
    strategy = args.strategy or usual(args.slices, args.budget)
    if strategy not in STRATEGIES and (strategy.endswith(".json") or Path(strategy).is_file()):
        if args.budget is not None:
            raise ValueError(f"--budget: expected none beside a tree of one's own, got {args.budget}")
        tree = StageTree.read(strategy)
        if tree.slices != args.slices:
            raise ValueError(f"--slices: {strategy} has {tree.slices}, got {args.slices}")
        return strategy, tree, prior
    reads = prior if strategy in WEIGHED else None
    return strategy, build(strategy, args.slices, args.budget, prior=reads, seed=args.seed), prior


def _prior(args: argparse.Namespace) -> tuple[float, ...] | None:
    if args.prior is not None and args.history is not None:
        raise ValueError("--prior, --history: expected one of them, got both")
    if args.history is not None:
        return prior_of(read_history(args.history), args.slices)
    if args.prior is None:
        return None
    try:
        return check_prior(args.slices, [float(word) for word in args.prior.split(",")])
    except ValueError as error:
        raise ValueError(f"--prior: {str(error).removeprefix('prior: ')}") from None


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Report the plan and, beside it, every other strategy of equal budget."""
    from s3t_ext.plan.compare import beside, describe
    from s3t_ext.plan.cost import memory

    model = _model(args)
    if args.floor is not None and not 0 < args.floor <= args.slices:
        raise ValueError(f"--floor: expected a depth above 0 and up to {args.slices}, got {args.floor}")
    strategy, tree, prior = plan_of(args)
    sequences = len(tree.sequences) if strategy in BUDGETED else None
    others = beside(tree, sequences, prior=prior, seed=args.seed)
    trees = {strategy: tree, **{name: other for name, other in others.items() if name != strategy}}
    reports: dict[str, dict[str, Any]] = {}
    for name, each in trees.items():
        reports[name] = describe(
            each, args.shards, prior=prior, requests=REQUESTS, floor=args.floor, samples=args.repeats, seed=args.seed
        )
        if model:
            reports[name]["memory"] = memory(each, args.shards, **model)._asdict()
    text = _text(args, reports, prior)
    report = {
        "strategy": strategy,
        "budget": args.budget,
        "prior": prior,
        "repeats": args.repeats,
        "seed": args.seed,
        **reports.pop(strategy),
        "beside": reports,
        "left_out": [name for name in STRATEGIES if name not in trees],
    }
    report["tree"] = tree.to_json()
    if args.figure:
        draw_plans(args.figure, trees, prior=prior, samples=args.repeats, seed=args.seed)
        report["figure"] = args.figure
        text += f"\ndrew {args.figure}"
    return 0, report, text


def _model(args: argparse.Namespace) -> dict[str, Any]:
    """Read the shapes that the adapters' bytes follow from; empty where none are given."""
    options = {name: getattr(args, name) for name in ("rank", "placement", "item_size")}
    if args.layers is None and args.widths is None:
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected it beside --layers and --widths alone")
        return {}
    try:
        widths = [tuple(int(word) for word in pair.split("x")) for pair in args.widths.split(",")]
    except (AttributeError, ValueError):
        raise ValueError(f"--widths: expected inputs x outputs, as 768x2304,768x768, got {args.widths!r}") from None
    if args.layers is None:
        raise ValueError("--layers: expected the number of adapted layers beside --widths, got none")
    usual_ones = {"rank": 8, "placement": "stack", "item_size": 4}
    told = {name: usual_ones[name] if value is None else value for name, value in options.items()}
    return {**told, "layers": args.layers, "widths": widths}


def _text(args: argparse.Namespace, reports: dict[str, dict[str, Any]], prior: tuple[float, ...] | None) -> str:
    some = next(iter(reports.values()))
    head = f"{'strategy':<12}{'stages':>8}{'passes':>9}{'layer-p.':>11}{'sequences':>10}"
    head += "".join(f"{stop:>10}" for stop in STOPS)
    head += f"{f'depth<{args.floor:g}':>10}" if args.floor is not None else ""
    head += "".join(f"{f'r={r}':>7}" for r in REQUESTS)
    head += f"{'stored MB':>11}{'served MB':>11}" if "memory" in some else ""
    asked = "uniformly" if prior is None else "by the prior"
    sampled = any(se for row in reports.values() for se in row["expected_depth_se"].values())
    lines = [
        f"{counted(args.shards, 'shard')} of {counted(args.slices, 'slice')}; requests hit slices {asked}",
        "of one shard: stages, slice-passes, layer-weighted passes, sequences; r=: expected depth after r hits on it"
        + (f", sampled, {args.repeats} draws" if sampled else ""),
        "of the system: expected requests until the first shard is dead, half of them, the last",
        "",
        head,
    ]
    for name, row in sorted(reports.items(), key=lambda item: (item[1]["slice_passes"], item[0])):
        line = f"{name[-12:]:<12}{row['stages']:>8}{row['slice_passes']:>9}"
        line += f"{row['layer_passes']:>11.1f}{row['sequences']:>10}"
        line += "".join(_number(row["deletion_rate"][stop]) for stop in STOPS)
        line += _number(row["depth_floor"]) if args.floor is not None else ""
        line += "".join(f"{row['expected_depth'][str(r)]:>7.3f}" for r in REQUESTS)
        if "memory" in row:
            line += f"{row['memory']['stored'] / 1e6:>11.2f}{row['memory']['served'] / 1e6:>11.2f}"
        lines.append(line)
    if missing := [name for name in STRATEGIES if name not in reports]:
        lines.append(f"left out, too large or not to be had at this size: {', '.join(missing)}")
    if "memory" in some:
        lines.append(f"adapters of all shards beside {some['memory']['base'] / 1e6:.2f} MB of frozen layers")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'never':>10}" if value is None else f"{value:>10.1f}"
