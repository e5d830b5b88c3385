"""A request to be forgotten, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

STATES = ("received", "applied", "erased", "certified")
"""The states of a request, in the only order there is."""


@dataclass(frozen=True)
class Request:
    """A deletion request: received -> applied -> erased -> certified.

    `applied` has masked its subjects, in the transaction that received it; `erased` has removed dead weights and
    records; `certified` has been verified against a system trained without them, by what `evidence` says.
    """

    seq: int
    request_id: str
    state: str
    received: str
    deadline: str | None
    """UTC time by which it is to be erased."""
    time: str
    """UTC time at which it was applied."""
    subjects: tuple[str, ...]
    receipt_sha256: str
    evidence: dict[str, Any] | None = None
    unseen: tuple[tuple[int, int, str], ...] = ()
    """Slices (shard, slice, how its file was found) that were given up for it to be erased, until they are back and
    healed: nobody looked in."""

    def step(self, state: str) -> Request:
        """Return the request in the next state.

        Raises:
            ValueError: it is not the next one.
        """
        before = dict(zip(STATES[1:], STATES, strict=False)).get(state)
        if self.state != before:
            only = f"only one that is {before} becomes {state}" if before else f"none becomes {state}"
            raise ValueError(f"request {self.request_id!r} is {self.state}: {only}")
        return replace(self, state=state)

    def overdue(self) -> bool:
        """Return whether its deadline has passed and it is not erased."""
        if self.deadline is None or self.state in ("erased", "certified"):
            return False
        return datetime.now(timezone.utc) > datetime.fromisoformat(self.deadline)
