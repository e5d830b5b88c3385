"""What is shown while nodes train."""

from __future__ import annotations

import io

from s3t_ext.system.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_table_of_nodes_that_is_rewritten() -> None:
    out = Terminal()
    bar = Progress(10, out=out, nodes={2: 4, 1: 2})
    bar.finish(1, 2)
    bar.advance(10, "depth 2", 2, 0.5)
    first, second = out.getvalue().split("\x1b[3A")
    assert first.count("\n") == second.count("\n") == 3, "a bar and a line a depth, then over them again"
    assert "depth  1  [########################] 2/2 nodes\n" in second
    assert "depth  2  [........................] 0/4 nodes  loss  0.500\n" in second
    assert "10/10" in second


def test_a_log_has_a_line_at_a_time_and_no_table() -> None:
    out = io.StringIO()
    bar = Progress(4, out=out, nodes={1: 2})
    bar.advance(2, "early", 1, 0.5)
    bar.finish(1, 2)
    bar.advance(2, "late", 1, 0.25)
    assert out.getvalue() == f"[{'#' * 24}] 4/4  late  ETA    0 s\n"


def test_nothing_is_shown_where_nothing_is_wanted() -> None:
    out = Terminal()
    bar = Progress(1, False, out, {1: 1})
    bar.advance(1, "all")
    bar.finish(1, 1)
    assert out.getvalue() == ""
