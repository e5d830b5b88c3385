"""The two halves of a model around a block, and padding by record."""

from __future__ import annotations

import pytest
import torch

from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length, padded_length
from s3t_ext.models.folder import ARCHITECTURES, build


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request) -> BaseModel:
    torch.manual_seed(0)
    return build(request.param, {}).eval()


def ran(model: BaseModel) -> list[int]:
    """Note the numbers of the blocks that run."""
    numbers: list[int] = []
    for k, block in enumerate(model.block_list()):
        block.register_forward_hook(lambda *_, k=k: numbers.append(k))
    return numbers


def test_above_goes_on_from_below_to_the_bits_of_forward(model) -> None:
    x, numbers = torch.randn(5, *model.shape), ran(model)
    whole = model(x)
    for block in range(4):
        numbers.clear()
        hidden = model.below(x, block)
        assert numbers == list(range(block))
        numbers.clear()
        assert torch.equal(model.above(hidden, x, block), whole)
        assert numbers == list(range(block, 4))
        assert not torch.equal(model.above(hidden + 1.5 * hidden.roll(1, 0), x, block), whole), "hidden is read"
    assert torch.equal(model(x), whole), "all blocks are in their places again"


def test_gradients_stop_at_the_cut(model) -> None:
    x = torch.randn(3, *model.shape)
    hidden = model.below(x, 2).detach().requires_grad_()
    model.above(hidden, x, 2).sum().backward()
    assert hidden.grad is not None
    touched = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "layers" in name}
    assert touched == {"2", "3"}


def test_blocks_are_put_back_after_an_error(model) -> None:
    x = torch.randn(3, *model.shape)
    whole = model(x)
    with pytest.raises((RuntimeError, ValueError)):
        model.above(torch.randn(3, 7), x, 2)
    assert torch.equal(model(x), whole)
    with pytest.raises(ValueError, match="block: expected a number from 0 to 3, got 4"):
        model.below(x, 4)
    model.blocks = "norm"
    with pytest.raises(ValueError, match=r"blocks: .*\['layers'\], got 'norm'"):
        model.below(x, 0)


def test_a_padded_length_is_a_function_of_the_record() -> None:
    assert [padded_length(n) for n in (0, 1, 8, 9, 24)] == [8, 8, 8, 16, 24]
    assert padded_length(17, 20) == 20
    x = torch.full((5, 20), -1, dtype=torch.int32)
    lengths = (3, 17, 8, 20, 16)
    for row, length in enumerate(lengths):
        x[row, :length] = torch.arange(length, dtype=torch.int32)
    parts = by_length(x)
    assert [(rows.tolist(), part.shape[1]) for rows, part in parts] == [([0, 2], 8), ([4], 16), ([1, 3], 20)]
    for rows, part in parts:
        for row, tokens in zip(rows.tolist(), part, strict=True):
            assert torch.equal(tokens, x[row, : len(tokens)])
            alone = by_length(x[row : row + 1])
            assert len(alone) == 1
            assert torch.equal(alone[0][1][0], tokens)
    assert by_length(x[:0]) == []


def test_numbers_are_one_part() -> None:
    for x in (torch.randn(3, 4), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)):
        ((rows, part),) = by_length(x)
        assert rows.tolist() == [0, 1, 2]
        assert part is x
