"""A trial of a model that somebody describes: what is promised of it is tried on random inputs before it is used."""

from __future__ import annotations

import copy

import torch

from s3t_ext.lora.nn import adapt
from s3t_ext.lora.pinned import pinned
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length

RECORDS, LONGEST = 33, 20


def try_out(model: BaseModel) -> None:
    """Try whether a model can be cut at each of its blocks, and whether a record's features hang on its batch.

    Raises:
        ValueError: it gives other features when cut, or a record other ones alone.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, shared)  # adapting changes layers, not weights
    adapt(own, own.adaptable() or "all-linear", stages=1)
    generator = torch.Generator().manual_seed(0)
    if model.shape is not None:
        x = torch.randn(RECORDS, *model.shape, generator=generator)
    else:
        longest = min(LONGEST, model.positions or LONGEST)
        x = torch.randint(model.vocabulary, (RECORDS, longest), generator=generator)
        lengths = torch.arange(RECORDS) * longest // RECORDS + 1
        x = x.masked_fill(torch.arange(longest) >= lengths[:, None], -1)
    with torch.no_grad(), pinned():
        for rows, part in by_length(x):
            try:
                getattr(own, "module", own)(part)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                name = "vocabulary" if model.shape is None else "shape"
                reason = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{name}: expected inputs that the module takes, got {tuple(part.shape)} {part.dtype}, on which it "
                    f"says {type(error).__name__}: {reason}"
                ) from error
            whole = own(part)
            for block in range(len(own.block_list())):
                if not torch.equal(own.above(own.below(part, block), part, block), whole):
                    raise ValueError(
                        f"blocks: expected blocks that run one after the other, each from the whole state to the next "
                        f"(residual connections inside), got {model.blocks!r}, where other things happen before block "
                        f"{block}"
                    )
            for row in range(len(rows)):
                if not torch.equal(own(part[row : row + 1])[0], whole[row]):
                    raise ValueError(
                        "model: expected features with the same bits alone and in a batch, got others: it mixes "
                        "records, or an elementwise function such as SiLU runs over widths that are no multiple of 64"
                    )
