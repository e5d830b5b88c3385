"""What the kernels read and write: nothing past the end of a tensor or before it, nothing of a dead adapter.

What must not be touched lies on pages that cannot be: touching them ends the process. So test_instruction_sets runs
this file in processes of their own, one for each instruction set.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch
from native_cases import CASES, EDGES, POOLS, TYPES, Case, every_op, make, same
from torch import Tensor

from s3t_ext.lora.kernels import native

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def close(memory: mmap.mmap, offset: int, size: int) -> None:
    """Let nobody touch some pages any more, until the memory is given back."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
    status = _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), 0)
    assert status == 0, f"mprotect: errno {ctypes.get_errno()}"


def between_pages(shape: tuple[int, ...], dtype: torch.dtype, behind: bool) -> Tensor:
    """Lay a tensor out right before a closed page if ``behind``, else right after one."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    for page in (0, pages + 1):
        close(memory, page * PAGE, PAGE)
    offset = (pages + 1) * PAGE - size if behind else PAGE
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def fenced(v: dict, lay: Callable[..., Tensor]) -> dict:
    """Copy every tensor of a case to where `lay` puts it, rows as far apart as they are."""

    def move(x: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) if x.numel() else 0
        storage = lay((span,), x.dtype)
        return storage.as_strided(x.shape, x.stride()).copy_(x) if span else x

    moved = {name: move(x) if isinstance(x, Tensor) else x for name, x in v.items()}
    drop = v["drop"]
    moved["drop"] = drop and drop._replace(seeds=move(drop.seeds), rows=move(drop.rows))
    return moved


@pytest.mark.parametrize("types", [t for t in POOLS if t[1] == t[2]], ids=str)
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("case", [*CASES, *EDGES], ids=lambda case: case.why)
def test_nothing_round_a_tensor_is_touched(
    case: Case, behind: bool, types: tuple[torch.dtype, ...], monkeypatch
) -> None:
    def run(v: dict) -> dict[str, Tensor]:
        results = every_op(v)
        packed, table = native.pack(v["weight"]), (v["ids"], v["offsets"])
        outputs, s, ds = len(v["weight"]), results["s"], results["ds"]
        y = native.linear(v["x"], packed, v["bias"], s, v["b"], v["b1"], *table, outputs, False, v["drop"])
        dx = native.linear(v["y"], packed, None, ds, v["a"], v["a1"], *table, outputs, True, v["drop"])
        return {**results, "packed": packed, "y of packed": y, "dx of packed": dx}

    v = make(case, types)
    want = run(v)
    lay = partial(between_pages, behind=behind)

    def result(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return lay(shape, dtype or like.dtype).fill_(float("nan"))  # what is not written shows

    monkeypatch.setattr(torch.Tensor, "new_empty", result)
    same(run(fenced(v, lay)), want)


N, LIVE = 64, (1, 5, 62)  # adapters of the first pool, and those of it that rows name; 65 of the second one's 64..66
TABLE = ((1, -1, 5, 2**31 - 1), (62, 1, -5, 65), (0, 2, 3, 64), (65, 5, 67, 1))  # group 2 is empty


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 0, 0), (2, 1, 0, 1), (20, 3, 0, 300)], ids=str)
def test_dead_adapters_are_never_touched(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """The cost follows the live adapters, not N: pages of dead ones cannot even be read."""
    width = PAGE // 8 // dtype.itemsize  # an adapter of rank 8 fills a page
    v = make(Case("", width, width, 8, sizes, TABLE, N=N, M=3), (dtype,) * 3)
    dead = {name: [n for n in range(N) if n not in LIVE] for name in "ab"} | {name: [0, 2] for name in ("a1", "b1")}
    memory = {name: mmap.mmap(-1, len(v[name]) * PAGE) for name in dead}
    for name, pool in memory.items():
        v[name] = torch.frombuffer(pool, dtype=dtype).view(v[name].shape).copy_(v[name])
    want = every_op(v)
    for name, adapters in dead.items():
        for n in adapters:
            close(memory[name], n * PAGE, PAGE)
    same(every_op(v), want)


def test_the_pages_are_closed() -> None:
    """In a child: it must die of what the tests above would die of."""
    for behind in (True, False):
        x = between_pages((3,), torch.float32, behind)
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            ctypes.c_float.from_address(x.data_ptr() + (12 if behind else -4)).value  # noqa: B018
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
