"""The folders of the tiny models, made once a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[..., Path]:
    """Give the folder of a family's tiny model, of ``AutoModel`` or the ``AutoModelFor...`` of a task."""
    import tiny_models

    made: dict[tuple[str, str], Path] = {}

    def give(family: str, task: str = "") -> Path:
        if (family, task) not in made:
            made[family, task] = tiny_models.save(family, tmp_path_factory.mktemp(f"{family}{task}"), task)
        return made[family, task]

    return give
