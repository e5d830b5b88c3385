from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import plain
import pytest
import tiny as tiny_system
from histories import History


@pytest.fixture(params=["mlp", "vit"])
def tiny(request, tmp_path) -> tiny_system.Tiny:
    return tiny_system.make(tmp_path, request.param)


@pytest.fixture
def mlp(tmp_path) -> tiny_system.Tiny:
    return tiny_system.make(tmp_path)


@pytest.fixture
def store(mlp, tmp_path) -> Path:
    return mlp.fit(tmp_path / "store")


@pytest.fixture
def ram(tmp_path) -> Iterator[Path]:
    """Give a folder in memory where the machine has one: for many small stores whose durability is not the question."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> plain.World:
    return plain.make(tmp_path_factory.mktemp("template") / "store")


@pytest.fixture
def history(template, ram) -> History:
    (ram / "aside").mkdir()
    return History(template.copy(ram / "at"), ram / "aside")
