"""Layers over a routing table, the optimizer whose nodes never mix, and streams."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from s3t_ext import adapt
from s3t_ext.lora.nn import MaskedLoRALinear, adapted_layers, matches
from s3t_ext.lora.optim import AdamW
from s3t_ext.lora.rng import stream, uniform
from s3t_ext.lora.routing import Routing


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layer:
            x = x + layer(x).relu()
        return self.out(x)


def test_targets_are_names_not_substrings() -> None:
    assert matches("base.layer.1", ["layer.1"])
    assert not matches("base.layer.11", ["layer.1"])
    assert not matches("base.xlayer.1", ["layer.1"])
    assert matches("a.b.q", r".*\.q")
    assert not matches("a.b.q2", r".*\.q")
    model = Two()
    adapt(model, ["layer.1"], stages=2)
    assert list(adapted_layers(model)) == ["layer.1"]


def test_a_masked_model_is_the_base_model() -> None:
    model, x = Two(), torch.randn(20, 8)
    base = model(x)
    adapt(model, stages=2)
    assert all(isinstance(m, MaskedLoRALinear) for m in (*model.layer, model.out)), "every linear layer is exact"
    torch.testing.assert_close(model(x), base)
    assert torch.equal(model(x[3:4]), model(x)[3:4])


def test_dropout_reaches_every_row_of_a_sample_by_its_own_key() -> None:
    """Tokens of a sample and layers of a model have masks of their own; a sample's place has no say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    routing = adapt(model, stages=1, groups=2, rank=2)
    for layer in adapted_layers(model).values():
        layer.train_pool = (torch.randn(2, 2, 64), torch.randn(2, 2, 64))
    routing.table.copy_(torch.tensor([[0], [1]], dtype=torch.int32))
    x = torch.randn(1, 1, 64).expand(4, 5, 64)
    seeds, keys = torch.tensor([[1, 2], [3, 4]]), torch.tensor([11, 12, 13, 14])

    def run(order: list[int], layer: int) -> torch.Tensor:
        with torch.no_grad(), routing.batch([2, 2], dropout=(0.4, seeds, keys[order])):
            return model[layer](x)

    one = run([0, 1, 2, 3], 0)
    assert len({tuple(row.tolist()) for row in one.reshape(20, 64)}) == 20, "every row has a mask of its own"
    assert torch.equal(run([1, 0, 2, 3], 0), one[[1, 0, 2, 3]])
    model[1].weight.copy_(model[0].weight)
    model[1].bias.copy_(model[0].bias)
    model[1].train_pool = model[0].train_pool
    assert not torch.equal(run([0, 1, 2, 3], 1), one), "layers differ by their seeds"
    model[0].train_pool, model[0].a, model[0].b = None, *model[0].train_pool
    assert len({tuple(row.tolist()) for row in run([0, 1, 2, 3], 0).reshape(20, 64)}) == 2, "serving drops nothing"


def test_the_table_lies_where_the_model_does() -> None:
    assert adapt(Two().to("meta"), stages=2).table.device.type == "meta"


def test_what_a_graph_captured_stays(monkeypatch) -> None:
    """A replay reads the offsets at their address, whatever layouts have come since."""
    routing = Routing(2, 1)

    def edges(first: int) -> weakref.ref:
        with routing.batch([first, 1]):
            return weakref.ref(routing._active.edges)

    passing = edges(1)
    monkeypatch.setattr("s3t_ext.lora.routing._captures", lambda t: True)
    captured = edges(2)
    monkeypatch.undo()
    for other in range(3, 103):
        edges(other)
    assert captured() is not None
    assert passing() is None, "what nothing captured is not kept for good"


def test_no_matching_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="targets"):
        adapt(Two(), ["lm_head"], stages=2)
    with pytest.raises(ValueError, match="stage_of"):
        adapt(Two(), ["out"], stages=2, stage_of={})


def test_groups_use_their_own_adapters() -> None:
    """Three groups, tokens per sample, two stages: each equals its own hand-written sum."""
    linear = nn.Linear(5, 4)
    model = nn.Sequential(linear)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    routing = adapt(model, stages=2, groups=3, rank=2, scale=0.5)
    layer = model[0]
    layer.a, layer.b = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    routing.table.copy_(torch.tensor([[0, 2], [-1, -1], [1, -1]]))
    x = torch.randn(6, 7, 5)
    with routing.batch([1, 3, 2]):
        y = model(x)
    for g, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        want = x[rows] @ weight.t() + bias
        for n in routing.table[g].tolist():
            if n >= 0:
                want = want + 0.5 * (x[rows] @ layer.a[n].t()) @ layer.b[n]
        torch.testing.assert_close(y[rows], want)
    with routing.batch([1, 3, 2]), pytest.raises(ValueError, match="6 samples"):
        model(x[:5])
    with pytest.raises(ValueError, match="counts"), routing.batch([1, 2]):
        pass


def test_a_layer_reads_its_own_columns() -> None:
    """Placement ``layers``, inside of a pass and outside."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    routing = adapt(model, stages=2, rank=2, stage_of={"0": 0, "1": 1})
    for layer in model:
        layer.a, layer.b = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    base = model(x)
    routing.table.copy_(torch.tensor([[-1, 0]]))
    want = model(x)
    assert not torch.equal(want, base)
    with routing.batch([3]):
        assert torch.equal(model(x), want)
    model[0].a.fill_(torch.nan)
    assert torch.equal(model(x), want), "the first layer's column is masked"


def test_layers_take_what_linear_takes() -> None:
    model, x = nn.Sequential(nn.Linear(8, 3)), torch.randn(16, 16)
    inputs = (x[:1, ::2], x[:, ::2], x[:8].t(), x[0, :8], torch.randn(2, 0, 8))
    want = [model(v) for v in inputs]
    adapt(model, stages=1)
    for v, y in zip(inputs, want):
        torch.testing.assert_close(model(v), y)


def test_a_shared_layer_stays_shared_and_subclasses_are_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})
    model["two"] = model["one"]
    adapt(model, stages=1)
    assert model["one"] is model["two"]
    assert isinstance(model["one"], MaskedLoRALinear)
    with pytest.raises(ValueError, match="out_proj"):
        adapt(nn.TransformerEncoderLayer(8, 2), stages=1)


def test_rows_without_padding_are_routed_and_dropped_as_with_it() -> None:
    torch.manual_seed(0)
    lengths, groups = [2, 5, 1, 3], [1, 3]
    x = torch.randn(4, 5, 64)
    own = torch.arange(5) < torch.tensor(lengths)[:, None]  # (4, 5)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    routing = adapt(model, stages=1, groups=2, rank=2)
    for layer in adapted_layers(model).values():
        layer.train_pool = (torch.randn(2, 2, 64), torch.randn(2, 2, 64))
    routing.table.copy_(torch.tensor([[0], [1]], dtype=torch.int32))
    dropout = (0.5, torch.tensor([[1, 2], [3, 4]]), torch.tensor([11, 12, 13, 14]))
    for drops in (None, dropout):
        with routing.batch(groups, dropout=drops):
            padded = model(x)
            with routing.tokens(starts):
                assert torch.equal(model(x[own][:, None])[:, 0], padded[own])
            assert torch.equal(model(x), padded), "as it was before"
    with (
        routing.batch(groups),
        pytest.raises(ValueError, match="starts: expected 5 numbers"),
        routing.tokens(starts[:-1]),
    ):
        pass
    with routing.tokens(starts[:1]):  # without a pass there is one group of all rows
        assert routing.view(slice(0, 1), x)[1] is None


def test_one_forward_reads_one_snapshot_of_the_table() -> None:
    model = Two()
    routing = adapt(model, stages=1, rank=2)
    for layer in adapted_layers(model).values():
        layer.a, layer.b = torch.randn(1, 2, layer.in_features), torch.randn(1, 2, layer.out_features)
    routing.table.fill_(0)
    x = torch.randn(4, 8)
    with routing.batch([4]):
        whole = model(x)
    handle = model.layer[5].register_forward_hook(lambda *_: routing.table.fill_(-1) and None)
    with routing.batch([4]):
        assert torch.equal(model(x), whole), "a deletion in mid-pass does not mix two states in one answer"
    handle.remove()
    with routing.batch([4]):
        assert not torch.equal(model(x), whole)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs_within_rounding_and_alone_bit_for_bit(weight_decay) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(3, 7, 5), torch.randn(20, 3, 7, 5)
    theirs = start.clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], weight_decay=weight_decay, lr=0.01)

    def run(nodes: list[int]) -> torch.Tensor:
        p = start[nodes].clone().requires_grad_()
        optimizer = AdamW([p], weight_decay=weight_decay)
        for g in grads:
            p.grad.add_(g[nodes])
            optimizer.step(0.01)
        return p.detach()

    ours = run([0, 1, 2])
    for g in grads:
        theirs.grad = g.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    for node in range(3):
        assert torch.equal(run([node])[0], ours[node])
    assert torch.equal(run([2, 0])[1], ours[0])


def test_uniform_is_fixed_for_ever_and_within_bounds() -> None:
    key = bytes(range(32))
    values = uniform(key, (1000, 7), 0.25)
    assert values.dtype == torch.float32
    assert float(values.abs().max()) < 0.25
    assert abs(float(values.mean())) < 0.01
    assert torch.equal(uniform(key, (7,), 0.25), values.flatten()[:7]), "longer draws begin alike"
    assert values.flatten()[:3].tolist() == [0.1380683034658432, 0.23060260713100433, -0.11703477799892426]
    assert not torch.equal(uniform(bytes(32), (1000, 7), 0.25), values)
    with pytest.raises(ValueError, match="key"):
        stream(b"short")


def test_stream_is_philox_4x64() -> None:
    """The known answer of Random123 (Salmon et al.) for counter 0 and key 0; numpy increments before it draws."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == known
    assert stream(bytes(16)).random_raw(4).tolist() == np.random.Philox(key=0).random_raw(4).tolist()


def test_what_a_tracer_lays_out_is_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    routing = Routing(2, 1)
    with FakeTensorMode(allow_non_fake_inputs=True), routing.batch([3, 4]):
        pass
    with routing.batch([3, 4]):
        _, offsets = routing.view(slice(0, 1), torch.zeros(7, 2))
    assert offsets.tolist() == [0, 3, 7]


def test_a_parametrized_layer_computes_what_it_reads() -> None:
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    model = nn.Sequential(nn.Linear(6, 5))
    adapt(model, rank=2, stages=1)
    x, bias = torch.randn(4, 6), model[0].bias.detach().clone()
    before = model(x)
    torch.nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
    torch.testing.assert_close(model(x), before + bias)
