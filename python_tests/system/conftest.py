from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import losing
import plain
import pytest
import tiny as tiny_system
from histories import History

import s3t_ext


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


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> Path:
    """Fit a store once: tests copy it."""
    return tiny_system.make(place := tmp_path_factory.mktemp("quick")).fit(place / "store", **losing.QUICK)


@pytest.fixture
def gone(mlp) -> dict[str, str]:
    """Name somebody of the slice that will be lost, and somebody of another."""
    people = tiny_system.people_by_cell(mlp)
    return {"r-lost": people[losing.LOST][0], "r-other": people[losing.OTHER][0]}


@pytest.fixture(params=["missing", "damaged"])
def lost(request, quick, tmp_path, gone) -> Path:
    """Give a store whose slice was lost before two people were deleted; its whole records lie beside it."""
    store = losing.copy(quick, tmp_path)
    file = store / "records" / "0-0.sealed"
    shutil.copy(file, tmp_path / "whole")
    file.unlink() if request.param == "missing" else file.write_bytes(b"damaged")
    waits = "not erased yet: request r-lost: .*The records of slice 0-0: `s3t restore"
    for request, name in gone.items():
        with pytest.warns(UserWarning, match=waits) as told:
            s3t_ext.delete(store, [name], request)
        assert "r-other" not in str(told[0].message), "which is erased"
    return store
