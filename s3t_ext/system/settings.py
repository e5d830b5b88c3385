"""How training uses machines. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

TRUNKS = ("auto", "memory", "file", "off")
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Settings:
    """How training uses machines; on one kind of device no setting changes a bit.

    Args:
        nodes_per_pass: at most so many train in lock-step; 0: as many as memory allows.
        lanes: passes side by side, one thread each; 0: one for each thread that torch has, or one for a small network.
        trunk: where states of frozen blocks below all adapters are kept, see ``Trunk``; ``off``: nowhere.
        rows: of one forward pass at most, in tokens, where one node has no more.
        memory: bytes that training may take; 0: three quarters of what is free.
        scratch: folder of the files of a trunk and of records that memory does not hold; None: the system's for
            temporary files.
        device: ``cpu``, or a GPU as torch names it. Bits are compared on one kind of device only: see ``provenance``.
        executor: ``local``: in this process; ``ray``: on a Ray cluster, see ``s3t_ext.system.training.executor``.
        address: of the cluster, or ``auto``; None: workers on this machine.
        cpus: processors, and threads, of each job on a cluster.
    """

    nodes_per_pass: int = 0
    lanes: int = 0
    trunk: str = "auto"
    rows: int = 4096
    memory: int = 0
    scratch: str | None = None
    device: str = "cpu"
    executor: str = "local"
    address: str | None = None
    cpus: int = 1

    def __post_init__(self) -> None:
        for name, least in (("nodes_per_pass", 0), ("lanes", 0), ("rows", 1), ("memory", 0), ("cpus", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        for name, allowed in (("trunk", TRUNKS), ("executor", EXECUTORS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
