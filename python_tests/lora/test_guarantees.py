"""Every guarantee of kernels.md section 2, for every backend, device and type; and each one broken once."""

from __future__ import annotations

import guarantees as g
import pytest
import torch
import torch.nn.functional as F

from s3t_ext.lora.kernels import IMPLS, reference

both_ops = pytest.mark.parametrize("base", [False, True], ids=["masked_lora", "masked_lora_linear"])


def test_native_is_built() -> None:
    assert "native" in IMPLS["shrink"], "the suite must not pass without the compiled module"


@g.every_place()
@both_ops
@pytest.mark.parametrize("shape", g.ALL_SHAPES, ids=str)
def test_error_rule(backend, device, dtype, base, shape) -> None:
    for pool in {dtype, torch.float32}:
        g.error_rule(backend, dtype, pool, shape, base, device)


@g.every_place()
@both_ops
def test_dead_is_unread(backend, device, dtype, base) -> None:
    g.dead_is_unread(backend, dtype, base, device)


@g.every_place()
@both_ops
def test_live_elsewhere_stays(backend, device, dtype, base) -> None:
    g.live_elsewhere_stays(backend, dtype, base, device)


@g.every_place()
@both_ops
def test_batch_invariant(backend, device, dtype, base) -> None:
    g.batch_invariant(backend, dtype, base, device)


# --- each guarantee broken: the check above must fail ----------------------------------------------------------------


def multiplied_mask(u, w, w1, ids, offsets, scales, scale, drop=None):
    """A shrink that multiplies by the mask instead of selecting."""
    index, alive = reference._route(ids, offsets, len(u), len(w))
    pool = reference._pool(w, w1, u.dtype)
    full = torch.einsum("td,nrd->tnr", u.double(), pool)  # (T, N, r): reads every adapter
    s = torch.zeros(len(u), ids.shape[1], w.shape[1], dtype=torch.float64)
    for n in range(len(pool)):
        s += full[:, n, None] * ((index == n) & alive)[..., None] * (1.0 if scales is None else scales[n].double())
    return s.to(u.dtype)


def library_base(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, drop=None):
    """A base product by the library, whose order of sums follows the number of rows."""
    if x.dtype == torch.float32 and len(x) > 1:
        y = F.linear(x, weight.t() if transposed else weight, bias)
    else:  # one row: another order of the same sum
        y = (x.flip(1).float() @ (weight if transposed else weight.t()).flip(0).float()).to(x.dtype)
        y = y if bias is None else y + bias
    reference.expand_(y, s, w, w1, ids, offsets)
    return y


def joined_outer(s, u, ids, offsets, first, count, dtype, drop=None):
    """A gradient that sums over all rows with a mask, so that a sick row of one group reaches every adapter."""
    index, alive = reference._route(ids - first, offsets, len(u), count)
    dw = torch.zeros(count, s.shape[2], u.shape[1], dtype=torch.float64)
    for n in range(count):
        for p in range(ids.shape[1]):
            mask = ((index[:, p] == n) & alive[:, p]).double()[:, None]
            dw[n] += (s[:, p].double() * mask).t() @ u.double()
    return dw.to(dtype)


def sloppy_sum(u, w, w1, ids, offsets, scales, scale, drop=None):
    """A shrink that accumulates in fp16."""
    rows = u.to(torch.float16).to(u.dtype)
    return (reference.shrink(rows, w, w1, ids, offsets, scales, scale).to(torch.float16) * 1.001).to(u.dtype)


@pytest.mark.parametrize(
    ("op", "mutant", "check"),
    [
        ("shrink", multiplied_mask, lambda: g.dead_is_unread("reference", torch.float32, False)),
        ("outer", joined_outer, lambda: g.live_elsewhere_stays("reference", torch.float32, True)),
        ("linear", library_base, lambda: g.batch_invariant("reference", torch.float32, True)),
        ("shrink", sloppy_sum, lambda: g.error_rule("reference", torch.float32, torch.float32, g.MANY, False)),
    ],
    ids=["multiplied-mask", "joined-outer", "library-base", "sloppy-sum"],
)
def test_broken_guarantee_is_seen(op, mutant, check, monkeypatch) -> None:
    check()
    monkeypatch.setitem(IMPLS[op], "reference", mutant)
    with pytest.raises(AssertionError):
        check()
