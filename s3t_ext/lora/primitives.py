"""The primitives of ``kernels.IMPLS`` as torch ops ``s3t::shrink`` and so on: schema, backend, fake.

As ops they are opaque to a compiler, and each is one node of its graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3t_ext.lora.check import check_values
from s3t_ext.lora.kernels import IMPLS, backend_for
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


def _drop(seeds: Tensor | None, rows: Tensor | None, p: float, first: int) -> Dropout | None:
    return None if seeds is None or rows is None else Dropout(p, seeds, rows, first)


def _first(w: Tensor, w1: Tensor | None) -> int:
    """Number of the first trainable adapter."""
    return 0 if w1 is None else len(w)


def _shrink(u, w, w1, ids, offsets, scales, scale, seeds, rows, p, backend):
    check_values(ids, offsets, u.shape[0], w.shape[0] + (0 if w1 is None else w1.shape[0]))
    fn = IMPLS["shrink"][backend_for("shrink", u.device, u.dtype, backend)]
    return fn(u, w, w1, ids, offsets, scales, scale, _drop(seeds, rows, p, _first(w, w1)))


def _expand_(y, s, w, w1, ids, offsets, seeds, rows, p, backend):
    fn = IMPLS["expand_"][backend_for("expand_", y.device, y.dtype, backend)]
    fn(y, s, w, w1, ids, offsets, _drop(seeds, rows, p, _first(w, w1)))


def _linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, seeds, rows, p, backend):
    fn = IMPLS["linear"][backend_for("linear", x.device, x.dtype, backend)]
    drop = _drop(seeds, rows, p, _first(w, w1))
    return fn(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, drop)


def _layer(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, seeds, rows, p, backend):
    check_values(ids, offsets, x.shape[0], a.shape[0] + (0 if a1 is None else a1.shape[0]))
    fn = IMPLS["layer"][backend_for("layer", x.device, x.dtype, backend)]
    drop = _drop(seeds, rows, p, _first(a, a1))
    return fn(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, drop)


def _outer(s, u, ids, offsets, first, count, dtype, seeds, rows, p, backend):
    fn = IMPLS["outer"][backend_for("outer", u.device, u.dtype, backend)]
    return fn(s, u, ids, offsets, first, count, dtype, _drop(seeds, rows, p, first))


def _fake_linear(x, weight, bias, s, w, w1, ids, offsets, out_features, transposed, *_):
    return x.new_empty(x.shape[0], w.shape[2])  # (T, O), transposed: (T, K)


def _fake_layer(x, weight, bias, a, a1, b, b1, ids, offsets, scales, scale, out_features, *_):
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], ids.shape[1], a.shape[1])  # (T, O), (T, P, r)


def _fake_outer(s, u, ids, offsets, first, count, dtype, *_):
    return u.new_empty(count, s.shape[2], u.shape[1], dtype=dtype)  # (count, r, D)


for _name, _real, _like in (
    ("shrink", _shrink, lambda u, w, w1, ids, *_: u.new_empty(u.shape[0], ids.shape[1], w.shape[1])),  # (T, P, r)
    ("expand_", _expand_, lambda *_: None),
    ("linear", _linear, _fake_linear),
    ("layer", _layer, _fake_layer),
    ("outer", _outer, _fake_outer),
):
    LIB.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s3t::{_name}", _like, lib=LIB)
