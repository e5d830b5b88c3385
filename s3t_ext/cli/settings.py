"""Options of commands that train: how they use machines."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from s3t_ext.system.settings import EXECUTORS, TRUNKS

if TYPE_CHECKING:
    from s3t_ext.system.settings import Settings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options; on one kind of device none of them changes a bit."""
    group = parser.add_argument_group("use of machines, which changes no bit")
    group.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    group.add_argument(
        "--nodes-per-pass", type=int, default=0, help="trained in lock-step at most (default: as many as memory allows)"
    )
    group.add_argument("--lanes", type=int, default=0, help="passes side by side (default: one for each thread)")
    group.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="for what training holds beside the process itself and one copy of the base model: adapters, gradients "
        "and activations of passes, records, cached states (default: 3/4 of what is free)",
    )
    group.add_argument("--trunk", default="auto", help=f"where states below all adapters are kept: {', '.join(TRUNKS)}")
    group.add_argument("--executor", default="local", help=f"who trains: {', '.join(EXECUTORS)} (default local)")
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster, or auto (default: workers here)")
    group.add_argument("--ray-cpus", type=int, metavar="N", help="processors of each job (default 1)")


def settings(args: argparse.Namespace) -> Settings:
    """Read the options, and tell torch its number of threads."""
    from s3t_ext.system.settings import Settings

    if args.memory is not None and not 0 < args.memory < 2**30:
        raise ValueError(f"--memory: expected a number of GiB above 0, got {args.memory:g}")
    for name in ("ray_address", "ray_cpus"):
        if args.executor != "ray" and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: expected it beside --executor ray alone")
    made = Settings(
        nodes_per_pass=args.nodes_per_pass,
        lanes=args.lanes,
        memory=round((args.memory or 0) * 2**30),
        trunk=args.trunk,
        executor=args.executor,
        address=args.ray_address,
        cpus=1 if args.ray_cpus is None else args.ray_cpus,
    )
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        import torch

        torch.set_num_threads(args.threads)
    return made
