"""Points on the way of an operation at which something else may happen: the n-th call of what it goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from s3t_ext.ledger.ledger import Ledger
from s3t_ext.store.nodes import NodeStore
from s3t_ext.store.records import RecordStore
from s3t_ext.system.training import lockstep

CALLS = [
    (Ledger, "heal"),
    (Ledger, "grow"),
    (Ledger, "give_up"),
    (Ledger, "trained"),
    (Ledger, "mark_erased"),
    (NodeStore, "put"),
    (NodeStore, "erase"),
    (RecordStore, "put"),
    (RecordStore, "get"),
    (RecordStore, "erase"),
    (lockstep.LockStep, "stage"),
]


@contextmanager
def meeting(nth: int, happen: Callable[[str], None]) -> Iterator[list[str]]:
    """Let something happen before the n-th of these calls that the block makes, and after it for the next number.

    Yields:
        The names of the points met so far; fewer than n: there is no n-th.
    """
    met: list[str] = []
    busy = [False]

    def at(name: str) -> None:
        met.append(name)
        if len(met) == nth:
            busy[0] = True  # what happens makes calls of its own
            try:
                happen(name)
            finally:
                busy[0] = False

    def watched(kind: type, name: str) -> mock._patch:
        real = getattr(kind, name)

        def call(*args, **kwargs):
            if busy[0]:
                return real(*args, **kwargs)
            at(f"before {name}")
            result = real(*args, **kwargs)
            at(f"after {name}")
            return result

        return mock.patch.object(kind, name, call)

    patches = [watched(*where) for where in CALLS]
    for patch in patches:
        patch.start()
    try:
        yield met
    finally:
        for patch in patches:
            patch.stop()
