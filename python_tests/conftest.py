"""Shared settings: the helper modules of the suite are importable, and skips are counted by pytest's summary (-ra)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE / "lora"):
    sys.path.insert(0, str(folder))
