"""README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_fifteen_lines(capsys) -> None:
    (code,) = re.findall(r"## Fifteen lines\n\n```python\n(.*?)```", README.read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README.md", "exec"), {})
    labels, depth, mismatched = capsys.readouterr().out.splitlines()
    assert len(labels.split(",")) == 5
    assert int(depth) < 3
    assert mismatched == "0"


def test_every_command_is_named() -> None:
    from s3t_ext.cli.main import COMMANDS

    text = README.read_text()
    assert all(f"s3t {name}" in text for name in COMMANDS)
