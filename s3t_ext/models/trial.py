"""What a model does with a few inputs: a trial of what somebody promises of it, and a probe of what its code is."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from s3t_ext.lora.nn import adapt
from s3t_ext.lora.pinned import pinned
from s3t_ext.lora.rng import uniform
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length

RECORDS, LONGEST = 33, 20
PROBES = (16, 16, 7, 1)  # tokens of the texts that a probe is of
TOLERANCE = 1e-4


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


def probe(model: BaseModel) -> list[float]:
    """Give numbers (4 inputs by 4) that a model's code and weights decide: its features of fixed inputs, projected.

        h(x) P,  x and P (F, 4) uniform, the same on every machine

    A causal model's features are those of the last token. See ``apart``.

    Raises:
        ValueError: they are not finite.
    """
    longest = min(max(PROBES), model.positions or max(PROBES))
    if model.shape is not None:
        x = _drawn("inputs", len(PROBES), *model.shape)  # (4, *shape)
    else:
        x = (
            ((_drawn("texts", len(PROBES), longest) + 1) / 2 * model.vocabulary).long().clamp(max=model.vocabulary - 1)
        )  # (4, l)
        x = x.masked_fill(torch.arange(longest) >= torch.tensor(PROBES)[:, None], -1)
    weights = _drawn("projection", model.features, 4)
    found = torch.empty(len(PROBES), 4)
    with torch.no_grad(), pinned():
        for rows, part in by_length(x):
            features = model(part)  # (k, F), or (k, l, F)
            if model.causal:
                features = features[torch.arange(len(part)), (part >= 0).sum(1) - 1]
            found[rows] = features.float() @ weights
    if not found.isfinite().all():
        raise ValueError("model: expected finite features of ordinary inputs, got NaN or infinity")
    return found.flatten().tolist()


def _drawn(name: str, *shape: int) -> Tensor:
    return uniform(hashlib.sha256(f"probe {name}".encode()).digest(), shape, 1.0)


def apart(theirs: Sequence[float], here: Sequence[float]) -> float:
    """Give how far two probes are apart, as a share of the largest number: above ``TOLERANCE`` the code is another.

    Notes:
        It is weighed against the largest number, so it sees less of a model whose outputs hardly hang on its inputs, or
        whose weights are so small that its functions are all but linear: there other code gives nearly the same.
        Machines and libraries add up in other orders, so the bits of a probe differ where the code does not. Over the
        weights of a trained encoder of 6 layers, instruction sets and threads were 1e-6 apart, another approximation of
        GELU 1e-3.
    """
    a, b = torch.tensor(theirs, dtype=torch.float64), torch.tensor(here, dtype=torch.float64)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) if a.shape == b.shape else torch.inf
