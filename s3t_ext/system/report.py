"""A store's state as a Markdown page with figures, for people; registered in the ledger as any copy is.

What it tells of records is an aggregate over them: receipts of people in these slices name the page (rule 10).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.plan import StageTree
from s3t_ext.store.beside import new_folder
from s3t_ext.store.files import StoreError, destroy_tree, system_errors
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.status import status
from s3t_ext.system.wording import counted
from s3t_ext.system.wording import told as told_of

if TYPE_CHECKING:
    from s3t_ext.system.data.tables import Table

PAGE = "report.md"


def report(path: Path | str, dest: Path | str, evaluation: Table | Path | str | None = None) -> dict[str, Any]:
    """Write ``report.md`` and its figures to a new folder.

    Args:
        path: of the store.
        evaluation: a declared evaluation part: how good the answers are, as served and at each depth.

    Returns:
        report (its folder), and all that it shows.

    Raises:
        ValueError: the destination exists or lies in the store.
        StoreError, LedgerError: the store cannot be read or the folder not be written.
    """
    path = Path(path).absolute()
    dest = new_folder(dest, path)
    with StoreFolder(path) as folder:
        slices = folder.ledger.slices()
        clean = [cell for cell, digest in slices.items() if digest is not None]
        folder.ledger.export(dest.name, "report", folder.trained(slices).values(), clean)
        told = status(path)
        told |= {"task": folder.schema.task, "nodes_by_depth": _by_depth(folder), "history": _history(folder)}
        if evaluation is not None:
            told["quality"] = _quality(path, folder.tree, evaluation)
        if folder.ledger.slices() != slices:
            raise StoreError("a request or a healing came in meanwhile: nothing was written; ask again")
    with system_errors("write", dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".part", dir=dest.parent))
        try:
            figures = _draw(part, told)
            (part / PAGE).write_text(_page(path.name, told, figures), encoding="utf-8")
            os.rename(part, dest)
        finally:
            if part.exists():
                destroy_tree(part)
                part.rmdir()
    return {"report": str(dest / PAGE), **told}


def _by_depth(folder: StoreFolder) -> list[dict[str, int]]:
    """Count, for each depth, the nodes that are planned, live and trained."""
    slices = folder.ledger.slices()
    live, trained = folder.identities(slices), folder.trained(slices)
    planned = list(folder.plan_nodes(slices))

    def count(nodes: Iterable[tuple[int, tuple[int, ...]]], depth: int) -> int:
        return sum(len(path) == depth for _, path in nodes)

    depths = range(1, folder.tree.depth + 1)
    return [{"depth": d, **{n: count(s, d) for n, s in _named(planned, live, trained).items()}} for d in depths]


def _named(planned, live, trained) -> Mapping[str, Iterable[tuple[int, tuple[int, ...]]]]:
    return {"planned": planned, "live": live, "trained": trained}


def _history(folder: StoreFolder) -> list[dict[str, Any]]:
    """List the requests: when, state, and the depths of the shards that they hit."""
    found = []
    for request in folder.ledger.requests():
        receipt = folder.ledger.receipt(request.request_id) or {"shards": []}
        hit = {shard["shard"]: (shard["depth_before"], shard["depth_after"]) for shard in receipt["shards"]}
        found.append({"time": request.time, "state": request.state, "deadline": request.deadline, "shards": hit})
    return found


def _quality(path: Path, tree: StageTree, evaluation: Table | Path | str) -> list[dict[str, Any]]:
    """Evaluate what is served, and what would be if no node were deeper than 1, 2, ..."""
    from s3t_ext.system.data.tables import as_table
    from s3t_ext.system.evaluate import evaluate
    from s3t_ext.system.serve import Refused, Service

    rows: list[dict[str, Any]] = []
    for depth in range(1, tree.depth + 1):
        shallow = StageTree.from_sequences(tree.slices, [sequence[:depth] for sequence in tree.sequences])
        with Service(path, tree=shallow) as service:
            table = as_table(evaluation, service.folder.schema, service.folder.base)
            try:
                rows.append({"depth": depth, "depths": list(service.depths), **evaluate(service, table)})
            except Refused:
                break
    return rows


# --- the page --------------------------------------------------------------------------------------------------------


def _page(name: str, told: Mapping[str, Any], figures: Sequence[str]) -> str:
    nodes = told["nodes"]
    parts = [
        f"# {name}",
        f"{counted(told['shards'], 'shard')} of {counted(told['slices'], 'slice')}, strategy `{told['strategy']}`, "
        f"placement `{told['placement']}`, task {told['task']}. Mean depth {_mean(told['depths']):.2f}; "
        f"to heal: {counted(len(told['dirty']), 'slice')}; to train: {nodes['missing']} of "
        f"{counted(nodes['live'], 'live node')}.",
        _table(["shard", "depth"], [[shard, depth] for shard, depth in enumerate(told["depths"])]),
        "## Nodes",
        _table(list(told["nodes_by_depth"][0]), [list(row.values()) for row in told["nodes_by_depth"]]),
    ]
    if told.get("quality"):
        scores = _scores(told["quality"])
        parts += [
            "## Answers on the evaluation part",
            "The last line is what is served; the others, what would be if no node were deeper.",
            _table(["at most", *scores], [[r["depth"], *v] for r, v in zip(told["quality"], zip(*scores.values()))]),
        ]
    parts.append("## Requests")
    rows = [[r["time"], r["state"], r["deadline"] or "", _change(r["shards"])] for r in told["history"]]
    parts.append(_table(["time", "state", "to erase by", "depth of shards"], rows) if rows else "None so far.")
    if told["overdue"]:
        parts.append(f"**Past their deadline and not erased: {', '.join(told['overdue'])}.**")
    parts += told_of(told)
    parts += [f"![{figure}]({figure})" for figure in figures]
    return "\n\n".join(parts) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _change(shards: Mapping[int, tuple[int, int]]) -> str:
    return ", ".join(f"{shard}: {before} to {after}" for shard, (before, after) in shards.items()) or "none changed"


def _scores(quality: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Give the columns of what was evaluated."""
    if "accuracy" in quality[0]:
        return {"accuracy": [f"{row['accuracy']:.4f}" for row in quality]}
    if "nats" in quality[0]:
        return {"nats a token": [f"{row['nats']:.4f}" for row in quality]}
    return {f"error of {name}": [f"{row['rmse'][name]:.6g}" for row in quality] for name in quality[0]["rmse"]}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _draw(folder: Path, told: Mapping[str, Any]) -> list[str]:
    """Draw depths, and answers by depth; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(told["depths"])), told["depths"])
    left.set(xlabel="shard", ylabel="depth that serves", ylim=(0, told["slices"]))
    left.locator_params(integer=True)
    for i, name in enumerate(("planned", "live", "trained")):
        places = [row["depth"] + 0.28 * (i - 1) for row in told["nodes_by_depth"]]
        right.bar(places, [row[name] for row in told["nodes_by_depth"]], width=0.28, label=name)
    right.set(xlabel="depth", ylabel="nodes")
    right.locator_params(integer=True)
    right.legend()
    figure.savefig(folder / "depths.png", dpi=120)
    names = ["depths.png"]
    if told.get("quality"):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, values in _scores(told["quality"]).items():
            axes.plot([r["depth"] for r in told["quality"]], [float(v) for v in values], marker="o", label=name)
        axes.set(xlabel="no node deeper than")
        axes.locator_params("x", integer=True)
        axes.legend()
        figure.savefig(folder / "answers.png", dpi=120)
        names.append("answers.png")
    return names
