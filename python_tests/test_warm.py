"""A warm child is a process of its own: what it is given, what it has loaded, how it ends."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import warm

GIVEN = """
import os, sys
assert "torch" in sys.modules and not {name for name in sys.modules if name.startswith(("s3t_ext", "pytest"))}
assert sys.argv == ["-c", "word"] and os.environ["GIVEN"] == "a" and "PYTEST_CURRENT_TEST" not in os.environ
assert __name__ == "__main__" and os.getppid() == int(os.environ["PARENT"])
print(os.getcwd(), sys.stdin.read())
"""


def test_it_is_given_what_a_process_is_given(tmp_path) -> None:
    (tmp_path / "where").mkdir()
    env = {"GIVEN": "a", "PARENT": str(os.getpid())}
    for _ in range(2):  # nothing of one child is in the next
        done = warm.run([sys.executable, "-c", GIVEN, "word"], cwd=tmp_path / "where", env=env, input=b"in", text=True)
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'where'} in\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("raise SystemExit(3)", 3, b""),
        ("raise ValueError('so')", 1, b"ValueError: so"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, b""),
    ],
)
def test_it_ends_as_a_process_ends(code, status, says) -> None:
    done = warm.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (status, b"")
    assert says in done.stderr
