"""What each case costs at least, and what a way of computing it should take on a machine of given speed.

Bytes count each input and each output of a kernel once; operations count a multiplication and an addition as two::

    time = start + sum over kernels of  launches * launch + max(bytes / copy, operations / rate)

and the whole layer, forward, cannot cost less than ``1 + R (1/K + 1/O)`` times the bare product (twice the R term
backward), R = live rank of a row. The kernels of each kind are listed below; X, Y, W are the bytes of x, y and the
weight, S of what lies between shrink and expand, A and B of the live adapters, ``all`` of live and dead ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.cases import BYTES, Case


class Machine(NamedTuple):
    """Ceilings: copy in bytes a second (read and written), product in operations a second by type, seconds a launch.

    ``start``: what the timer adds to any step (on a GPU the start of a graph's replay).
    """

    name: str
    copy: float
    rate: dict[str, float]
    launch: float
    start: float = 0.0


# Leads, not measurements; a run on a device replaces them by that device's own. IEEE fp32 runs on the CUDA cores.
H100 = Machine("H100", 3.0e12, {"bf16": 790e12, "fp16": 790e12, "fp32": 50e12}, 2e-6)


class Kernel(NamedTuple):
    bytes: float
    ops: float = 0.0
    launches: int = 1


class Sizes(NamedTuple):
    """Bytes of a case's tensors, its element being e bytes, and operations: base product, shrink (K) and expand (O)."""

    X: float
    Y: float
    W: float
    S: float
    A: float
    B: float
    S_all: float
    A_all: float
    B_all: float
    base: float
    shrink: float
    expand: float


def sizes(case: Case, e: int) -> Sizes:
    T, K, O, r, R = case.T, case.K, case.O, case.r, case.R
    alive = case.busy * case.slots * r  # rows of the pools that are read
    every = case.N * r
    return Sizes(
        T * K * e, T * O * e, O * K * e, T * R * e, alive * K * e, alive * O * e, T * every * e, every * K * e,
        every * O * e, 2 * T * K * O, 2 * T * R * K, 2 * T * R * O,
    )  # fmt: skip


def floor(case: Case) -> float:
    """Ratio of the layer to the bare product that nothing can beat: ``1 + R (1/K + 1/O)``; see the module."""
    return 1 + {"fwd": 1, "bwd": 2, "fwdbwd": 1.5}[case.step] * case.R * (1 / case.K + 1 / case.O)


def forward(case: Case, kind: str) -> Iterator[Kernel]:
    """List the kernels of one way to compute the layer."""
    e = BYTES[case.dtype]
    z = sizes(case, e)
    base = Kernel(z.X + z.W + z.Y, z.base)
    shrink = Kernel(z.X + z.A + z.S, z.shrink)
    L, parts = case.slots, case.busy * case.slots  # passes over all rows, and launches they need
    match kind:
        case "bare":
            yield base
        case "limit":
            yield Kernel(z.X + z.W + z.Y + z.A + z.B, z.base + z.shrink + z.expand)
        case "two":  # base product and expand in one accumulator
            yield from (shrink, Kernel(z.X + z.W + z.Y + z.S + z.B, z.base + z.expand))
        case "split":
            yield from (base, shrink, Kernel(2 * z.Y + z.S + z.B, z.expand))
        case "three":  # live and dead adapters: the mask is applied to s
            share = case.N / case.slots
            yield from (base, Kernel(z.X + z.A_all + z.S_all, z.shrink * share), Kernel(3 * z.S_all))
            yield Kernel(2 * z.Y + z.S_all + z.B_all, z.expand * share)
        case "cat":
            yield from (base, shrink, Kernel(z.S + z.B + z.Y, z.expand), Kernel(2 * z.Y), Kernel(3 * z.Y))
        case "addmm":
            yield from (base, Kernel(L * z.X + z.A + z.S, z.shrink, parts))
            yield Kernel(2 * L * z.Y + z.S + z.B, z.expand, parts)
        case "compile":  # the products as they are, everything elementwise in one pass
            yield from (base, Kernel(L * z.X + z.A + z.S, z.shrink, parts))
            yield from (Kernel(z.S + z.B + L * z.Y, z.expand, parts), Kernel((L + 2) * z.Y))
        case "naive" | "peft":
            wide = sizes(case, 4) if kind == "peft" else z  # PEFT's adapters are fp32 unless told otherwise
            if wide is not z:
                yield Kernel(z.X + wide.X)
            yield base
            yield Kernel(L * wide.X + wide.A + wide.S, z.shrink, parts)
            yield Kernel(wide.S + wide.B + L * wide.Y, z.expand, parts)
            yield from (Kernel(2 * L * wide.Y, 0, parts), Kernel(3 * L * wide.Y, 0, parts))
            if case.G > 1:
                yield Kernel(2 * z.Y)
            if wide is not z:
                yield Kernel(wide.Y + z.Y)
        case _:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def backward(case: Case, kind: str) -> Iterator[Kernel]:
    """List the kernels of the gradients of x and of the adapters; no gradient of the weight."""
    z = sizes(case, BYTES[case.dtype])
    base = Kernel(z.Y + z.W + z.X, z.base)
    shrink = Kernel(z.Y + z.B + z.S, z.expand)
    outer = (Kernel(z.S + z.X + z.A_all, z.shrink), Kernel(z.S + z.Y + z.B_all, z.expand))
    L, parts = case.slots, case.busy * case.slots
    match kind:
        case "bare":
            yield base
        case "limit":
            moved = 2 * z.X + z.Y + z.W + z.A + z.B + z.A_all + z.B_all
            yield Kernel(moved, z.base + 2 * (z.shrink + z.expand))
        case "two":
            yield from (shrink, Kernel(z.Y + z.W + z.X + z.S + z.A, z.base + z.shrink), *outer)
        case "split":
            yield from (base, shrink, Kernel(2 * z.X + z.S + z.A, z.shrink), *outer)
        case "three":
            share = case.N / case.slots
            mask = Kernel(3 * z.S_all)
            yield from (base, Kernel(z.Y + z.B_all + z.S_all, z.expand * share), mask)
            yield from (Kernel(2 * z.X + z.S_all + z.A_all, z.shrink * share), mask)
            yield Kernel(z.S_all + z.X + z.A_all, z.shrink * share)
            yield Kernel(z.S_all + z.Y + z.B_all, z.expand * share)
        case "naive" | "peft" | "addmm":
            wide = sizes(case, 4) if kind == "peft" else z
            yield from (base, Kernel(2 * L * wide.Y, 0, parts), Kernel(L * wide.Y + wide.B + wide.S, z.expand, parts))
            yield Kernel(wide.S + L * wide.Y + wide.B, z.expand, parts)
            yield Kernel(wide.S + L * wide.X + wide.A, z.shrink, parts)
            yield Kernel(wide.S + L * wide.X + wide.A, z.shrink, parts)
            yield Kernel(3 * L * wide.X, 0, parts)
        case _:
            raise ValueError(f"kind: {kind!r} has no backward")


KINDS = ("bare", "limit", "two", "split", "three", "addmm", "cat", "compile", "naive", "peft")


def predict(case: Case, kind: str, machine: Machine) -> float:
    """Predict the seconds of one step; ``fast`` is the better of ``two`` and ``split``.

    Returns:
        Seconds; NaN where the kind has no model for the step.
    """
    if kind == "fast":
        return min(predict(case, "two", machine), predict(case, "split", machine))
    kernels: list[Kernel] = []
    try:
        if case.step != "bwd":
            kernels += forward(case, kind)
        if case.step != "fwd":
            kernels += backward(case, kind)
    except ValueError:
        return float("nan")
    rate = machine.rate[case.dtype]
    work = sum(k.launches * machine.launch + max(k.bytes / machine.copy, k.ops / rate) for k in kernels)
    return machine.start + work


def table(cases: tuple[Case, ...], machine: Machine) -> list[dict[str, object]]:
    """Predict every case: bytes, operations, live rank, floor, microseconds of the bare product and ratios to it."""
    rows = []
    for case in cases:
        least = [k for run, on in ((forward, case.step != "bwd"), (backward, case.step != "fwd")) if on
                 for k in run(case, "limit")]  # fmt: skip
        bare = predict(case, "bare", machine)
        row: dict[str, object] = {"case": case.name, "bytes": int(sum(k.bytes for k in least))}
        row |= {"operations": int(sum(k.ops for k in least)), "R": case.R, "floor": f"{floor(case):.3f}"}
        row["bare_us"] = f"{bare * 1e6:.2f}"
        for kind in KINDS[1:]:
            ratio = predict(case, kind, machine) / bare
            row[f"{kind}_ratio"] = "" if ratio != ratio else f"{ratio:.3f}"
        rows.append(row)
    return rows
