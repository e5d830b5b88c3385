"""Blindspot and Gaussian fine-tuning where the answer is known, and their measures."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import wasserstein_distance
from small import Net, line, linear
from torch import nn

from s3t_ext.approximate import Records, unlearn
from s3t_ext.approximate.regression import (
    absolute_error,
    attention,
    prediction_distance,
    redrawn,
    relearn_steps,
    watched,
)

# Two kinds of records that share no weight: what the model says of one can be wrong of the other.
GONE = Records(
    torch.tensor([[1.0, 0.0]]).repeat(300, 1), torch.linspace(0, 8, 300)[:, None], tuple(map(str, range(300)))
)
KEPT = Records(torch.tensor([[0.0, 1.0]]).repeat(100, 1), torch.full((100, 1), 20.0))


def two_weights(gone: float, kept: float) -> nn.Linear:
    model = linear(2)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[gone, kept]]))
    return model


def test_blindspot_says_what_the_blind_model_says_and_keeps_the_others() -> None:
    found = unlearn(
        "blindspot", two_weights(4, 19.5), GONE, KEPT, seed=0, initial=two_weights(-3, 0), epochs=200,
        learning_rate=0.05, blind_epochs=0, batch=200,
    ).model  # fmt: skip
    assert found.weight[0].tolist() == pytest.approx([-3, 20], abs=0.1)


def test_the_blind_model_learns_a_little_of_the_others_alone() -> None:
    found = unlearn(
        "blindspot", two_weights(4, 20), GONE, KEPT, seed=0, initial=two_weights(-3, 0), epochs=0, blind_epochs=2,
        batch=50, blind_learning_rate=0.25,
    )  # fmt: skip
    blind = [told["loss"] for told in found.trace if told["model"] == "blind"]
    assert blind == pytest.approx([20 - 0.125, 20 - 0.625], abs=1e-3)  # four steps of a quarter towards 20
    assert found.model.weight[0].tolist() == [4, 20]


def test_the_share_weighs_the_two_terms() -> None:
    one = unlearn(
        "blindspot", two_weights(4, 10), GONE, KEPT, seed=0, initial=two_weights(-3, 0), epochs=1, blind_epochs=0,
        batch=400,
    )  # fmt: skip
    assert one.trace[-1]["loss"] == pytest.approx(0.75 * 7 + 0.25 * 10)


def test_maps_come_near_the_blind_models() -> None:
    torch.manual_seed(0)
    model, initial, data = Net(3, 8, 1), Net(3, 8, 1), line(60)
    gone, kept = data[torch.arange(20)], data[torch.arange(20, 60)]

    def apart(beta: float) -> float:
        found = unlearn(
            "blindspot",
            model,
            gone,
            kept,
            seed=0,
            initial=initial,
            beta=beta,
            epochs=300,
            blind_epochs=0,
            learning_rate=0.01,
        ).model
        maps = []
        for each in (found, initial):
            with watched(each) as seen:
                each(gone.inputs)
            maps.append(attention(seen[0]))
        return float((maps[0] - maps[1]).square().mean().detach())

    assert apart(5000) < 0.5 * apart(0)


def test_an_attention_map_has_length_one_and_no_scale() -> None:
    image = torch.zeros(1, 2, 1, 2)
    image[0, :, 0] = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert torch.equal(attention(image), torch.tensor([[1.0, 0.0]]))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(attention(x), attention(7 * x))
    assert attention(torch.randn(2, 6, 4)).shape == (2, 6)  # tokens
    assert attention(torch.randn(2, 6)).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_numbered_blocks_are_watched_where_there_are_some() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.out = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    for model, count in ((Blocks(), 3), (Net(2, 4, 1), 2)):
        with watched(model) as seen:
            model(torch.zeros(5, 2))
        assert len(seen) == count
        model(torch.zeros(5, 2))
        assert len(seen) == count  # the hooks are gone


def test_gaussian_forgets_all_but_the_mean_of_all_labels() -> None:
    everything = torch.cat([GONE.labels, KEPT.labels])
    draws = redrawn(everything, 40_000, torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(everything.mean().item(), abs=0.2)
    assert draws.std().item() == pytest.approx(everything.std().item(), rel=0.03)
    found = unlearn(
        "gaussian", two_weights(4, 19.5), GONE, KEPT, seed=0, epochs=150, learning_rate=0.05, batch=200
    ).model  # fmt: skip
    # the absolute error's minimum is the median of 300 draws, the deviation of which is 1.25 sd / sqrt(300)
    assert found.weight[0, 0].item() == pytest.approx(everything.mean().item(), abs=4 * 1.25 * 7.6 / 300**0.5)
    assert found.weight[0, 1].item() == pytest.approx(20, abs=0.1)


def test_measures() -> None:
    model, oracle, some = two_weights(2, 1), two_weights(-1, 0), Records(torch.randn(50, 2), torch.randn(50, 1))
    with torch.no_grad():
        mine, theirs = model(some.inputs)[:, 0], oracle(some.inputs)[:, 0]
    assert absolute_error(model, some) == pytest.approx((mine - some.labels[:, 0]).abs().mean().item())
    assert prediction_distance(model, oracle, some) == pytest.approx(wasserstein_distance(mine, theirs), rel=1e-5)
    level = Records(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0]]))
    for start, expected in ((4.5, 1), (0.0, 9), (-9.0, 12)):  # steps of a half up to 4.5
        steps = relearn_steps(two_weights(start, 0), level, level, 0.5001, seed=0, learning_rate=0.5, limit=12)
        assert steps == expected


@pytest.mark.parametrize("method", ["blindspot", "gaussian"])
def test_classes_are_refused(method) -> None:
    classes = Records(torch.zeros(2, 3), torch.tensor([0, 1]), ("a", "b"))
    others = Records(torch.zeros(1, 3), torch.tensor([0]), ("c",))
    with pytest.raises(ValueError, match=f"{method} is for regression, not classification"):
        unlearn(method, linear(3), classes, others, seed=0)
