"""The native attention kernel: its numbers, and bits that hang on no instruction set, thread or neighbour."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import attention_cases
import pytest
import torch
import warm
from attention_cases import CASES, LENGTHS, TYPES, drawn, ragged, run

from s3t_ext.lora.kernels import native

if not native.ATTENDS:
    pytest.skip(native.WHY_NOT or "built from older sources", allow_module_level=True)

ERRORS = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_float64(case, dtype) -> None:
    qkv, mask, grad = drawn(case, dtype)
    q, k, v = (x.double().requires_grad_() for x in qkv)
    wide = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    want = (q @ wide[0].mT * 0.3 + mask.double()).softmax(-1) @ wide[1]
    want.backward(grad.double())
    for ours, exact in zip(run(case, dtype), (want, q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ERRORS[dtype], atol=ERRORS[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_records_of_different_lengths_lie_one_after_the_other(dtype, causal) -> None:
    results = ragged(dtype, causal)
    start = 0
    for length in LENGTHS:
        here = slice(start, start := start + length)
        *ours, q, k, v, grad = (x[:, :, here] for x in results)
        alone = ragged(dtype, causal, (length,))
        for part, whole in zip(alone, (*ours, q, k, v, grad), strict=True):
            assert torch.equal(part, whole), "a record's bits do not hang on what lies beside it"
        q, k, v = (x.double().requires_grad_() for x in (q, k, v))
        scores = q @ k.repeat_interleave(3, 1).mT * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        want = scores.softmax(-1) @ v.repeat_interleave(3, 1)
        want.backward(grad.double())
        for got, exact in zip(ours, (want, q.grad, k.grad, v.grad), strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=ERRORS[dtype], atol=ERRORS[dtype])


@pytest.mark.parametrize("keys", [20, 64])
def test_causal_queries_past_the_last_key_see_all_keys(keys) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 16, generator=g) for rows in (130, keys, keys))
    later = torch.ones(130, keys).triu(1).bool()
    y, _ = native.attention(q, k, v, None, 0.3, causal=True)
    want = (q @ k.mT * 0.3).masked_fill(later, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(y, want, rtol=4e-6, atol=4e-6)


def test_exponentials_are_exact_to_a_few_units_and_zero_far_below() -> None:
    """Of two keys the second lies x below the first: y is e^x / (1 + e^x)."""
    x = -torch.cat([torch.linspace(0, 86, 4001), torch.tensor([87.5, 100.0, 1e30, torch.inf])])
    n = len(x)
    mask = torch.stack([torch.zeros(n), x], 1)[:, None, None]  # (n, 1, 1, 2)
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(n, 1, 2, 1).contiguous()
    y, _ = native.attention(torch.zeros(n, 1, 1, 1), torch.zeros(n, 1, 2, 1), v, mask, 1.0)
    want = (x.double().exp() / (1 + x.double().exp())).view(n, 1, 1, 1)
    torch.testing.assert_close(y[:-4].double(), want[:-4], rtol=3e-7, atol=0)
    assert not y[-4:].any()


def test_no_number_spreads_to_another_head_or_record() -> None:
    qkv, mask, grad = drawn("heads share keys", torch.float32)
    clean = run("heads share keys", torch.float32)
    qkv[1][0, 1, 3] = torch.nan
    y, stats = native.attention(*qkv, mask, 0.3)
    after = [y, *native.attention_backward(*qkv, mask, 0.3, stats, grad)]
    for x, was in zip(after, clean, strict=True):
        half = x.shape[1] // 2  # heads of q that read the other head of k
        assert torch.equal(x[0, :half], was[0, :half])
        assert torch.equal(x[1], was[1])
        assert x[0, half:].isnan().any()


def test_nothing_is_written_beside_the_results() -> None:
    n, h, s, d = 2, 2, 5, 3
    q, k, v = (torch.randn(n, h, s, d) for _ in range(3))
    room = torch.full((n * s * h * d + 2,), 7.0)
    y = room[1:-1].view(n, s, h, d).transpose(1, 2)
    stats = torch.full((n * h * s * 2 + 2,), 7.0)
    native._attention(q, k, v, y, None, stats[1:-1], 1.0, (None, None, None), None, False)
    assert room[0] == room[-1] == stats[0] == stats[-1] == 7
    torch.testing.assert_close(y, (q @ k.mT).softmax(-1) @ v)


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    qkv, mask, grad = drawn("two blocks of queries", torch.float32)
    qkv, mask, grad = [x.repeat(9, 4, 1, 1) for x in qkv], mask.repeat(9, 1, 1, 1), grad.repeat(9, 4, 1, 1)

    def once() -> list[torch.Tensor]:
        y, stats = native.attention(*qkv, mask, 0.3)
        return [y, *native.attention_backward(*qkv, mask, 0.3, stats, grad)]

    try:
        torch.set_num_threads(1)
        one = once()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, once(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_all_instruction_sets_give_the_same_bits(tmp_path) -> None:
    code = str(Path(attention_cases.__file__))
    told = {}
    for isa in native.build_info()["isas"]:
        env = {**os.environ, "S3T_CPU": isa, "OMP_NUM_THREADS": "1"}
        done = warm.run([sys.executable, code], cwd=tmp_path, env=env, text=True)
        assert done.returncode == 0, done.stderr
        told[isa] = done.stdout.strip()
    assert len(set(told.values())) == 1, told
