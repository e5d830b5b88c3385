"""``s3t audit``: membership inference against a retrained oracle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from s3t_ext.cli.delete import subjects_in
from s3t_ext.cli.store import opened
from s3t_ext.system.wording import counted


def add(parser: argparse.ArgumentParser) -> None:
    """Add the store, the tables, who is deleted in the rehearsal, and how much is trained."""
    parser.add_argument("store", metavar="STORE", help="it is only read")
    parser.add_argument(
        "table",
        metavar="TABLE",
        nargs="+",
        help="the raw table of each generation; deleted subjects may still be in it",
    )
    parser.add_argument(
        "--nonmembers", metavar="TABLE", help="records the store never held (default: people held out of TABLE)"
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--subjects", metavar="FILE", help="whom the rehearsal deletes, one a line")
    who.add_argument("--sample", type=int, default=100, metavar="N", help="or how many people to draw (default 100)")
    parser.add_argument(
        "--canaries",
        default="40",
        metavar="K",
        help="mislabelled records to plant (default 40); 'memorised' or 'memorised:K': of three times as many those "
        "that are memorised most, on average a stronger control, for one training more. Without --nonmembers people "
        "with 2 K records (memorised: 6 K, where the table has so many to spare) and the sample's are held out, half "
        "of the table at most",
    )
    parser.add_argument(
        "--references",
        type=int,
        default=4,
        metavar="K",
        help="reference models, an even number (default 4); each is a chain of nodes a shard, trained on the table",
    )
    parser.add_argument(
        "--isolation",
        type=int,
        default=2,
        metavar="N",
        help="slices to remove or change (default 2); each trains every live node of the store again",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Audit; status 1 on any difference, 2 where the attack has no power."""
    opened(args.store, *args.table, args.nonmembers)
    asked = subjects_in(Path(args.subjects).read_bytes()) if args.subjects else None

    from s3t_ext.system.audit import audit

    report = audit(
        args.store,
        args.table,
        nonmembers=args.nonmembers,
        subjects=asked,
        sample=args.sample,
        canaries=args.canaries,
        references=args.references,
        isolation=args.isolation,
        seed=args.seed,
        progress=not args.json,
    )
    status = 1 if report["differing"] else 0 if report["power"] else 2
    return status, report, _text(report)


def _text(report: dict[str, Any]) -> str:
    from s3t_ext.system.audit import POWER

    depths = report["depths"]
    models = {"before": "before", "served": "after", "oracle": "oracle", "retrained": "retrained"}
    lines = [
        f"AUC +- SE and TPR at 1% FPR; rehearsal served at depths {depths['before']}, {depths['after']} after deletion",
        f"{'members':<10}{'attack':<12}{''.join(f'{name:>21}' for name in models.values())}   after less oracle, less "
        "retrained (bound)",
    ]
    for name, group in report["groups"].items():
        for attack, row in group["attacks"].items():
            cells = "".join(f"{_cell(row.get(model)):>21}" for model in models)
            lines.append(f"{name:<10}{attack:<12}{cells}   {_gap(row['oracle'])}, {_gap(row['retrained'])}")
    lines += [
        f"{name}: {counted(group['members'], 'member')}, {counted(group['others'], 'other')}"
        for name, group in report["groups"].items()
    ]
    if report["candidates"]:
        lines.append(f"canaries: the most memorised of {report['candidates']} candidates")
    lines += [f"{name}: left out: {why}" for name, why in report["left_out"].items()]
    for row in report["isolation"]:
        lines.append(
            f"isolation: shard {row['shard']}, slice {row['slice']} {row['change']}: {len(row['differing'])} of "
            f"{counted(row['nodes'], 'node')} that never saw it moved; "
            f"one that saw it {'moved' if row['moved'] else 'did not'}"
            + (f"; {row['incomparable']} cannot be compared here" if row["incomparable"] else "")
        )
    if not report["power"]:
        lines.append(
            f"the attack has no power here, nothing follows: the canaries' AUC before deletion is "
            f"{max(report['control'].values()):.3f}, {POWER:.2f} is needed, or no node that saw a slice moved with it"
        )
    lines += [f"told, not judged: {line}" for line in report["told"]]
    lines += [f"differs: {line}" for line in report["differing"]] or ["nothing differs"]
    return "\n".join(lines)


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['auc']:.3f}+-{found['se']:.3f} {found['tpr']:.3f}" if found else ""


def _gap(found: dict[str, float]) -> str:
    return f"{found['difference']:+.3f} ({found['bound']:.3f}{'' if found['within'] else ', outside'})"
