"""Dropout: the published words, the same mask on every backend, and a mask that follows its keys alone."""

from __future__ import annotations

from dataclasses import replace

import guarantees as g
import pytest
import torch
from numerics import Case, make
from torch import Tensor

from s3t_ext import masked_lora, masked_lora_linear
from s3t_ext.lora.kernels import IMPLS, dropout, native, serves

# Counter, key and words of Random123's known-answer file for philox4x32 with 10 rounds.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
ON_CPU = [b for b in IMPLS["shrink"] if serves(b, "shrink", "cpu", torch.float32)]
every_backend = pytest.mark.parametrize("backend", ON_CPU)
P = 0.3


def signed(low: int, high: int) -> int:
    value = high << 32 | low
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_words(counter, key, words) -> None:
    quad, slot, *row = counter
    numbers = [torch.tensor(n) for n in (signed(*key), signed(*row), quad, slot)]
    assert tuple(int(w) for w in dropout.philox(*numbers)) == words
    assert native._native.words(key[1] << 32 | key[0], row[1] << 32 | row[0], quad, slot) == words


def keys(case: Case) -> tuple[Tensor, Tensor]:
    """Seeds and row keys that use all of their 64 bits."""
    draw = torch.Generator().manual_seed(7)
    return tuple(torch.randint(-(2**62), 2**62, (n,), generator=draw) for n in (len(case.ids), len(case.x)))


def run(
    case: Case, backend: str, base: bool, train: bool = True, rows: Tensor | None = None, scale: float = 0.0
) -> dict[str, Tensor]:
    """Forward and backward under dropout; adapters 0 to 2 frozen if ``train``."""
    seeds, own = (k.to(case.x.device) for k in keys(case))
    cut = 3 if train else 0
    x, a, b = (t.detach().clone().requires_grad_() for t in (case.x, case.a[cut:], case.b[cut:]))
    pools = (case.a[:cut].contiguous(), case.b[:cut].contiguous()) if train else (a, b)
    common = {
        "scale": scale or case.scales,
        "train": (a, b) if train else None,
        "dropout": (P, seeds, own if rows is None else rows),
        "backend": backend,
    }
    if base:
        y = masked_lora_linear(x, case.weight, case.bias, *pools, case.ids, case.offsets, mode="exact", **common)
    else:
        y = masked_lora(x, *pools, case.ids, case.offsets, **common)
    y.backward(case.dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def by_hand(case: Case, base: bool) -> dict[str, Tensor]:
    """The definition in fp64, row by row: mask, then the plain adapter."""
    seeds, rows = keys(case)
    leaves = [t.double().detach().requires_grad_() for t in (case.x, case.a, case.b)]
    x, a, b = leaves
    lines = []
    for group, slots in enumerate(case.ids.tolist()):
        for t in range(int(case.offsets[group]), int(case.offsets[group + 1])):
            y = case.weight.double() @ x[t] + case.bias.double() if base else x.new_zeros(b.shape[2])
            for p, n in enumerate(slots):
                if n < 0:
                    continue
                seen, scale = x[t], case.scales[n].double()
                if n >= 3:
                    quads = torch.arange(-(-x.shape[1] // 4))
                    words = torch.stack(dropout.philox(seeds[group], rows[t], quads, torch.tensor(p)), -1).flatten()
                    seen = torch.where(words[: x.shape[1]] >= round(P * 2**32), x[t], 0) / (1 - P)
                y = y + scale * (a[n] @ seen) @ b[n]
            lines.append(y)
    y = torch.stack(lines)
    y.backward(case.dy.double())
    return {"y": y.detach(), "dx": x.grad, "da": a.grad[3:], "db": b.grad[3:]}


@every_backend
@pytest.mark.parametrize("base", [False, True], ids=["masked_lora", "masked_lora_linear"])
@pytest.mark.parametrize("scale", [0.0, 2.0], ids=["scale for each adapter", "one number"])
def test_is_the_definition(backend, base, scale) -> None:
    case = make(g.MANY, torch.float32)
    told = replace(case, scales=torch.full_like(case.scales, scale)) if scale else case
    want, got = by_hand(told, base), run(case, backend, base, scale=scale)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-4 * float(value.abs().max()))


@g.every_place()
@pytest.mark.parametrize("train", [True, False])
def test_backends_drop_the_same_elements(backend, device, dtype, train) -> None:
    """A different mask would change values by their own size; rounding changes them by a part in a hundred at most."""
    case = make(g.MANY, dtype)
    for base in (False, True):
        want = run(case, "reference", base, train)
        got = {name: value.cpu() for name, value in run(case.to(device), backend, base, train).items()}
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=2e-2, atol=1e-2 * float(value.abs().max()))


@every_backend
def test_mask_follows_the_row_key_not_the_place(backend) -> None:
    """Rows of a group in another order, with their keys, give their own bits; in another batch too."""
    case = make(g.MANY, torch.float32)
    whole = run(case, backend, True)
    lo, hi = int(case.offsets[2]), int(case.offsets[3])
    order = torch.arange(len(case.x))
    order[lo:hi] = order[lo:hi].flip(0)
    turned = run(replace(case, x=case.x[order], dy=case.dy[order]), backend, True, rows=keys(case)[1][order])
    g.same_bits({k: whole[k][order] for k in ("y", "dx")}, {k: turned[k] for k in ("y", "dx")})
    unturned = run(replace(case, x=case.x[order], dy=case.dy[order]), backend, True)
    assert not torch.equal(whole["y"][order][lo:hi], unturned["y"][lo:hi]), "the key must matter"


@every_backend
def test_dropped_elements_are_unread(backend) -> None:
    """NaN in a dropped element of x reaches nothing; one that is kept does."""
    case = replace(make(g.MANY, torch.float32), ids=torch.tensor([[4], [4], [4], [4], [4]], dtype=torch.int32))
    seeds, rows = keys(case)
    group = torch.repeat_interleave(torch.arange(5), case.offsets.diff())
    kept = dropout.keep(dropout.Dropout(P, seeds, rows, 3), case.ids[group], group, case.x.shape[1])[:, 0]
    clean = run(case, backend, False)
    poisoned = run(replace(case, x=torch.where(kept, case.x, torch.nan)), backend, False)
    g.same_bits(clean, poisoned)
    first = int(kept[0].nonzero()[0])
    x = case.x.clone()
    x[0, first] = torch.nan
    assert run(replace(case, x=x), backend, False)["y"][0].isnan().any()


def test_share_of_dropped_elements() -> None:
    """The mean of a million words' verdicts lies within five standard errors of p, for every column of a quad."""
    rows = torch.arange(1000)
    drop = dropout.Dropout(P, torch.tensor([3]), rows, 0)
    kept = dropout.keep(drop, torch.zeros(1000, 1, dtype=torch.int32), torch.zeros(1000, dtype=torch.int64), 1000)[:, 0]
    for lane in range(4):
        share = kept[:, lane::4].double().mean().item()
        assert abs(share - (1 - P)) < 5 * (P * (1 - P) / 250_000) ** 0.5


def test_number_and_tensor_are_one_scale() -> None:
    """Where all adapters train, a number takes up 1 / (1 - p) as a tensor does; a threshold has 32 bits."""
    case = make(g.MANY, torch.float32)
    same = replace(case, scales=torch.full_like(case.scales, 2.0))
    g.same_bits(run(same, "native", True, train=False), run(case, "native", True, train=False, scale=2.0))
    drop = dropout.Dropout(1 - 1e-12, *keys(case), 0)
    assert drop.threshold == 2**32 - 1, "a word of 32 bits"
    y = masked_lora(case.x, case.a, case.b, case.ids, case.offsets, dropout=tuple(drop[:3]))
    assert torch.isfinite(y).all()


def test_probability_zero_is_no_dropout() -> None:
    case = make(g.MANY, torch.float32)
    seeds, rows = keys(case)
    plain = masked_lora(case.x, case.a, case.b, case.ids, case.offsets)
    assert torch.equal(plain, masked_lora(case.x, case.a, case.b, case.ids, case.offsets, dropout=(0.0, seeds, rows)))
