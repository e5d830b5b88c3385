"""What commands say of lost slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def told(report: Mapping[str, Any]) -> str:
    """Give a line for each lost slice of a report."""
    return "".join(f"\nslice {name} is lost: {reason}" for name, reason in report["lost_slices"].items())
