"""Numbers with their nouns, and slices that are lost, in messages and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def counted(number: int, noun: str) -> str:
    """Give a number and its noun: 1 node, 2 nodes, 1 slice-pass, 0 slice-passes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def told(report: Mapping[str, Any]) -> list[str]:
    """Give a line for each lost slice of a report, and for each that was given up."""
    lines = [f"slice {name} is lost: {reason}" for name, reason in report["lost_slices"].items()]
    for name, given in report.get("given_up", {}).items():
        asked = f" ({', '.join(given['requests'])})" if given["requests"] else ""
        lines.append(
            f"slice {name} was given up at {given['time']}, file {given['file']}: what "
            f"{counted(given['subjects'], 'subject')} had in it is in no answer and no node, as if deleted; but nobody "
            f"looked into it, so no request on it that was erased since{asked} is certified until it is back and healed"
        )
    return lines
