"""How many nodes train together: found once, from what a pass takes in memory and what there is."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from s3t_ext.lora.pinned import pinned
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.training.lockstep import LockStep

SPARE = 1.5  # of what a forward pass keeps: the backward pass has gradients of its own (seen: 1.2 to 1.4)
NODES = 32  # more at a time gain nothing: products are large by then, and the caches are left


class Budget(NamedTuple):
    """What a job may hold, in bytes, and what follows from it; no part of it changes a bit."""

    memory: int
    lanes: int
    rows: int  # of one forward pass, in tokens
    nodes: int  # of one pass
    taken: int  # by so many nodes in all lanes, the shared base apart

    @property
    def left(self) -> int:
        """For records and states of the trunk."""
        return max(0, self.memory - self.taken)


def find_budget(
    lane: LockStep,
    schema: Schema,
    depths: Iterable[int],
    memory: int,
    lanes: int,
    rows: int,
    nodes: int,
    spare: int = 0,
) -> Budget:
    """Find how many nodes train together in ``memory`` bytes.

    Args:
        lane: to try a forward pass on, of a blank record of the greatest length.
        lanes, rows: at most, see ``Settings``; fewer where memory is short. ``nodes``: as many at most, 0: ``NODES``.
        spare: bytes to leave, for a slice that is read.

    Raises:
        ValueError: there is too little memory for one node.
    """
    x = blank_input(schema)
    with pinned():
        weighed = [lane.weigh(depth, x) for depth in depths]
        tokens = max(1, lane.tokens(x))
    record, node = max(kept for kept, _ in weighed), max(size for _, size in weighed)
    least = lane.config.batch // lane.config.accumulate  # records of one node that are in a forward pass together

    def takes(lanes: int, rows: int, nodes: int) -> int:
        return int(lanes * (SPARE * record * max(least, rows // tokens) + nodes * node))

    while takes(lanes, rows, 1) > memory - spare and rows // tokens > least:
        rows //= 2
    while takes(lanes, rows, 1) > memory - spare and lanes > 1:
        lanes -= 1
    if takes(lanes, rows, 1) > memory - spare:
        reading = f" and {told(spare)} to read the largest slice" if spare else ""
        raise ValueError(
            f"memory: expected at least {told(takes(lanes, rows, 1))} for one node{reading}, got {told(memory)}; allow "
            "more, free some, or use a smaller batch, more accumulation, a shorter max_length or more slices"
        )
    most = nodes or NODES
    fits = int(((memory - spare) / lanes - SPARE * record * max(least, rows // tokens)) // max(node, 1))
    nodes = max(1, min(most, fits))
    return Budget(memory, lanes, rows, nodes, takes(lanes, rows, nodes))


def told(size: float) -> str:
    """Tell a number of bytes: three digits, in the greatest unit that leaves one before the point."""
    units = {30: "GiB", 20: "MiB", 10: "KiB", 0: "bytes"}
    power = next(power for power in units if size >= 2**power or not power)
    return f"{size / 2**power:.3g} {units[power]}"


def blank_input(schema: Schema) -> Tensor:
    """Make one record (1, ...) of zeros: of a text as long as any may be."""
    return torch.zeros(1, schema.max_length, dtype=torch.int32) if schema.is_text else torch.zeros(1, *schema.shape)


def free_bytes(device: str = "cpu") -> int:
    """Tell how much memory this process may still take: what the machine has free, or its control group allows."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError), open("/proc/meminfo") as lines:
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    return max(0, min(free, default=8 * 2**30))


def peak_bytes() -> int:
    """Tell the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
