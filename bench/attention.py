"""Time attention over texts of many lengths: ``python -m bench.attention``, by the heads of a small encoder.

The package's own kernel, which takes the tokens of all texts one after the other, beside torch's, which takes them
padded to the longest under a mask. Both are held against fp64 before they are timed, in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.built import Cannot
from bench.machine import describe
from bench.rows import RESULTS, append
from bench.timing import take
from s3t_ext.lora.pinned import pinned
from s3t_ext.models.attention import attends, attention

COLUMNS = (
    *("case", "provider", "metric", "p20", "p50", "p80", "unit", "repeats", "tokens", "padded"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
HEADS, DIM, TOKENS = 12, 32, 2048
MIXED = (5, 9, 12, 17, 20, 22, 26, 31, 38, 55)  # tokens of sentences, as they come
LENGTHS = {"8": (8,), "20": (20,), "64": (64,), "mixed": MIXED}
TYPES = {"fp32": (torch.float32, 2e-5), "bf16": (torch.bfloat16, 2e-2)}  # greatest error, of the greatest value


class Texts(NamedTuple):
    """q, k, v and the gradient of y of all tokens, (T, h, d), and where each text begins."""

    given: tuple[Tensor, ...]
    starts: Tensor  # (texts + 1,)


def texts(lengths: tuple[int, ...], dtype: torch.dtype, tokens: int = TOKENS) -> Texts:
    """Draw texts of these lengths in turn, of about so many tokens together."""
    chance = torch.Generator().manual_seed(0)
    sizes = torch.tensor(lengths * -(-tokens // sum(lengths)))
    starts = F.pad(sizes.cumsum(0), (1, 0))
    given = (torch.randn(int(starts[-1]), HEADS, DIM, generator=chance).to(dtype) for _ in range(4))
    return Texts(tuple(given), starts)


def ours(found: Texts) -> Callable[[bool], list[Tensor]]:
    """Give a function that computes y and, if asked, the gradients of q, k and v; all (T, h, d)."""
    if not attends(found.given[0]):
        raise Cannot("the compiled module")
    leaves, dy = [t.clone().requires_grad_() for t in found.given[:3]], found.given[3][None]

    def run(backward: bool) -> list[Tensor]:
        q, k, v = (t.transpose(0, 1)[None] for t in leaves)  # (1, h, T, d)
        y = attention(q, k, v, None, DIM**-0.5, found.starts)  # (1, T, h, d)
        return [y[0], *(torch.autograd.grad(y, leaves, dy) if backward else ())]

    return run


def padded(found: Texts) -> Callable[[bool], list[Tensor]]:
    """The same by torch, of texts that lie padded: (n, h, l, d)."""
    lengths = found.starts.diff()
    own = torch.arange(int(lengths.max())) < lengths[:, None]  # (n, l)
    *leaves, dy = (
        t.new_zeros(*own.shape, HEADS, DIM).index_put((own,), t).transpose(1, 2).contiguous() for t in found.given
    )
    leaves = [t.requires_grad_() for t in leaves]
    mask = None if own.all() else own[:, None, None]  # (n, 1, 1, l)

    def run(backward: bool) -> list[Tensor]:
        y = F.scaled_dot_product_attention(*leaves, mask, scale=DIM**-0.5)  # (n, h, l, d)
        return [y, *(torch.autograd.grad(y, leaves, dy) if backward else ())]

    run.unpadded = lambda t: t.transpose(1, 2)[own]  # type: ignore[attr-defined]
    return run


PROVIDERS: dict[str, Callable[[Texts], Any]] = {"s3t": ours, "sdpa-padded": padded}


def error(run: Any, found: Texts) -> float:
    """Give the greatest error of y and of the gradients against fp64, each over its greatest value."""
    truth = padded(Texts(tuple(t.double() for t in found.given), found.starts))
    exact = [truth.unpadded(t).detach() for t in truth(True)]  # type: ignore[attr-defined]
    own = getattr(run, "unpadded", lambda t: t)
    return max(float((own(t.detach()) - e).abs().max() / e.abs().max()) for t, e in zip(run(True), exact, strict=True))


def measure(seconds: float, tokens: int = TOKENS) -> Iterator[dict[str, Any]]:
    """Check, then time on one thread; give rows.

    Raises:
        ValueError: a provider is wrong.
    """
    for name, (dtype, most) in TYPES.items():
        for lengths, sizes in LENGTHS.items():
            found = texts(sizes, dtype, tokens)
            calls = {provider: build(found) for provider, build in PROVIDERS.items()}
            for provider, run in calls.items():
                if not (wrong := error(run, found)) <= most:
                    raise ValueError(f"{provider}: expected an error of at most {most}, got {wrong}")
            count = {"tokens": int(found.starts[-1]), "padded": (len(found.starts) - 1) * max(sizes)}
            for step, backward in (("fwd", False), ("fwdbwd", True)):
                spreads = take({p: lambda r=r, b=backward: r(b) for p, r in calls.items()}, "1t", seconds)
                for provider, s in spreads.items():
                    p20, p50, p80 = (f"{t * 1e3:.4f}" for t in (s.p20, s.p50, s.p80))
                    times = {"p20": p20, "p50": p50, "p80": p80, "unit": "ms", "repeats": s.repeats}
                    case = f"{step}-{name}-{HEADS}x{DIM}-{lengths}"
                    yield {"case": case, "provider": provider, "metric": "time", **times, **count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case, all providers together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows go to attention.csv there")
    arguments = parser.parse_args()
    about = describe("cpu", "bench.attention")
    with pinned(1):
        rows = list(measure(arguments.seconds))
    append(arguments.out / "attention.csv", [{**row, **about} for row in rows], COLUMNS)
    for mine, other in zip(rows[::2], rows[1::2], strict=True):
        times = float(mine["p50"]), float(other["p50"])
        print(f"{mine['case']:28} s3t {times[0]:8.3f} ms  padded {times[1]:8.3f} ms  {times[1] / times[0]:5.2f}x")


if __name__ == "__main__":
    sys.exit(main())
