"""What is timed: the cases, in stars (one factor varied round a default), first the ones that the goals speak of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
STEPS = ("fwd", "bwd", "fwdbwd")
TIMERS = {"cpu": ("1t", "all"), "cuda": ("graph", "eager")}

_NAME = re.compile(
    r"(?P<step>\w+)-(?P<dtype>\w+)-T(?P<T>\d+)-(?P<K>\d+)x(?P<O>\d+)-r(?P<r>\d+)-G(?P<G>\d+)-P(?P<P>\d+)"
    r"-live1of(?P<live>\d+)-(?P<timer>\w+)"
)


@dataclass(frozen=True)
class Case:
    """One layer to time: T rows, K in, O out, G groups that name P adapters of rank r each, of their own (N = G P).

    Attributes:
        live: one slot of so many is alive; the others hold -1 (slots 0, live, 2 live, ... are alive).
        dtype: fp32, fp16 or bf16, of rows, weight and adapters.
        step: ``fwd``; ``bwd`` (gradients of x and of every live adapter, the forward done before); or both.
        timer: on the CPU ``1t`` (one thread) or ``all``; on a GPU ``graph`` (cold L2) or ``eager`` (with host).
    """

    T: int
    K: int
    O: int
    r: int = 16
    G: int = 1
    P: int = 8
    live: int = 1
    dtype: str = "fp32"
    step: str = "fwd"
    timer: str = "1t"

    @property
    def name(self) -> str:
        """The case in one word; ``parse`` reads it back."""
        return (
            f"{self.step}-{self.dtype}-T{self.T}-{self.K}x{self.O}-r{self.r}-G{self.G}-P{self.P}"
            f"-live1of{self.live}-{self.timer}"
        )

    @property
    def N(self) -> int:
        return self.G * self.P

    @property
    def slots(self) -> int:
        """Live slots of a row."""
        return -(-self.P // self.live)

    @property
    def R(self) -> int:
        """Live rank of a row: what its cost should follow."""
        return self.slots * self.r

    @property
    def edges(self) -> list[int]:
        """First row of each group, and T: sizes in the proportions 1 : 4 : 2 : 5 : 3, again and again; some are 0."""
        weights = [1 + 3 * g % 5 for g in range(self.G)]
        return [self.T * sum(weights[:g]) // sum(weights) for g in range(self.G + 1)]

    @property
    def table(self) -> list[list[int]]:
        """Adapter ids, (G, P)."""
        return [[-1 if p % self.live else g * self.P + p for p in range(self.P)] for g in range(self.G)]

    @property
    def busy(self) -> int:
        """Groups that own a row."""
        return sum(hi > lo for lo, hi in zip(self.edges, self.edges[1:]))

    def fields(self) -> dict[str, object]:
        return {**asdict(self), "N": self.N}


def parse(name: str) -> Case:
    """Read a case back from its name.

    Raises:
        ValueError: it is no name of a case.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"case: expected a name such as {CPU_DEFAULT.name}, got {name!r}")
    return Case(**{k: int(v) if v.isdigit() else v for k, v in found.groupdict().items()})  # type: ignore[arg-type]


CPU_DEFAULT = Case(T=64, K=768, O=768)
GPU_DEFAULT = Case(T=2048, K=4096, O=4096, P=4, dtype="bf16", timer="graph")

T_CPU = (1, 16, 64, 512, 2048)
ADAPTERS = (1, 2, 4, 8, 16, 32)
T_GPU = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES_CPU = ((384, 384), (768, 768), (768, 3072), (4096, 4096))
SHAPES_GPU = ((4096, 4096), (4096, 14336), (14336, 4096))
ROUTING = tuple((groups, slots) for slots in (1, 4) for groups in (5, 20, 75))


def vary(case: Case, **values: Iterable) -> Iterator[Case]:
    """Give the case with each combination of the values given."""
    name, options = next(iter(values.items()))
    rest = {k: v for k, v in values.items() if k != name}
    for value in options:
        # K and O, and G and P, go together.
        changed = replace(case, **(dict(zip(name.split("_"), value)) if "_" in name else {name: value}))
        yield from vary(changed, **rest) if rest else [changed]


def _cpu() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        one = replace(CPU_DEFAULT, dtype=dtype)
        every = replace(one, timer="all")
        wide = replace(one, K=4096, O=4096)
        yield from vary(one, T=T_CPU)
        yield from vary(every, T=T_CPU)
        yield from vary(one, G_P=ROUTING)
        yield from vary(wide, timer=TIMERS["cpu"], T=(1, 64))
        yield from vary(one, K_O=SHAPES_CPU)
        yield from vary(one, P=ADAPTERS)
        yield from vary(every, G_P=((20, 1), (20, 4), (1, 1), (1, 4)))
        yield replace(wide, T=512)
        yield from vary(one, live=(2, 8))
        yield from vary(one, step=("fwdbwd",), T=(64, 512))
        yield from vary(every, step=("fwdbwd",), T=(512,))


def _gpu() -> Iterator[Case]:
    d = GPU_DEFAULT
    eager = replace(d, timer="eager")
    yield from vary(d, T=(16, 64, 512, 2048, 8192))  # first what the goals speak of
    yield from vary(d, G_P=ROUTING, T=(64, 2048))
    yield from vary(d, step=("bwd",), T=(2048, 8192))
    yield from vary(d, P=(1, 8), T=(8192, 16, 2048))
    yield from vary(replace(eager, P=8), T=(1, 16, 64))
    yield from vary(d, T=T_GPU)
    yield from vary(d, step=("bwd",), G_P=((20, 1), (20, 4)))
    yield from vary(d, step=("fwdbwd",), T=(64, 512, 2048, 8192))
    yield from vary(d, step=("fwdbwd",), G_P=ROUTING)
    yield from vary(eager, T=(1, 16, 64, 512, 2048, 8192))
    yield from vary(eager, G_P=((20, 1), (20, 4)), T=(64,))
    yield from vary(eager, step=("fwdbwd",), T=(64, 2048))
    yield from vary(replace(d, P=8), live=(2, 8), T=(16, 2048))
    yield from vary(d, P=(16,), T=(16, 2048, 8192))
    yield from vary(replace(d, K=768, O=768), G_P=ROUTING[:3], T=(64, 2048))  # the layers of a small encoder
    yield from vary(replace(d, r=8), G_P=((20, 12),), T=(64, 2048))
    yield from vary(d, K_O=SHAPES_GPU[1:], T=T_GPU)
    yield from vary(d, step=("fwdbwd",), K_O=SHAPES_GPU[1:], T=(64, 2048))
    yield from vary(d, dtype=("fp16", "fp32"), T=(16, 2048))
    yield from vary(d, r=(8, 64))


def _quick() -> Iterator[Case]:
    d = replace(CPU_DEFAULT, timer="all")
    yield from vary(d, T=(1, 16, 64, 512))
    yield from vary(d, G_P=((20, 1), (20, 4)))
    yield replace(d, dtype="bf16")
    yield replace(d, step="fwdbwd")


def _once(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(cases))


SETS: dict[str, tuple[Case, ...]] = {
    "cpu": _once(_cpu()),
    "cuda": _once(_gpu()),
    "quick": _once(_quick()),
    "tiny": (Case(T=3, K=20, O=24, r=2, P=2, timer="all"), Case(T=9, K=20, O=24, r=2, G=3, P=2, live=2, timer="all")),
    # Every way through a kernel at sizes that a memory checker can afford.
    "small": _once(
        c
        for dtype in ("bf16", "fp16", "fp32")
        for step in ("fwd", "fwdbwd")
        for c in (
            Case(T=1, K=264, O=136, r=8, P=3, dtype=dtype, step=step, timer="eager"),
            Case(T=70, K=136, O=264, r=5, G=7, P=2, live=2, dtype=dtype, step=step, timer="eager"),
            Case(T=130, K=136, O=136, r=16, G=75, P=1, dtype=dtype, step=step, timer="eager"),
        )
    ),
    # The library alone: a first run on a new device measures these even where nothing of ours works.
    "calibrate": _once(
        chain(
            vary(GPU_DEFAULT, T=T_GPU),
            vary(replace(GPU_DEFAULT, P=8), T=(16, 8192)),
            vary(GPU_DEFAULT, step=("bwd",), T=(2048, 8192)),
        )
    ),
}

# Compiling takes seconds a case: the sweep over the adapters, a row and many, and all threads.
COMPILED = frozenset(
    chain(
        vary(CPU_DEFAULT, dtype=("fp32", "bf16"), P=ADAPTERS),
        vary(CPU_DEFAULT, dtype=("fp32", "bf16"), T=(1, 512)),
        vary(CPU_DEFAULT, dtype=("fp32", "bf16"), timer=("all",), T=(1, 64)),
        vary(GPU_DEFAULT, T=(16, 512, 2048, 8192)),
    )
)
