"""Work on copies of records: in a folder beside the store that does not outlive the run, and in a fresh process."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s3t_ext.ledger import LedgerError
from s3t_ext.store.beside import sweep_beside
from s3t_ext.store.files import StoreError, destroy_tree, exclusive, system_errors
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table, as_table


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Make a folder beside the store for sealed copies of records; destroyed at the end, or when found after a kill."""
    places = path, Path(tempfile.gettempdir()) / path.name  # the second for a store on read-only ground
    for place in places:
        sweep_beside(place)
    prefix, suffix = f".{path.name}.", ".part"
    with system_errors("make a folder beside", path):
        try:
            made = tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent)
        except OSError:
            made = tempfile.mkdtemp(prefix=prefix, suffix=suffix)
    scratch = Path(made)
    try:
        with exclusive(scratch):
            yield scratch
    finally:
        destroy_tree(scratch)
        with system_errors("remove", scratch):
            scratch.rmdir()
        for place in places:
            sweep_beside(place)  # again: a child of a killed run may have held its lock when we began


def hand_over(table: Table | Path | str, schema: Schema, base: Path) -> Table | str:
    """Give a table as another process takes it in ``as_table``: its file, or, where it is in memory, the table."""
    return as_table(table, schema, base) if isinstance(table, Table) else str(Path(table).absolute())


def in_fresh_process(module: str, task: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run a module's ``answer`` on a task and return its result.

    Raises:
        StoreError: what the module raised; RuntimeError: the process failed otherwise.
    """
    command = [sys.executable, "-m", module, str(os.getpid())]
    records = pickle.dumps(task)  # by a pipe: a table in memory touches no disk
    done = subprocess.run(command, cwd=scratch, input=records, stdout=subprocess.PIPE)  # no source tree shadows us
    if done.returncode:
        raise RuntimeError(f"{module.rpartition('.')[2]}: the fresh process ended with status {done.returncode}")
    result = json.loads(done.stdout)
    if "error" in result:
        raise StoreError(result["error"])
    return result


def answer(work: Callable[..., dict[str, Any]]) -> None:
    """Be the fresh process: do the work on the task of our parent, print the result or what went wrong."""
    _end_with(int(sys.argv[1]))
    try:
        print(json.dumps(work(**pickle.load(sys.stdin.buffer))))
    except (ValueError, RuntimeError, StoreError, LedgerError, OSError) as problem:
        print(json.dumps({"error": str(problem)}))


def _end_with(parent: int) -> None:
    """End this process when the one that started it ends: else it goes on writing copies of records after a kill."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)  # it has ended already
