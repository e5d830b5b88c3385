"""Layer groups by parsed layer index, for the placement ``layers``."""

from __future__ import annotations

from collections.abc import Iterable


def layer_index(name: str, blocks: str = "") -> int | None:
    """Parse the index of the layer that a module's dotted name lies in.

    It is the component after ``blocks``, the path of the list of layers; where that is not given, the first whole
    numeric component. A name outside of the list has none.
    """
    if blocks:
        if not name.startswith(blocks + "."):
            return None
        name = name[len(blocks) + 1 :].partition(".")[0]
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def stages_by_layer(names: Iterable[str], stages: int, blocks: str = "") -> dict[str, int]:
    """Assign modules to stages by layer: stage 0 owns the group of layers nearest the output, the last the input's.

    Layers are split in ``stages`` contiguous groups whose sizes differ by at most one, larger groups nearer the output.

    Args:
        names: dotted names of the adapted modules; each must contain a layer index.
        blocks: see ``layer_index``.

    Returns:
        The stage (from 0) of each name.

    Raises:
        ValueError: a name has no index, or there are fewer layers than stages.
    """
    index = {name: layer_index(name, blocks) for name in names}
    missing = sorted(name for name, i in index.items() if i is None)
    if missing:
        raise ValueError(
            f"targets: placement 'layers' needs a layer index in every name, got {missing[:4]}; narrow "
            "the targets to the numbered layers"
        )
    layers = sorted({i for i in index.values() if i is not None}, reverse=True)
    if len(layers) < stages:
        raise ValueError(
            f"slices: placement 'layers' needs at least as many layers as slices, got {len(layers)} layers"
            f" for {stages} slices; use placement 'stack'"
        )
    size, larger = divmod(len(layers), stages)
    stage_of_layer = {}
    for stage in range(stages):
        start = stage * size + min(stage, larger)
        stage_of_layer.update(dict.fromkeys(layers[start : start + size + (stage < larger)], stage))
    return {name: stage_of_layer[i] for name, i in index.items() if i is not None}
