"""A small ledger: four slices, six subjects, one of them public as well."""

import os
import subprocess
import sys

import pytest

from s3t_ext.ledger import Holding, Ledger

CELLS = [(0, 0), (0, 1), (1, 0), (1, 1)]
SUBJECTS = [f"{index:064x}" for index in range(6)]
UNKNOWN = "f" * 64


def fill(path):
    """Create the ledger and enter its subjects, subject i in cell i mod 4."""
    ledger = Ledger.create(path, {"shards": 2, "slices": 2})
    holdings = [Holding(subject, *CELLS[index % 4]) for index, subject in enumerate(SUBJECTS)]
    public = [Holding(SUBJECTS[0], None, None, "public"), Holding("e" * 64, None, None, "evaluation")]
    ledger.ingest({cell: f"{index:x}" * 64 for index, cell in enumerate(CELLS)}, holdings + public)
    return ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    with fill(path) as ledger:
        yield ledger


@pytest.fixture
def spawn():
    """Return a function that runs code in another process, with the ledger's names imported; killed at the end."""
    children = []

    def start(code, *arguments):
        code = "import sys, itertools\nfrom s3t_ext.ledger import *\n" + code
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
