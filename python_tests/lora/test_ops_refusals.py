"""Bad input to the public ops: an error in one line, which names the argument, what is allowed and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guarantees import MANY
from numerics import SHAPES, TYPES, make
from test_ops import BACKENDS, Calls, dropout

from s3t_ext import masked_lora, masked_lora_linear, pack

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@every_backend
def test_one_strided_row(backend) -> None:
    """A single row must be contiguous as well: its elements are not where a kernel looks for them."""
    case = make(SHAPES[1], torch.float32)
    x = torch.randn(1, 2 * case.x.shape[1])[:, ::2]
    with pytest.raises(ValueError, match="x"):
        masked_lora(x, case.a, case.b, case.ids, backend=backend)
    masked_lora(x.contiguous(), case.a, case.b, case.ids, backend=backend)


@every_type
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("given", "packed"), [(9, 10), (10, 9), (9, 8), (10, 11)])
def test_a_packed_weight_of_another_width_is_refused(dtype, autocast, given, packed) -> None:
    """Of bf16, panels hold an even number of columns: 9 and 10 have the same shape."""
    x, a, b = torch.ones(3, given, dtype=dtype), torch.ones(1, 2, given), torch.ones(1, 2, 12)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    weight = pack(torch.ones(12, packed, dtype=dtype), backward=True)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=rf"^x: expected \(T, {packed}\)"):
        masked_lora_linear(x, weight, None, a, b, ids)


@every_type
def test_a_packed_weight_tells_its_sizes(dtype) -> None:
    weight = torch.ones(12, 9, dtype=dtype)
    assert pack(weight)[1:] == (12, 9, None)
    x, a, b = torch.ones(3, 9, dtype=dtype), torch.ones(1, 2, 9), torch.ones(1, 2, 12)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    for outputs, backward, name in ((20, False, "b"), (20, True, "weight"), (33, False, "weight")):
        changed = pack(weight, backward=backward)._replace(out_features=outputs)
        with pytest.raises(ValueError, match=f"^{name}: "):
            masked_lora_linear(x, changed, None, a, b, ids)


def _calls():
    case = make(MANY, torch.float32)
    good = {
        "x": case.x,
        "weight": case.weight,
        "bias": case.bias,
        "a": case.a,
        "b": case.b,
        "adapter_ids": case.ids,
        "offsets": case.offsets,
        "scale": case.scales,
        "train": None,
        "dropout": None,
        "mode": "exact",
    }
    off = case.offsets
    return good, [
        ("x", case.x[0], ValueError),
        ("x", case.x.t().contiguous().t(), ValueError),
        ("x", case.x.long(), NotImplementedError),
        ("weight", case.weight[:, :-1], ValueError),
        ("weight", case.weight.bfloat16(), ValueError),
        ("weight", case.weight.clone().requires_grad_(), ValueError),
        ("weight", pack(case.weight)._replace(out_features=case.weight.shape[0] + 64), ValueError),
        ("weight", pack(case.weight)._replace(turned=case.weight.t().contiguous()), ValueError),
        ("bias", case.bias[:-1], ValueError),
        ("bias", case.bias.clone().requires_grad_(), ValueError),
        ("a", case.a[:, :, :-1], ValueError),
        ("a", case.a.bfloat16(), ValueError),
        ("a", case.a[::2], ValueError),
        ("b", case.b[:, :-1], ValueError),
        ("b", case.b[0], ValueError),
        ("b", case.b.transpose(0, 1), ValueError),
        ("adapter_ids", case.ids.long(), ValueError),
        ("adapter_ids", case.ids[0], ValueError),
        ("adapter_ids", case.ids + 100, ValueError),
        ("adapter_ids", case.ids - 5, ValueError),
        ("offsets", off.long(), ValueError),
        ("offsets", off[:-1], ValueError),
        ("offsets", off + 1, ValueError),
        ("offsets", off.flip(0).contiguous(), ValueError),
        ("adapter_ids", None, ValueError),
        ("scale", case.scales[:-1], ValueError),
        ("scale", case.scales.double(), ValueError),
        ("train", (case.a,), ValueError),
        ("train", (1, 2), ValueError),
        ("scale", case.scales.clone().requires_grad_(), ValueError),
        ("train", (case.a, case.b[:2]), ValueError),
        ("train", (case.a[..., :-1].contiguous(), case.b), ValueError),
        ("mode", "quick", ValueError),
        ("mode", None, ValueError),
        ("x", None, ValueError),
        ("x", case.x[:, :-1].contiguous(), ValueError),
        ("weight", "W", ValueError),
        ("weight", (case.weight, 70), ValueError),
        ("weight", case.weight[0], ValueError),
        ("bias", 0.5, ValueError),
        ("a", case.a.numpy(), ValueError),
        ("adapter_ids", [[0, 1]], ValueError),
        ("offsets", case.offsets.tolist(), ValueError),
        ("scale", None, ValueError),
        ("scale", "2", ValueError),
        ("scale", torch.tensor(2.0), ValueError),
        ("dropout", (0.1, None, None), ValueError),
        ("dropout", 0.1, ValueError),
        ("dropout", (1.0, *dropout(case)[1:]), ValueError),
        ("dropout", (0.1, dropout(case)[1].int(), dropout(case)[2]), ValueError),
        ("dropout", (0.1, dropout(case)[1], dropout(case)[2][1:]), ValueError),
    ]


@pytest.mark.parametrize("number", range(len(_calls()[1])))
def test_bad_input_is_named(number) -> None:
    good, bad = _calls()
    name, value, error = bad[number]
    call = {**good, name: value}
    if name == "adapter_ids" and value is None:  # two groups and no offsets
        call = {**good, "offsets": None}
    with pytest.raises(error, match=name) as caught:
        masked_lora_linear(**call)
    assert "\n" not in str(caught.value)
    with Calls(), pytest.raises(error) as watched:  # as a torch op, see test_autograd
        masked_lora_linear(**call)
    assert str(watched.value) == str(caught.value)


def test_what_came_is_told_from_what_was_wanted() -> None:
    case = make(MANY, torch.float32)
    with pytest.raises(ValueError, match=r"weight: .*got .*strides \(1, 70\)"):
        masked_lora_linear(case.x, case.weight.t().contiguous().t(), None, case.a, case.b, case.ids, case.offsets)
    with pytest.raises(ValueError, match="scale"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, scale=torch.tensor(2.0), dropout=dropout(case))


@pytest.mark.parametrize(
    "weight",
    [
        np.ones((4, 6)),
        torch.nn.Linear(6, 4),
        pack(torch.ones(4, 6)),
        None,
        [[1.0]],
        torch.ones(6),
        torch.ones(6, 4).t(),
    ],
    ids=["numpy", "linear", "packed", "none", "list", "vector", "transposed"],
)
def test_pack_says_what_to_give(weight) -> None:
    with pytest.raises(ValueError, match=r"^weight: expected a contiguous"):
        pack(weight)


@pytest.mark.parametrize("mode", ["exact", "split"])
def test_a_packed_weight_of_another_type_says_what_to_do(mode) -> None:
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        case = make(MANY, dtype, pool=torch.float32)
        had, has = str(other).removeprefix("torch."), str(dtype).removeprefix("torch.")
        with pytest.raises(
            ValueError, match=rf"^weight: packed as {had}, x is {has}; give pack\(weight.to\({dtype}\)\)"
        ):
            masked_lora_linear(
                *(case.x, pack(case.weight.to(other)), case.bias, case.a, case.b, case.ids, case.offsets), mode=mode
            )


@every_type
def test_panels_come_as_the_packed_that_holds_them(dtype) -> None:
    case = make(MANY, dtype)
    panels = pack(case.weight).panels
    with pytest.raises(ValueError, match=r"^weight: expected a matrix \(O, K\), or the Packed that pack\(\) returned"):
        masked_lora_linear(case.x, panels, case.bias, case.a, case.b, case.ids, case.offsets)


@pytest.mark.parametrize(
    "scale", [np.float32(2), np.float64(2), np.int64(2), 2], ids=lambda scale: type(scale).__name__
)
def test_a_scale_is_any_real_number(scale) -> None:
    case = make(MANY, torch.float32)
    args = (case.x, case.a, case.b, case.ids, case.offsets)
    for keys in (None, dropout(case)):
        assert torch.equal(masked_lora(*args, scale=scale, dropout=keys), masked_lora(*args, scale=2.0, dropout=keys))


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make(MANY, torch.float32)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, backend="triton")


def test_unknown_backend_and_type_are_refused() -> None:
    case = make(MANY, torch.float32)
    with pytest.raises(ValueError, match="backend"):
        masked_lora(case.x, case.a, case.b, case.ids, case.offsets, backend="cudnn")
    double = make(MANY, torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        masked_lora(double.x, double.a, double.b, double.ids, double.offsets, backend="native")
