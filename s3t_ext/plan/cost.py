"""What a plan costs to store and to hold: bytes of adapters, on disk and resident, beside the frozen base layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from s3t_ext.plan.tree import StageTree

PLACEMENTS = ("stack", "layers")


class Memory(NamedTuple):
    """Bytes of all m shards together.

    Attributes:
        stored: every node, as on disk, and resident where all nodes are.
        served: one deepest path of each shard, the least that serves at full depth.
        base: the frozen weights of the adapted layers, once for all shards.
    """

    stored: int
    served: int
    base: int


def memory(
    tree: StageTree,
    shards: int,
    *,
    rank: int,
    layers: int,
    widths: Sequence[tuple[int, int]],
    placement: str = "stack",
    item_size: int = 4,
) -> Memory:
    """Count the bytes of a plan's adapters.

        A = sum over (K, O) of r (K + O) numbers a layer;   node of stage i: A * layers in `stack`,
        A * (layers of group i) in `layers`

    Args:
        tree: the plan of every shard.
        shards: m.
        rank: r.
        layers: number of adapted layers (transformer blocks, say) of the model.
        widths: (K, O), inputs and outputs, of each adapted linear map of one layer.
        placement: "stack": a stage has an adapter in every layer; "layers": in its own group of layers alone, of L
            groups whose sizes differ by one at most, the larger ones first (nearest the output).
        item_size: bytes of a number, of adapters and base alike: 4 for fp32, 2 for bf16.

    Raises:
        ValueError: a number below 1, an unknown placement, or fewer layers than slices in `layers`.
    """
    for name, value in (("shards", shards), ("rank", rank), ("layers", layers), ("item_size", item_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: wanted an integer of at least 1, got {value!r}")
    pairs = [tuple(pair) for pair in widths]
    if not pairs or not all(len(pair) == 2 and min(pair) >= 1 for pair in pairs):
        raise ValueError(f"widths: wanted at least one pair (inputs, outputs) of integers from 1 on, got {pairs}")
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: wanted one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if placement == "layers" and layers < tree.slices:
        raise ValueError(
            f"layers: placement 'layers' wants at least a layer for each of {tree.slices} slices, got {layers}"
        )
    adapter = item_size * rank * sum(inputs + outputs for inputs, outputs in pairs)  # bytes a layer
    size, larger = divmod(layers, tree.slices)
    stage = [adapter * (layers if placement == "stack" else size + (i < larger)) for i in range(tree.slices)]
    return Memory(
        stored=shards * sum(count * stage[depth - 1] for depth, count in tree.stages_by_depth.items()),
        served=shards * sum(stage[: tree.depth]),
        base=item_size * layers * sum(inputs * outputs for inputs, outputs in pairs),
    )
