"""PEFT itself over one linear layer: all live adapters active, routed by name, or concatenated into one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from bench.built import Built, Cannot, leaf, live, scatter
from bench.truth import SCALE, Inputs


def peft(fp32_adapters: bool, cat: bool = False) -> Callable[[Inputs], Built]:
    """Real PEFT: one nn.Linear with the live adapters active, or by adapter_names where a row has one adapter."""

    def build(i: Inputs) -> Built:
        case = i.case
        if importlib.util.find_spec("peft") is None:
            raise Cannot("peft is not installed")
        if case.G > 1 and (case.P > 1 or cat):
            raise Cannot("PEFT routes one adapter a row")
        if cat and case.step != "fwd":
            raise Cannot("a concatenated copy trains no adapter")
        if not fp32_adapters and not cat and case.dtype == "fp32":
            raise Cannot("the same as peft where everything is fp32")
        if case.G > 1 and case.timer == "graph":
            raise Cannot("PEFT's mixed batches copy indices from the host: no CUDA graph")
        return _layer(i, fp32_adapters, cat)

    return build


def _layer(i: Inputs, fp32_adapters: bool, cat: bool) -> Built:
    from peft import LoraConfig, get_peft_model

    case, ids, x = i.case, live(i), leaf(i.x, i)
    linear = nn.Linear(1, 1, device=i.x.device, dtype=i.x.dtype)
    linear.weight, linear.bias = nn.Parameter(i.weight, False), nn.Parameter(i.bias, False)
    linear.in_features, linear.out_features = case.K, case.O
    config = LoraConfig(r=case.r, lora_alpha=round(SCALE * case.r), target_modules=["0"])
    names = [f"adapter{n}" for n in ids]
    model = get_peft_model(nn.Sequential(linear), config, names[0], autocast_adapter_dtype=fp32_adapters)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=fp32_adapters)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, n in zip(names, ids):
            layer.lora_A[name].weight.copy_(i.a[n])  # (r, K)
            layer.lora_B[name].weight.copy_(i.b[n].t())  # (O, r)
    active = names
    if cat:
        model.add_weighted_adapter(names, [1.0] * len(names), "cat", combination_type="cat")
        active = ["cat"]
    model.base_model.set_adapter(active)
    model.eval()
    leaves = [pool[name].weight for pool in (layer.lora_A, layer.lora_B) for name in names]
    if case.G == 1:
        return Built(lambda: layer(x), x, leaves, scatter(i, ids))
    by_row = [f"adapter{ids[0]}" for rows, ids in i.groups for _ in range(rows.stop - rows.start)]
    return Built(lambda: layer(x, adapter_names=by_row), x, leaves, scatter(i, ids))
