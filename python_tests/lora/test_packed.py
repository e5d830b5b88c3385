"""Layers that hold their frozen weights packed: memory, bits, saving and loading, copies, moves, training."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import numerics
import pytest
import torch
from torch import Tensor, nn

from s3t_ext import MaskedLoRALinear, adapt, pack, pack_layers
from s3t_ext.lora.nn import adapted_layers

every_type = pytest.mark.parametrize("dtype", numerics.TYPES, ids=str)
LAYERS, WIDTH = 3, 96


def model(dtype: torch.dtype = torch.float32, mode: str = "exact") -> nn.Sequential:
    """Make three layers with two adapters each; widths that fill no panel."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(37, 70), nn.ReLU(), nn.Linear(70, 41), nn.ReLU(), nn.Linear(41, 5)).to(dtype)
    adapt(made, stages=2, rank=3, mode=mode).table.copy_(torch.tensor([[0, 1]]))
    for layer in adapted_layers(made).values():
        layer.a, layer.b = torch.randn(2, 3, layer.in_features) / 8, torch.randn(2, 3, layer.out_features) / 8
    return made


def bits(made: nn.Module, rows: int = 7) -> tuple[Tensor, ...]:
    """Give outputs, the gradient of x and those of a trained pool of the last layer."""
    dtype = made[0].bias.dtype
    x = torch.randn(rows, 37, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    last = made[-1]
    a, b = last.a.clone().requires_grad_(), last.b.clone().requires_grad_()
    frozen = last.a, last.b
    last.a, last.b, last.train_pool = frozen[0][:0], frozen[1][:0], (a, b)
    y = made(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    (last.a, last.b), last.train_pool = frozen, None
    return y.detach(), x.grad, a.grad, b.grad


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(f.dtype == w.dtype and torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def held(made: nn.Module) -> int:
    """Count the bytes of all different storages of matrices that layers hold: plain weights and panels."""
    layers = [m for m in made.modules() if isinstance(m, MaskedLoRALinear)]
    tensors = [t for m in layers for t in (*m.parameters(), *(m.packed or ())) if isinstance(t, Tensor) and t.dim() > 1]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@every_type
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [1, 70])
def test_packed_layers_have_the_bits_of_plain_ones(dtype, backward, rows) -> None:
    plain, made = model(dtype), pack_layers(model(dtype), backward=backward)
    assert [m.packed.turned is not None for m in adapted_layers(made).values()] == [False, backward, backward]
    assert same(bits(made, rows), bits(plain, rows))


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_packed_layers_compile_to_one_graph(mode) -> None:
    made, x = pack_layers(model(mode=mode)), torch.randn(4, 37)
    want = made(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(x), want)


@every_type
@pytest.mark.parametrize(("backward", "times"), [(False, 1), (True, 2)])
def test_memory(dtype, backward, times) -> None:
    """The plain weight is gone: with the original layer, with nothing collected, and from the model itself."""
    originals = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS + 1)))
    gc.collect()
    gc.disable()
    try:
        storages = [weakref.ref(layer.weight.untyped_storage()) for layer in originals]
        weights = [weakref.ref(layer.weight) for layer in originals]
        adapt(originals, stages=1)
        pack_layers(originals, backward=backward)
        assert [ref() for ref in weights + storages] == [None] * (2 * LAYERS + 2)
    finally:
        gc.enable()
    one = WIDTH * WIDTH * dtype.itemsize
    assert held(originals) == one + times * LAYERS * one, "the first layer's x gets no gradient"
    assert held(pack_layers(originals)) == (LAYERS + 1) * one, "to serve what was trained"
    assert not [name for name, p in originals.named_parameters() if p.dim() > 1]


def test_packing_again_for_training_frees_the_panels_first(monkeypatch) -> None:
    layer = pack_layers(model())[0]
    panels = weakref.ref(layer.packed.panels.untyped_storage())
    found: list[object] = []
    monkeypatch.setattr("s3t_ext.lora.nn.pack", lambda *args, **keys: (found.append(panels()), pack(*args, **keys))[1])
    assert layer.pack(backward=True).packed.turned is not None
    assert found == [None]


def test_packing_is_idempotent_and_undone_by_unpack() -> None:
    made = model()
    weights, want = [m.weight.clone() for m in adapted_layers(made).values()], bits(made)
    pack_layers(made, backward=True)
    panels = [m.packed.panels for m in adapted_layers(made).values()]
    pack_layers(pack_layers(made, backward=True))
    assert all(m.packed.panels is p for m, p in zip(adapted_layers(made).values(), panels)), "nothing was done again"
    assert "packed=True" in repr(made[0])
    for layer, weight in zip(adapted_layers(made).values(), weights):
        layer.weight.zero_()
        assert torch.equal(layer.weight, weight), "a copy"
        assert layer.unpack().packed is None
        assert isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer.weight, weight)
    assert same(bits(made), want)


def test_the_weight_of_one_column_is_a_copy_too() -> None:
    made = nn.Sequential(nn.Linear(1, 32))
    adapt(made, stages=1)
    want = made[0].weight.clone()
    pack_layers(made)
    made[0].weight.zero_()
    assert torch.equal(made[0].weight, want)


def test_a_shared_layer_is_packed_once() -> None:
    made = nn.ModuleDict({"one": nn.Linear(4, 4)})
    made["two"] = made["one"]
    adapt(made, stages=1)
    assert pack_layers(made)["one"] is made["two"]
    assert made["one"].packed.panels is made["two"].packed.panels
    assert set(made.state_dict()) == {"one.weight", "one.bias", "two.weight", "two.bias"}


@every_type
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_plain_and_load_anywhere(dtype, assign) -> None:
    plain, made = model(dtype), pack_layers(model(dtype), backward=True)
    state, want = made.state_dict(), bits(plain)
    assert set(state) == set(plain.state_dict())
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    sizes = [t.untyped_storage().nbytes() == t.nbytes for t in state.values()]
    assert all(sizes), "no padding is saved"
    for other in (model(dtype), pack_layers(model(dtype), backward=True)):
        for name, value in other.state_dict().items():
            other.load_state_dict({**state, name: torch.zeros_like(value)})
        kinds = [m.packed is not None and m.packed.turned is not None for m in adapted_layers(other).values()]
        other.load_state_dict(state, assign=assign)
        assert same(bits(other), want)
        again = [m.packed is not None and m.packed.turned is not None for m in adapted_layers(other).values()]
        assert again == kinds, "as it was before"
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight"'):
        made.load_state_dict({name: value for name, value in state.items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        made.load_state_dict({**state, "0.weight": torch.zeros(2, 2)})
    assert same(bits(made), want)


def test_copies_and_files() -> None:
    made = pack_layers(model(), backward=True)
    want = bits(made)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert same(bits(other), want)
        assert held(other) == held(made)
        assert other[0].packed.panels.data_ptr() != made[0].packed.panels.data_ptr()
        other[0].packed.panels.zero_()
    assert same(bits(made), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_model_is_packed_anew(dtype) -> None:
    want, made = bits(model().to(dtype)), pack_layers(model(), backward=True).to(dtype)
    assert made[0].packed.panels.dtype == dtype
    assert made[2].packed.turned.dtype == dtype
    assert same(bits(made), want)
    panels = made[0].packed.panels.data_ptr()
    made.to(dtype).to("cpu").to(memory_format=torch.channels_last)
    assert made[0].packed.panels.data_ptr() == panels, "what changes nothing costs nothing"
    assert same(bits(made), want)


def test_where_panels_are_not_served_layers_become_plain() -> None:
    want, made = model().double(), pack_layers(model(), backward=True).double()
    assert [m.packed for m in adapted_layers(made).values()] == [None] * LAYERS
    for layer, other in zip(adapted_layers(made).values(), adapted_layers(want).values()):
        assert torch.equal(layer.weight, other.weight)
    assert pack_layers(made) is made
    moved = pack_layers(model()).to("meta")
    assert moved[0].packed is None
    assert moved[0].weight.device.type == "meta"
    with pytest.raises(NotImplementedError, match="panels are for the CPU"):
        moved[0].pack()


def test_memory_shared_between_processes_is_shared_packed() -> None:
    made = pack_layers(model(), backward=True)
    want = bits(made)
    made.share_memory()
    assert all(t.is_shared() for m in (made[0], made[2]) for t in m.packed if isinstance(t, Tensor))
    assert same(bits(made), want)


def test_an_assigned_weight_counts() -> None:
    made = pack_layers(model())
    with pytest.raises(TypeError, match="weight"):
        made[0].weight = torch.zeros(70, 37)
    assert made[0].packed is not None, "nothing was changed"
    made[0].weight = nn.Parameter(torch.zeros(70, 37), requires_grad=False)
    made[0].bias.zero_()
    made[0].a.zero_()
    assert not made[0](torch.randn(3, 37)).any()
    assert not made[0].pack()(torch.randn(3, 37)).any()


@every_type
def test_two_steps_of_training(dtype) -> None:
    def train(made: nn.Module) -> list[Tensor]:
        pools = []
        for layer in adapted_layers(made).values():
            layer.train_pool = (layer.a.clone().requires_grad_(), layer.b.clone().requires_grad_())
            layer.a, layer.b = layer.a[:0], layer.b[:0]
            pools += layer.train_pool
        optimizer = torch.optim.SGD(pools, lr=0.01)
        x = torch.randn(9, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
        for _ in range(2):
            optimizer.zero_grad()
            made(x).float().square().mean().backward()
            optimizer.step()
        return pools

    start = [t for m in adapted_layers(model(dtype)).values() for t in (m.a, m.b)]
    wanted, found = train(model(dtype)), train(pack_layers(model(dtype), backward=True))
    assert all(t.isfinite().all() for t in wanted)
    assert not any(torch.equal(a, b) for a, b in zip(wanted, start))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_weight_that_is_lent_is_used() -> None:
    plain, packed = model(), pack_layers(model())
    name = next(n for n, m in plain.named_modules() if isinstance(m, MaskedLoRALinear))
    lent = {f"{name}.weight": torch.randn_like(plain.get_submodule(name).weight)}
    x = torch.randn(3, plain.get_submodule(name).in_features)
    layers = (m.get_submodule(name) for m in (plain, packed))
    found = [torch.func.functional_call(m, {"weight": lent[f"{name}.weight"]}, (x,)) for m in layers]
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain.get_submodule(name)(x))
