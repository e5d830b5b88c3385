"""The tensors of a case, its result in plain torch, and the rule that a provider must pass before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case

SCALE = 2.0  # PEFT's alpha over r
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Results = dict[str, Tensor]  # of y, dx, da, db: what the step computes


@dataclass
class Inputs:
    """Tensors of one case, the same for every provider; an error of base or adapters shows alike."""

    case: Case
    x: Tensor  # (T, K)
    weight: Tensor  # (O, K)
    bias: Tensor  # (O,)
    a: Tensor  # (N, r, K)
    b: Tensor  # (N, r, O)
    dy: Tensor  # (T, O)
    ids: Tensor  # (G, P)
    offsets: Tensor | None  # (G + 1,), None where G = 1

    @property
    def groups(self) -> list[tuple[slice, list[int]]]:
        """Rows and live adapters of every group that owns a row."""
        edges, table = self.case.edges, self.case.table
        return [
            (slice(edges[g], edges[g + 1]), [n for n in row if n >= 0])
            for g, row in enumerate(table)
            if edges[g + 1] > edges[g]
        ]


def make(case: Case, device: str, seed: int = 0) -> Inputs:
    """Draw the tensors of a case on a device."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, device=device) * by).to(TYPES[case.dtype])

    T, K, O, r, N = case.T, case.K, case.O, case.r, case.N
    ids = torch.tensor(case.table, dtype=torch.int32, device=device)
    offsets = torch.tensor(case.edges, dtype=torch.int32, device=device) if case.G > 1 else None
    b = draw(N, r, O, by=(SCALE * max(case.R, 1) ** 0.5) ** -1)
    return Inputs(
        case, draw(T, K), draw(O, K, by=K**-0.5), draw(O), draw(N, r, K, by=K**-0.5), b, draw(T, O), ids, offsets
    )


def plain(i: Inputs, dtype: torch.dtype, adapters: bool = True) -> Results:
    """Compute a case group by group in plain torch, in the given type: the truth in fp64, the yardstick in its own."""
    x, weight, bias, a, b, dy = (t.detach().to(dtype) for t in (i.x, i.weight, i.bias, i.a, i.b, i.dy))
    grad = i.case.step != "fwd"
    for leaf in (x, a, b) if grad else ():
        leaf.requires_grad_()
    y = F.linear(x, weight, bias)  # (T, O)
    if adapters:
        parts = []
        for rows, live in i.groups:
            part = y[rows]
            for n in live:
                part = part + (x[rows] @ a[n].t()) @ b[n] * SCALE
            parts.append(part)
        y = torch.cat(parts)  # (T, O)
    if not grad:
        return {"y": y}
    leaves = {"dx": x, **({"da": a, "db": b} if adapters else {})}
    found = dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), dy)))
    return found | ({"y": y.detach()} if i.case.step == "fwdbwd" else {})


def wrong(got: Results, same: Results, truth: Results, i: Inputs) -> str:
    """Say what is wrong with a result, in a few words; empty where nothing is.

    ``|got - truth| <= 2 |same - truth| + ulp(max |truth|) + 4 eps32 terms`` in maximum and root mean square, ``same``
    being plain torch's result in the type of the case, and ``terms`` the size of what is summed.
    """
    if got.keys() != truth.keys():
        return f"results {sorted(got)}, expected {sorted(truth)}"
    for name, exact in truth.items():
        if got[name].shape != exact.shape:
            return f"{name}: shape {tuple(got[name].shape)}, expected {tuple(exact.shape)}"
        if not exact.numel():
            continue
        size = _terms(i) if name == "y" else float(exact.abs().max()) * i.case.r
        if fault := far(got[name], same[name], exact, size):
            return f"{name}: {fault}"
    return ""


def far(got: Tensor, same: Tensor, exact: Tensor, terms: float = 0.0, times: float = 2) -> str:
    """Say by how much a tensor is beyond the rule of ``wrong``, ``times`` torch's error; empty where it is not."""
    slack = _ulp(float(exact.abs().max()), same.dtype) + 4 * torch.finfo(torch.float32).eps * terms
    for norm, of in (("maximum", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error = float(of(got.double() - exact))
        bound = times * float(of(same.double() - exact)) + slack
        if not error <= bound:  # NaN too
            return f"{norm} error {error:.3e} above {bound:.3e}"
    return ""


def _terms(i: Inputs) -> float:
    """Size what the adapters sum over the live ranks: scale |row of x| |row of a| |element of b|, of mean size."""
    x, a = (float(t.detach().float().norm(dim=-1).mean()) for t in (i.x, i.a))
    return SCALE * i.case.R * x * a * float(i.b.detach().float().abs().mean())


def _ulp(value: float, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(value, 1e-30)).log2().floor().item()
