"""The primitives of ``kernels.IMPLS`` as torch ops ``s3t::shrink`` and so on: schema, backend, fake.

As ops they are opaque to a compiler, and each is one node of its graph. ``KERNELS`` has the functions behind them under
the same names, for calls that nothing watches. ``backend`` is one that ``paths.path_for`` named.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from s3t_ext.lora.check import check_values
from s3t_ext.lora.kernels import IMPLS
from s3t_ext.lora.kernels.dropout import Dropout

LIB = torch.library.Library("s3t", "DEF")
TABLE = "Tensor adapter_ids, Tensor? offsets"
SCALE = "Tensor? scales, float scale"
DROP = "Tensor? seeds, Tensor? rows, float p"
LIB.define(f"shrink(Tensor u, Tensor w, Tensor? w1, {TABLE}, {SCALE}, {DROP}, str backend) -> Tensor")
LIB.define(f"expand_(Tensor(a!) y, Tensor s, Tensor w, Tensor? w1, {TABLE}, {DROP}, str backend) -> ()")
LIB.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor w, Tensor? w1, {TABLE},"
    f" int out_features, bool transposed, {DROP}, str backend) -> Tensor"
)
LIB.define(
    f"layer(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor? a1, Tensor b, Tensor? b1, {TABLE}, {SCALE},"
    f" int out_features, {DROP}, str backend) -> (Tensor, Tensor)"
)
LIB.define(f"outer(Tensor s, Tensor u, {TABLE}, int first, int count, ScalarType dtype, {DROP}, str backend) -> Tensor")


def _drop(
    seeds: Tensor | None, rows: Tensor | None, p: float, w: Tensor | None = None, w1: Tensor | None = None
) -> Dropout | None:
    """Describe dropout of the trainable adapters: those of w1, or all."""
    if seeds is None or rows is None:
        return None
    return Dropout(p, seeds, rows, 0 if w is None or w1 is None else w.shape[0])


def _shrink(u, w, w1, ids, offsets, scales, scale, seeds, rows, p, backend):
    check_values(ids, offsets, u.shape[0], w.shape[0] + (0 if w1 is None else w1.shape[0]))
    fn = IMPLS["shrink"][backend]
    return fn(u, w, w1, ids, offsets, scales, scale, _drop(seeds, rows, p, w, w1))


def _expand_(y, s, w, w1, ids, offsets, seeds, rows, p, backend):
    fn = IMPLS["expand_"][backend]
    fn(y, s, w, w1, ids, offsets, _drop(seeds, rows, p, w, w1))


def _linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, seeds, rows, p, backend):
    fn = IMPLS["linear"][backend]
    drop = _drop(seeds, rows, p, w, w1)
    return fn(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, drop)


def _layer(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, seeds, rows, p, backend):
    check_values(ids, offsets, x.shape[0], a.shape[0] + (0 if a1 is None else a1.shape[0]))
    fn = IMPLS["layer"][backend]
    drop = _drop(seeds, rows, p, a, a1)
    return fn(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, drop)


def _outer(s, u, ids, offsets, first, count, dtype, seeds, rows, p, backend):
    fn = IMPLS["outer"][backend]
    return fn(s, u, ids, offsets, first, count, dtype, None if seeds is None else Dropout(p, seeds, rows, first))


def _fake_linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, *_):
    return x.new_empty(x.shape[0], w.shape[2])  # (T, O), transposed: (T, K)


def _fake_layer(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, *_):
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], ids.shape[1], a.shape[1])  # (T, O), (T, P, r)


def _fake_outer(s, u, ids, offsets, first, count, dtype, *_):
    return u.new_empty(count, s.shape[2], u.shape[1], dtype=dtype)  # (count, r, D)


KERNELS = SimpleNamespace(shrink=_shrink, expand_=_expand_, linear=_linear, layer=_layer, outer=_outer)
for _name, _like in (
    ("shrink", lambda u, w, w1, ids, *_: u.new_empty(u.shape[0], ids.shape[1], w.shape[1])),  # (T, P, r)
    ("expand_", lambda *_: None),
    ("linear", _fake_linear),
    ("layer", _fake_layer),
    ("outer", _fake_outer),
):
    LIB.impl(_name, getattr(KERNELS, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", _like, lib=LIB)
