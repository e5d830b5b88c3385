"""Progress on standard error: a bar, and on a terminal a table of the nodes by depth that lives below it."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from typing import TextIO

_WIDTH = 24  # of a bar


class Progress:
    """Show lines that are rewritten on a terminal, and a line every ten seconds elsewhere. Any thread may report.

    Args:
        total: units of work; ``enabled``: off, nothing is printed.
        nodes: how many nodes are to be trained at each depth: makes a table of them on a terminal.
    """

    def __init__(
        self, total: int, enabled: bool = True, out: TextIO | None = None, nodes: Mapping[int, int] | None = None
    ) -> None:
        self.total, self.enabled, self.done = total, enabled, 0
        self.out = out or sys.stderr
        self.start = self.last = time.monotonic()
        self.live = self.out.isatty()
        self._lock = threading.Lock()
        self._planned = dict(sorted((nodes or {}).items()))
        self._trained, self._loss = dict.fromkeys(self._planned, 0), dict.fromkeys(self._planned, math.nan)
        self._up = 0  # lines of the table that stand on the terminal

    def advance(self, units: int, text: str, depth: int = 0, loss: float = math.nan) -> None:
        """Count ``units`` as done and show them beside ``text``; ``loss``: of nodes at a depth."""
        with self._lock:
            self.done += units
            if depth in self._loss:
                self._loss[depth] = loss
            now, last = time.monotonic(), self.done >= self.total
            if self.enabled and (last or now - self.last >= (0.1 if self.live else 10)):
                self.last = now
                self._show(text)

    def finish(self, depth: int, nodes: int) -> None:
        """Count nodes of a depth as trained and stored."""
        with self._lock:
            if depth in self._trained:
                self._trained[depth] += nodes
                if self.enabled and self.live:
                    self._show("")

    def _show(self, text: str) -> None:
        elapsed = time.monotonic() - self.start
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        line = f"{_bar(self.done, self.total)} {self.done}/{self.total}  {text}  ETA {left:4.0f} s"
        if not self.live:
            self.out.write(line + "\n")
        elif self._planned:
            rows = [self._row(depth) for depth in self._planned]
            up = f"\x1b[{self._up}A" if self._up else ""
            self.out.write(up + "".join(f"\r\x1b[K{row}\n" for row in (line, *rows)))
            self._up = len(rows) + 1
        else:
            self.out.write(f"\r{line:<100}" + ("\n" if self.done >= self.total else ""))
        self.out.flush()

    def _row(self, depth: int) -> str:
        planned, trained, loss = self._planned[depth], self._trained[depth], self._loss[depth]
        told = "" if math.isnan(loss) or trained == planned else f"  loss {loss:6.3f}"
        return f"  depth {depth:2}  {_bar(trained, planned)} {trained}/{planned} nodes{told}"


def _bar(done: int, total: int) -> str:
    filled = _WIDTH * min(done, total) // max(total, 1)
    return f"[{'#' * filled}{'.' * (_WIDTH - filled)}]"
