"""Bytes of a plan against counts by hand and the figures of the design."""

import re

import pytest

from s3t_ext.plan import StageTree, rotation, sisa, subsets
from s3t_ext.plan.cost import memory


def by_nodes(tree, shards, adapter, of_stage):
    return shards * sum(adapter * of_stage[len(path) - 1] for path in tree.nodes)


@pytest.mark.parametrize(
    "tree", [sisa(4), rotation(4, 7), subsets(4), StageTree.from_sequences(4, [(0, 2), (1,)])], ids=repr
)
def test_bytes_are_those_of_all_nodes(tree):
    adapter = 4 * 8 * ((64 + 192) + (64 + 64))
    model = {"rank": 8, "layers": 6, "widths": [(64, 192), (64, 64)]}
    stack, layers = memory(tree, 5, **model), memory(tree, 5, **model, placement="layers")
    assert stack.stored == by_nodes(tree, 5, adapter, [6] * 4)
    assert layers.stored == by_nodes(tree, 5, adapter, [2, 2, 1, 1])  # as models/groups.py splits six layers
    assert stack.served == 5 * adapter * 6 * tree.depth
    assert layers.served == 5 * adapter * sum([2, 2, 1, 1][: tree.depth])
    assert stack.base == 4 * 6 * (64 * 192 + 64 * 64)
    assert memory(tree, 5, **model, item_size=2).stored * 2 == stack.stored


@pytest.mark.parametrize(("width", "placement", "share"), [
    (4096, "layers", 0.15), (4096, "stack", 0.59), (384, "layers", 1.6), (384, "stack", 6.3),
])  # fmt: skip
def test_all_nodes_of_the_paper_setting_beside_the_base(width, placement, share):
    held = memory(subsets(4), 5, rank=16, layers=4, widths=[(width, width)], placement=placement)
    assert held.stored / held.base == pytest.approx(share, rel=0.03)


def test_layers_are_split_as_the_models_split_them():
    from s3t_ext.models.groups import stages_by_layer

    for layers, slices in [(4, 4), (7, 3), (12, 5)]:
        stages = list(stages_by_layer((f"block.{i}" for i in range(layers)), slices).values())
        held = memory(sisa(slices), 1, rank=1, layers=layers, widths=[(1, 1)], placement="layers", item_size=1)
        assert held.served == 2 * len(stages)
        alone = StageTree.from_sequences(slices, [(0,)])
        first = memory(alone, 1, rank=1, layers=layers, widths=[(1, 1)], placement="layers", item_size=1)
        assert first.served == 2 * stages.count(0)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rank": 0}, "rank: wanted an integer of at least 1, got 0"),
        ({"layers": True}, "layers: wanted an integer of at least 1, got True"),
        ({"widths": []}, "widths: wanted at least one pair"),
        ({"widths": [(3, 0)]}, "widths: wanted at least one pair"),
        ({"placement": "row"}, "placement: wanted one of stack, layers, got 'row'"),
        ({"placement": "layers", "layers": 3}, "at least a layer for each of 4 slices, got 3"),
    ],
)
def test_bad_models_are_refused(change, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        memory(sisa(4), 5, **{"rank": 8, "layers": 4, "widths": [(64, 64)], **change})
