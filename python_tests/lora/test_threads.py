"""Threads of the native kernels: torch's own team is joined, or nobody's, and nothing that happens to a process hangs.

What would hang runs in a process of its own, under a clock. Bits are compared with those of one thread.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import warm
from guarantees import threads
from native_cases import Case, every_op, make, same

from s3t_ext.lora.kernels import native

if not native.AVAILABLE:
    pytest.skip(native.WHY_NOT, allow_module_level=True)

TEAM = native.build_info()["threads"]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_team = pytest.mark.skipif(not TEAM, reason="this torch brings no OpenMP team to join: the kernels are serial")
LARGE = Case("above the grain: a team takes part", 512, 512, 32, (300, 1, 199), ((0, 1), (2, -1), (4, 0)))

SETUP = """
import os, signal, threading
import torch
from s3t_ext.lora.kernels import native

signal.alarm(120)  # ends this process; its children set alarms of their own
random = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=random)
x, weight, a, b = draw(256, 512), draw(512, 512), draw(2, 8, 512), draw(2, 8, 512)
ids = torch.tensor([[0, 1]], dtype=torch.int32)

def layer():
    y, _ = native.layer(x, weight, None, a, None, b, None, ids, None, None, 1.0, 512)
    return y.numpy().tobytes()

def as_alone():  # no operator of torch has a part in it: those do hang in a forked child
    return layer() == alone

torch.set_num_threads(1)
alone = layer()
torch.set_num_threads(2)
"""
FORK = """
def forked(child):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if child() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code: str, **env: str) -> None:
    """Run a script after SETUP; an alarm in it or in its child, or a wrong bit, is a failure."""
    start = subprocess.run if env else warm.run  # the environment is read as torch is loaded
    command = [sys.executable, "-c", SETUP + code]
    done = start(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"


# A fork: the team of the thread that forks is not in the child, and waiting for it would never end.


@needs_team
@pytest.mark.parametrize("before", ["layer()", "x @ x.T"], ids=["ours", "torch"])
def test_a_forked_child_works_after_a_parent_with_a_team(before: str) -> None:
    run(FORK + f"{before}\nstatus = forked(as_alone)\nassert status == 0, status\nassert as_alone()")


@needs_team
def test_a_child_of_a_forked_child_works() -> None:
    run(FORK + "layer()\nstatus = forked(lambda: forked(as_alone) == 0 and as_alone())\nassert status == 0, status")


@needs_team
def test_a_thread_that_a_forked_child_starts_has_a_team_of_its_own() -> None:
    run(
        FORK
        + """
def child():
    def work():
        torch.set_num_threads(2)
        before = len(os.listdir("/proc/self/task"))
        same.append(as_alone())
        joined.append(len(os.listdir("/proc/self/task")) > before)
    same, joined = [], []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return same == joined == [True]
layer()
status = forked(child)
assert status == 0, status
"""
    )


@needs_team
@pytest.mark.parametrize("count", [1, 2], ids=["torch's one thread", "a team asked for"])
def test_a_data_loader_may_call_an_op_in_its_workers(count: int) -> None:
    run(
        f"""
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        signal.alarm(60)
        return as_alone()
layer()
loader = torch.utils.data.DataLoader(
    Rows(), num_workers=2, multiprocessing_context="fork", worker_init_fn=lambda _: torch.set_num_threads({count})
)
assert [bool(same) for same in loader] == [True] * 4
"""
    )


# What a process may ask of its threads.


@needs_team
@pytest.mark.parametrize(
    "env",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "32"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_DYNAMIC": "true", "OMP_WAIT_POLICY": "passive"},
        {"OMP_MAX_ACTIVE_LEVELS": "3", "OMP_PROC_BIND": "true"},
    ],
    ids=lambda env: " ".join(f"{name}={value}" for name, value in env.items()),
)
def test_settings_of_openmp_change_no_bit(env: dict[str, str]) -> None:
    run(
        "for count in (3, 1, torch.get_num_threads(), 2):\n    torch.set_num_threads(count)\n    assert as_alone()",
        **env,
    )


def test_without_a_team_the_kernels_are_serial() -> None:
    # Looked for once: where torch is not loaded by then there is none, as in a torch without OpenMP.
    first = "from s3t_ext import _native\nassert _native.build_info()['threads'] == ''\n"
    code = "before = len(os.listdir('/proc/self/task'))\nassert as_alone()\n"
    code += "assert len(os.listdir('/proc/self/task')) == before"
    done = subprocess.run([sys.executable, "-c", first + SETUP + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_threads_that_call_at_once_get_the_bits_of_one() -> None:
    cases = [make(LARGE, seed=seed) for seed in range(4)]
    with threads(1):
        want = [every_op(v) for v in cases]
    got: list = [None] * len(cases)

    def work(i: int) -> None:
        torch.set_num_threads(i + 1)  # of this thread alone
        got[i] = [every_op(cases[i]) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(len(cases)):
        for result in got[i]:
            same(result, want[i])


@needs_team
def test_a_thread_with_a_small_stack_is_served() -> None:
    code = """
import threading
found = []
threading.stack_size(160 << 10)
torch.set_num_threads(1)
thread = threading.Thread(target=lambda: found.append(layer()))
thread.start()
thread.join()
assert found[0] == alone
"""
    run(code)


def test_a_call_inside_a_region_of_the_team_is_served() -> None:
    v = make(LARGE)
    with threads(1):
        want = every_op(v)
    results: list = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def member(_: object) -> None:
        torch.set_num_threads(2)
        results.append(every_op(v))

    with threads(2):
        ctypes.CDLL(TEAM).GOMP_parallel(member, None, 2, 0)
    assert len(results) == 2
    for result in results:
        same(result, want)


# Other runtimes: one that was preloaded, and one whose members come late, as where other programs hold their cores.

TEAM_OF_ONE = """
#include <unistd.h>
int joined = 0, late_us = 0;
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
    work(data);
    usleep(late_us);
    ++joined;
}
"""


@pytest.fixture
def team_of_one(tmp_path: Path) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler on PATH to build a team with")
    team = tmp_path / "libtorch_cpu.so"  # the name by which torch is found
    subprocess.run([COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", team], input=TEAM_OF_ONE, text=True, check=True)
    return team


def test_a_runtime_preloaded_is_joined_as_torch_joins_it(team_of_one: Path) -> None:
    preloaded = team_of_one.rename(team_of_one.with_name("libpreloaded.so"))
    code = f"""
import ctypes
assert native.build_info()["threads"] == {str(preloaded)!r}
joined = ctypes.c_int.in_dll(ctypes.CDLL({str(preloaded)!r}), "joined")
before = joined.value
torch.zeros(1 << 20) + 1
assert joined.value > before, "torch calls another runtime"
before = joined.value
assert as_alone() and joined.value > before
"""
    run(code, LD_PRELOAD=str(preloaded))


CALLS = """
import ctypes, signal, sys
import numpy as np
signal.alarm(120)
team = ctypes.CDLL(sys.argv[1])
ctypes.c_int.in_dll(team, "late_us").value = 100_000
from s3t_ext import _native
assert _native.build_info()["threads"] == sys.argv[1]
weight = np.ones((512, 1024), np.float32)
panels = np.empty((16, 1024, 32), np.float32)
def pack():
    _native.pack(512, 1024, weight.ctypes.data, 1024, 1, panels.ctypes.data, 0, 2)
    return ctypes.c_int.in_dll(team, "joined").value
joined = [pack() for _ in range(10)]
assert joined == [1] * 10, joined
while pack() == 1:
    pass
"""


def test_a_late_team_is_left_alone_until_that_has_cost_as_much(team_of_one: Path) -> None:
    command, env = [sys.executable, "-c", CALLS, str(team_of_one)], {**os.environ, "LD_PRELOAD": str(team_of_one)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"


# Other threads of Python, and signals.


def test_other_threads_run_during_a_call() -> None:
    v = make(Case("long", 2048, 2048, 8, (8192,), ((0, 1),)))
    table = (v["ids"], v["offsets"])
    s = native.shrink(v["x"], v["a"], v["a1"], *table, v["scales"], 1.0)
    span = []

    def work() -> None:
        begin = time.perf_counter()
        native.linear(v["x"], v["weight"], v["bias"], s, v["b"], v["b1"], *table, 2048, False)
        span.extend((begin, time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    ticks = []
    while not span:
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    begin, end = span
    middle = [tick for tick in ticks if begin + (end - begin) / 4 < tick < end - (end - begin) / 4]
    assert len(middle) > 1, f"a call of {end - begin:.3f} s held the interpreter's lock"


def test_an_interrupt_comes_after_the_call_and_breaks_nothing() -> None:
    run(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
interrupted = False
try:
    while True:
        layer()
except KeyboardInterrupt:
    interrupted = True
assert interrupted and as_alone()
"""
    )
