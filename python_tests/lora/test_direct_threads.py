"""The ordinary call in one step (csrc/direct.cpp): no memory stays behind, and threads go on beside it."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

import torch
from native_cases import EDGES, Case
from test_direct import NAMES, SMALL, arguments
from torch import Tensor

from s3t_ext import masked_lora_linear
from s3t_ext.lora import ops
from s3t_ext.lora.kernels import native


def resident() -> int:
    """Bytes of memory that this process holds now: its peak was reached by other tests."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_nothing_is_kept() -> None:
    v = arguments(
        Case("pools", 24, 400, 4, (3, 2), ((0, -1), (2, 1))), packed=True
    )  # 400 is no number that Python keeps
    objects = [*v.values(), *v["weight"], *v["train"], None, True, False, Tensor.new_empty, torch.get_num_threads]
    wrong = {**v, "adapter_ids": v["adapter_ids"] + 9}

    def calls(count: int) -> None:
        for _ in range(count):
            ops.direct(*map(v.get, NAMES), "exact")
            ops.direct(*map(wrong.get, NAMES), "exact")

    calls(1000)
    count, size = [sys.getrefcount(o) for o in objects], resident()
    calls(100_000)
    after = [sys.getrefcount(o) for o in objects]
    assert all(abs(was - now) < 100 for was, now in zip(count, after))  # None and the like come and go
    assert resident() - size < 1 << 20


def test_two_threads_at_once() -> None:
    calls = [arguments(case, packed=True) for case in (SMALL, EDGES[0])]
    want = [masked_lora_linear(**v) for v in calls]
    wrong: list[int] = []

    def run(i: int) -> None:
        wrong.extend(1 for _ in range(500) if not torch.equal(masked_lora_linear(**calls[i]), want[i]))

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_run_meanwhile() -> None:
    v = arguments(Case("large", 1024, 2048, 8, (900,), ((0,),), M=0), packed=True)
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)

    interval, thread = sys.getswitchinterval(), threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(1000)  # none is made to give way
    time.sleep(0.05)  # nor asked to, before this was set
    try:
        before = turns[0]
        assert ops.direct(*map(v.get, NAMES), "exact") is not None
        after = turns[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert after > before + 100  # one or two while torch makes y


def test_the_number_of_threads(monkeypatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(native, "direct", lambda *args: numbers.append(args[-2]))
    v = arguments(SMALL)
    ops.direct(*map(v.get, NAMES), "exact")
    monkeypatch.setattr(native.team, "threads", 3)
    ops.direct(*map(v.get, NAMES), "exact")
    assert numbers == [0, 3]
