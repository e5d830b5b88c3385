"""Figures of plans, drawn on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s3t_ext.plan import StageTree, expected_depth
from s3t_ext.plan.theory import survival

POINTS = 30  # of a line of depths, which are sampled where a shard has many slices


def draw_plans(path: str, trees: Mapping[str, StageTree], **options: Any) -> None:
    """Draw the expected depth of a shard and the chance that it is alive, by hits on it, a line for each strategy.

    Args:
        path: the file to write; its ending names the format.
        trees: by strategy, of equal numbers of slices.
        options: prior, samples and seed, as of ``expected_depth``.
    """
    figure = _figure()
    depth, alive = figure.subplots(1, 2)
    last = 3 * max(tree.slices for tree in trees.values())
    hits = range(0, last + 1, max(1, last // POINTS))
    for name, tree in sorted(trees.items(), key=lambda item: item[1].slice_passes):
        label = f"{name} ({tree.slice_passes} passes)"
        depth.plot(hits, [expected_depth(tree, r, **options).mean for r in hits], label=label)
        alive.plot(range(last + 1), survival(tree, last, options.get("prior")), label=label)
    depth.set(xlabel="hits on a shard", ylabel="expected depth", ylim=(0, None))
    alive.set(xlabel="hits on a shard", ylabel="chance of a live node", ylim=(0, None))
    depth.legend()
    _save(figure, path)


def draw_deaths(path: str, times: Mapping[str, Sequence[int]], repeats: int, exact: Mapping[str, float | None]) -> None:
    """Draw, for every stopping rule, the share of simulated systems still going after so many requests.

    Args:
        path: as above.
        times: requests to the stop of each repetition that reached it, by rule.
        repeats: all repetitions: a line ends at the share of those that did not reach it.
        exact: the expected number where a closed form has it, drawn as a dotted line.
    """
    figure = _figure()
    axes = figure.subplots()
    for rule, values in times.items():
        left = [1 - i / repeats for i in range(len(values) + 1)]
        (line,) = axes.step([0, *sorted(values)], left, where="post", label=rule)
        if exact.get(rule) is not None:
            axes.axvline(exact[rule], color=line.get_color(), linestyle=":")
    axes.set(xlabel="requests", ylabel="share of systems not there yet", ylim=(0, 1.02), xlim=(0, None))
    axes.legend()
    _save(figure, path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # and no window system
    except ImportError:
        raise ValueError("--figure: expected matplotlib to be installed; pip install 's3t_ext[demo]'") from None
    return Figure(figsize=(9, 3.7), layout="constrained")


def _save(figure: Any, path: str) -> None:
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ValueError(f"--figure: {error}") from None
