"""What of PEFT is not computed here, each refused by name before anything of a model is changed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from s3t_ext.lora.check import wrong
from s3t_ext.lora.peft.layers import AdaptersLinear

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAIN = "use plain LoRA (see peft.convert_to_lora), or stay with PEFT"
INSTEAD = {  # what PEFT's models or those of transformers have, and a converted one has not
    **dict.fromkeys(("save_pretrained", "push_to_hub"), "to_peft(model, folder), which PEFT loads, or state_dict()"),
    **dict.fromkeys(("set_adapter", "enable_adapters", "disable_adapters"), "activate(*names); no names: the base"),
    **dict.fromkeys(("active_adapter", "active_adapters"), "active"),
    **dict.fromkeys(("add_adapter", "load_adapter", "delete_adapter"), "it on PEFT's model, before from_peft"),
    **dict.fromkeys(
        ("merge_adapter", "merge_and_unload", "unload"), "to_peft(model, folder), and it on what PEFT loads"
    ),
    "print_trainable_parameters": "sum(p.numel() for p in model.parameters() if p.requires_grad)",
}
LINEAR_ONLY = "leave it out of target_modules: linear layers in float32, float16 or bfloat16 are supported"


def load_peft() -> ModuleType:
    """Import PEFT, or say how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError('from_peft and to_peft need PEFT: pip install "s3t-ext[peft]"') from error
    return peft


def _no(what: str, instead: str) -> NotImplementedError:
    return NotImplementedError(f"model: {what} is not supported; {instead}")


def refuse(model: Any) -> set[str]:
    """Check a ``PeftModel``; return the names of its trainable adapters.

    Raises:
        NotImplementedError: names what is not supported, where, and what to do instead.
        ValueError: the model was converted before, has no LoRA layer, or a weight under an adapter is not frozen.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, config in model.peft_config.items():
        _config(name, config)
    trains: dict[str, set[bool]] = {name: set() for name in model.peft_config}
    actives, devices = set(), set()
    for place, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _layer(place, module)
            devices.add(module.get_base_layer().weight.device)
            actives.add(() if module.disable_adapters else tuple(module.active_adapters))
            for part in (module.lora_A, module.lora_B):
                for name, linear in part.items():
                    trains[name].add(bool(linear.weight.requires_grad))
        elif isinstance(module, AdaptersLinear):
            raise ValueError("model: already converted; use the model that from_peft returned")
        elif isinstance(module, BaseTunerLayer):
            raise _no(f"{type(module).__name__} at {place!r}", "only LoRA is")
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise _no(f"{type(module).__name__} at {place!r}", "train whole modules by modules_to_save")
    if not actives:
        raise wrong("model", "LoRA layers", "none: was it merged or unloaded?")
    if len(actives) > 1:
        raise _no(f"layers with different active adapters, {sorted(actives)},", "call set_adapter() on the whole model")
    if len(devices) > 1:
        raise _no(f"a model on several devices, {sorted(map(str, devices))},", "load it on one")
    for name, found in trains.items():
        if len(found) > 1:
            raise _no(f"adapter {name!r}, frozen in one part and trainable in another,", "train all of it, or nothing")
    return {name for name, found in trains.items() if found == {True}}


def _config(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise _no(f"adapter {name!r} of method {kind}", "only LoRA is")
    if config.bias != "none":
        raise _no(f"bias={config.bias!r} of adapter {name!r}", "train with bias='none'")
    for field, instead in (
        ("lora_bias", "train with lora_bias=False"),
        ("layer_replication", "save the replicated model and adapt that"),
        ("target_parameters", "target linear layers by target_modules"),
        ("trainable_token_indices", "train whole modules by modules_to_save"),
        ("use_dora", PLAIN),
        ("use_qalora", PLAIN),
    ):
        if getattr(config, field, None):
            raise _no(f"{field} of adapter {name!r}", instead)


def _layer(place: str, layer: Any) -> None:
    """Check one LoRA layer and the layer under it."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    if type(layer) is not Linear:
        raise _no(f"LoRA layer {type(layer).__name__} over {type(base).__name__} at {place!r}", LINEAR_ONLY)
    if type(base) not in (nn.Linear, Conv1D):
        raise _no(f"base layer {type(base).__module__}.{type(base).__name__} at {place!r}", LINEAR_ONLY)
    if type(base.weight) is not nn.Parameter or base.weight.dtype not in TYPES:
        kind = type(base.weight).__name__
        raise _no(f"a weight of class {kind} and type {base.weight.dtype} at {place!r}", LINEAR_ONLY)
    for name, variant in layer.lora_variant.items():
        raise _no(f"{type(variant).__name__} of adapter {name!r} at {place!r}", PLAIN)
    if layer.merged:
        raise _no(f"a layer with merged adapters at {place!r}", "call unmerge_adapter() first")
    if hooked := [m for m in (layer, base) if m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook")]:
        raise _no(f"a hook on {type(hooked[0]).__name__} at {place!r}", "remove it, and load the model on one device")
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise wrong("model", "frozen weights under adapters", f"a trainable one at {place!r}")
