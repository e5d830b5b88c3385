"""How times are taken: in turn, of one call each, from a cold cache; and the ceilings that the machine reaches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import timing


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    spreads = timing.take(calls, "all", 0.0)
    assert {s.repeats for s in spreads.values()} == {timing.ROUNDS}
    runs = "".join(n for at, n in enumerate(order) if at == 0 or order[at - 1] != n)
    assert len(runs) > 10  # never all samples of one after all of another
    assert {"ab", "ba", "ac", "ca", "bc", "cb"} == {runs[at : at + 2] for at in range(len(runs) - 1)}  # nor one order
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.0, 4.0, 6)


def test_a_time_is_that_of_one_call(monkeypatch) -> None:
    """As many calls as fill 0.2 ms make one sample, after as many that warm the caches, and it is divided by them."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = []

    def call() -> None:
        calls.append(1)
        now[0] += 2.0**-16  # 15 us, exactly

    (spread,) = timing.take({"one": call}, "1t", 0.0).values()
    assert spread == (2.0**-16, 2.0**-16, 2.0**-16, timing.ROUNDS)
    assert len(calls) == 3 + timing.ROUNDS * 2 * 14


def test_long_calls_are_not_repeated(monkeypatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call() -> None:
        calls.append(1)
        now[0] += 2.0**-7  # 8 ms

    (spread,) = timing.take({"one": call}, "1t", 0.0).values()
    assert spread.p50 == 2.0**-7
    assert len(calls) == 3 + timing.ROUNDS


def test_a_flush_leaves_no_dirty_lines(monkeypatch) -> None:
    """Before every step the buffer is read, never written, outside the events."""
    order: list[str] = []

    class Event:
        def __init__(self, **_: bool) -> None:
            pass

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, _: object) -> float:
            return 3.0

    class Buffer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            order.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flush = torch.zeros(4).as_subclass(Buffer)
    order.clear()
    spreads = timing.take({"one": lambda: order.append("step")}, "graph", 0.0, flush)
    assert order == ["sum", "event", "step", "event"] * (timing.ROUNDS + 1)
    assert spreads["one"] == (3e-3, 3e-3, 3e-3, timing.ROUNDS)  # the first round is left out


def test_loops_reach_what_products_do_not() -> None:
    """A loop in registers is the processor's ceiling; its bf16 counts twice what fp32 does (AMD) or half (Intel)."""
    found = timing.loop_rates(1)
    if not found:
        pytest.skip("no C compiler")
    assert found["loop_fp32"] > 1e9
    with open("/proc/cpuinfo") as lines:
        has = "avx512_bf16" in lines.read()
    assert ("loop_bf16" in found) == has
    assert not has or 0.3 < found["loop_bf16"] / found["loop_fp32"] < 3


def test_the_peak_is_the_better_of_product_and_loop() -> None:
    found = {"copy": 1.0, "launch": 0.0, "product_fp32": 3.0, "product_fp16": 1.0, "product_bf16": 5.0}
    assert timing.machine("", found).rate == {"fp32": 3.0, "fp16": 1.0, "bf16": 5.0}
    found |= {"loop_fp32": 4.0, "loop_bf16": 4.0}
    assert timing.machine("", found).rate == {"fp32": 4.0, "fp16": 1.0, "bf16": 5.0}
