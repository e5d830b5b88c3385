"""Progress on standard error: node, shard, loss, time left."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO


class Progress:
    """Show one line that is rewritten on a terminal, and a line every ten seconds elsewhere.

    Args:
        total: units of work; ``enabled``: off, nothing is printed.
    """

    def __init__(self, total: int, enabled: bool = True, out: TextIO | None = None) -> None:
        self.total, self.enabled, self.done = total, enabled, 0
        self.out = out or sys.stderr
        self.start = self.last = time.monotonic()
        self.live = self.out.isatty()
        self._lock = threading.Lock()

    def advance(self, units: int, text: str) -> None:
        """Count ``units`` as done and show them beside ``text``."""
        with self._lock:
            self._advance(units, text)

    def _advance(self, units: int, text: str) -> None:
        self.done += units
        now = time.monotonic()
        last = self.done >= self.total
        if not self.enabled or (not last and now - self.last < (0.1 if self.live else 10)):
            return
        self.last = now
        elapsed = now - self.start
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        width = 24
        filled = width * self.done // max(self.total, 1)
        line = f"[{'#' * filled}{'.' * (width - filled)}] {self.done}/{self.total}  {text}  ETA {left:4.0f} s"
        if self.live:
            self.out.write(f"\r{line:<100}" + ("\n" if last else ""))
        else:
            self.out.write(line + "\n")
        self.out.flush()
