from __future__ import annotations

from pathlib import Path

import pytest
import tiny as tiny_system


@pytest.fixture(params=["mlp", "vit"])
def tiny(request, tmp_path) -> tiny_system.Tiny:
    return tiny_system.make(tmp_path, request.param)


@pytest.fixture
def mlp(tmp_path) -> tiny_system.Tiny:
    return tiny_system.make(tmp_path)


@pytest.fixture
def store(mlp, tmp_path) -> Path:
    return mlp.fit(tmp_path / "store")
