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
        requests = ", ".join(given["requests"])
        if given["time"] is None:
            lines.append(
                f"slice {name} was given up before, file {given['file']}, for requests alone ({requests}), which are "
                f"not certified until it is back and healed; `s3t erase STORE --lost {name}` once more puts it on "
                "record for all that is in it"
            )
            continue
        asked = f" ({requests})" if requests else ""
        lines.append(
            f"slice {name} was given up at {given['time']}, file {given['file']}: what "
            f"{counted(given['subjects'], 'subject')} had in it is in no answer, as if deleted; but no request that is "
            f"erased without a look into it{asked} is certified until it is back and healed"
        )
    return lines
