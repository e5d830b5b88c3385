"""How a time is taken: all providers of a case in turn, again and again, and the percentiles of each.

Interleaving lets a slow moment of the machine fall on all alike. On the CPU one sample is as many calls as fill 0.2 ms,
after as many that are not counted where calls are short: else providers that share a weight would find it in the caches
and those that packed it would not. On a GPU ``graph`` replays one captured step between two events, after a buffer
twice the size of L2 was read, which also keeps the device busy while the host enqueues; ``eager`` counts a run of calls
from Python and one synchronisation at its end, caches warm.
"""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.roofline import Machine

ROUNDS = 7  # at least, however long they take
Calls = Mapping[str, Callable[[], object]]


class Spread(NamedTuple):
    """Percentiles of the samples, in seconds (or the unit of a calibration)."""

    p20: float
    p50: float
    p80: float
    repeats: int


def spread(samples: list[float]) -> Spread:
    ordered = sorted(samples)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return Spread(p20, p50, p80, len(ordered))


def take(calls: Calls, timer: str, seconds: float, flush: Tensor | None = None) -> dict[str, Spread]:
    """Time callables in turn for about so many seconds, ``ROUNDS`` at least.

    Args:
        timer: ``1t`` or ``all`` (threads of the CPU), ``graph`` or ``eager``. For ``graph`` the calls are replays of
            what ``capture`` gave, and ``flush`` is a buffer larger than L2.
    """
    if timer == "graph":
        return _events(calls, seconds, flush)
    if timer == "eager":
        return _host(calls, seconds, torch.cuda.synchronize, 2e-3)
    return _host(calls, seconds, lambda: None, 2e-4)


def _host(calls: Calls, seconds: float, sync: Callable[[], object], least: float) -> dict[str, Spread]:
    def sample(call: Callable[[], object], count: int) -> float:
        sync()
        start = time.perf_counter()
        for _ in range(count):
            call()
        sync()
        return (time.perf_counter() - start) / count

    counts, warm = {}, {}
    for name, call in calls.items():
        first = min(sample(call, 1) for _ in range(3))
        counts[name], warm[name] = max(1, math.ceil(least / first)), first < 5e-3
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(101):
        if turn >= ROUNDS and time.perf_counter() > end:
            break
        for name in shuffled(calls, turn):
            if warm[name]:
                sample(calls[name], counts[name])
            samples[name].append(sample(calls[name], counts[name]))
    return {name: spread(s) for name, s in samples.items()}


def shuffled(calls: Calls, turn: int) -> list[str]:
    """Shuffle every round: whoever follows a large one finds its caches cold."""
    names = list(calls)
    random.Random(turn).shuffle(names)
    return names


def capture(call: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """Capture one step on the current stream, which is not the device's default one, after two to warm up.

    Returns:
        What replays it, and its result, which every replay writes anew.
    """
    stream = torch.cuda.current_stream()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph.replay, result


def _events(calls: Calls, seconds: float, flush: Tensor | None) -> dict[str, Spread]:
    """Time replays between events, each from a cold L2.

    The flush reads and does not write: a buffer that was overwritten would leave L2 full of dirty lines, and the step
    that evicts them would pay for writing them back.
    """
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(101):
        if turn > ROUNDS and time.perf_counter() > end:
            break
        for name in shuffled(calls, turn):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if flush is not None:
                flush.sum()
            pair[0].record()
            calls[name]()
            pair[1].record()
            pairs[name].append(pair)
        torch.cuda.synchronize()  # between rounds, so that the host's clock sees what the device has done
    return {name: spread([start.elapsed_time(stop) * 1e-3 for start, stop in p[1:]]) for name, p in pairs.items()}


# --- the machine's ceilings -------------------------------------------------------------------------------------------

# Loops in registers: 24 chains of multiply-adds in fp32, and of dot products of pairs in bf16 where there are such.
LOOPS = """
typedef float vec __attribute__((vector_size(64)));
static float sum(vec *acc) {
  float total = 0;
  for (int i = 0; i < 24; ++i) for (int j = 0; j < 16; ++j) total += acc[i][j];
  return total;
}
float loop_fp32(long turns) {
  vec acc[24], m, c;
  for (int j = 0; j < 16; ++j) m[j] = 0.999f, c[j] = 1e-3f * j;
  for (int i = 0; i < 24; ++i) acc[i] = c * (float)i;
  for (long t = 0; t < turns; ++t) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) acc[i] = acc[i] * m + c;
  }
  return sum(acc);
}
#ifdef __AVX512BF16__
#include <immintrin.h>
float loop_bf16(long turns) {
  vec acc[24];
  __m512bh m = (__m512bh)_mm512_set1_epi16(0x3a80);
  for (int i = 0; i < 24; ++i) for (int j = 0; j < 16; ++j) acc[i][j] = i * j;
  for (long t = 0; t < turns; ++t) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) acc[i] = (vec)_mm512_dpbf16_ps((__m512)acc[i], m, m);
  }
  return sum(acc);
}
#endif
"""
LANES = {"fp32": 16, "bf16": 32}  # multiply-adds of one instruction
TURNS = 1 << 20


def best(call: Callable[[], object], repeats: int = 7, sync: Callable[[], object] = lambda: None) -> float:
    """Give the least of some times: a ceiling is what the machine can do."""
    call()
    times = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
    return min(times)


def loop_rates(threads: int) -> dict[str, float]:
    """Measure the operations a second that the processor's own instructions reach in registers, by type.

    Returns:
        ``loop_fp32``, and ``loop_bf16`` where compiler and processor have such an instruction; nothing without a C
        compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "loops.c", Path(folder) / "loops.so"
        source.write_text(LOOPS)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-funroll-loops"]
        done = subprocess.run(
            [compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(binary)], capture_output=True, check=False
        )
        if done.returncode:
            return {}
        library, found = ctypes.CDLL(str(binary)), {}
        for dtype, lanes in LANES.items():
            if (loop := getattr(library, f"loop_{dtype}", None)) is None:
                continue
            loop.restype, loop.argtypes = ctypes.c_float, [ctypes.c_long]
            found[f"loop_{dtype}"] = 2 * lanes * 24 * TURNS * threads / best(lambda loop=loop: _team(loop, threads))
        return found


def _team(loop: Callable[[int], float], threads: int) -> None:
    team = [threading.Thread(target=loop, args=(TURNS,)) for _ in range(threads)]
    for member in team:
        member.start()
    for member in team:
        member.join()


def calibrate_cpu(threads: int) -> dict[str, float]:
    """Measure copy and read (bytes/s), products and loops in registers (operations/s), a small call (s)."""
    torch.set_num_threads(threads)
    big = torch.ones(1 << 26)  # 256 MB, beyond any cache
    into = torch.empty_like(big)
    found = {"copy": 2 * big.nbytes / best(lambda: into.copy_(big)), "read": big.nbytes / best(big.sum)}
    n = 1024
    ops = torch.ops.mkldnn
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        x, weight = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        times = [best(lambda x=x, w=weight: F.linear(x, w), 3)]
        if hasattr(ops, "_linear_pointwise") and name != "fp16":
            packed = ops._reorder_linear_weight(weight, n)
            times.append(best(lambda x=x, p=packed: ops._linear_pointwise(x, p, None, "none", [], ""), 3))
        found[f"product_{name}"] = 2 * n**3 / min(times)
    found |= loop_rates(threads)
    one = torch.ones(1, 1)
    found["launch"] = best(lambda: [F.linear(one, one) for _ in range(100)]) / 100
    return found


def calibrate_cuda() -> dict[str, float]:
    """Measure copy (bytes/s), products (operations/s); a launch in a graph, from the host, and a graph's own (s)."""
    sync = torch.cuda.synchronize
    big = torch.empty(1 << 28, device="cuda").normal_()  # 1 GB
    into = torch.empty_like(big)
    found = {"copy": 2 * big.nbytes / best(lambda: into.copy_(big), 11, sync)}
    for name, dtype, n in (
        ("bf16", torch.bfloat16, 8192),
        ("fp16", torch.float16, 8192),
        ("fp32", torch.float32, 4096),
    ):
        x = torch.randn(n, n, device="cuda").to(dtype)  # zeros run faster than data
        found[f"product_{name}"] = 2 * n**3 / best(lambda x=x: x @ x, 11, sync)
    small = torch.zeros(1, device="cuda")

    def many(count: int) -> None:
        for _ in range(count):
            small.add_(1)

    found["launch_eager"] = best(lambda: many(200), 7, sync) / 200
    (long, _), (short, _), (one, _) = (capture(lambda n=n: many(n)) for n in (520, 20, 1))
    found["launch"] = max(0.0, best(long, 7, sync) - best(short, 7, sync)) / 500
    # The same flush and events as round every step: what the timer shows for next to nothing.
    found["launch_replay"] = take({"one": one}, "graph", 0.2, into[: 1 << 25])["one"].p50
    return found


def machine(name: str, found: dict[str, float]) -> Machine:
    """Turn a calibration into the ceilings of the roofline."""
    rate = {k.removeprefix("product_"): v for k, v in found.items() if k.startswith("product_")}
    rate = {dtype: max(value, found.get(f"loop_{dtype}", 0.0)) for dtype, value in rate.items()}
    start = max(0.0, found.get("launch_replay", 0.0) - found["launch"])
    return Machine(name, found["copy"], rate, found["launch"], start)
