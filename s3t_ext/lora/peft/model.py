"""PEFT in: a PEFT LoRA model becomes one of masked layers over a single routing table, with equal outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s3t_ext.lora.check import wrong
from s3t_ext.lora.kernels.paths import MODES
from s3t_ext.lora.nn import pack_layers
from s3t_ext.lora.peft.layers import BASE, PASS, AdaptersLinear, SavedModules
from s3t_ext.lora.peft.refused import INSTEAD, load_peft, refuse
from s3t_ext.lora.routing import Routing


def from_peft(model: nn.Module, mode: str = "fast") -> MaskedLoRAModel:
    """Turn a PEFT LoRA model into one whose layers run base product and adapters in one pass.

    ``y = W x + bias + sum over active adapters n of scaling[n] * B[n] A[n] x``, as PEFT computes it.

    Args:
        model: a ``PeftModel`` with LoRA on linear layers, changed in place: use what is returned, not ``model``. The
            adapters are copied into one pool for each layer, padded with zeros to its largest rank. The adapters active
            in PEFT are active.
        mode: ``fast`` or ``exact``, see ``masked_lora_linear``.

    Returns:
        MaskedLoRAModel: adapters that require gradients in PEFT are parameters ``a1`` (M, r, K), ``b1`` (M, r, O) of
        their layers, the others ``a``, ``b`` (N, r, ...), frozen. Trainable adapters that are not active get zero
        gradients where PEFT gives none: an optimizer's weight decay still reaches them.

    Raises:
        ValueError: ``model`` is no ``PeftModel``, was converted before, has no LoRA layer, or a weight under an adapter
            is not frozen.
        NotImplementedError: what this package does not compute (DoRA and other variants, biases of adapters, merged or
            quantised layers, ...); the message says what to do. The model is unchanged then.
        ImportError: PEFT is not installed.

    Notes:
        Adapters keep their type if it is the base's or fp32, else they become fp32. With fp32 adapters over a bf16 or
        fp16 base PEFT runs them in fp32; here they are rounded once to the base's type on reading, gradients are fp32.
        On the CPU the layers are packed (``pack_layers``): a frozen weight is held once, beside trainable adapters
        twice, and plain by no layer. ``pack_layers(model)`` drops the second where a model is only served.
    """
    peft = load_peft()
    if not isinstance(model, peft.PeftModel):
        raise wrong("model", "a PeftModel", type(model).__name__)
    if mode not in MODES:
        raise wrong("mode", f"one of {MODES}", repr(mode))
    trainable = refuse(model)
    names = sorted(model.peft_config, key=trainable.__contains__)  # frozen adapters first, each kind in PEFT's order
    base, routing = model.get_base_model(), Routing(1, len(names))
    active = _convert(base, routing, names, len(trainable), mode)
    converted = MaskedLoRAModel(base, routing, {name: model.peft_config[name] for name in names}, active)
    converted.training = model.training
    return pack_layers(converted, backward=bool(trainable))


def _convert(base: nn.Module, routing: Routing, names: Sequence[str], trainable: int, mode: str) -> tuple[str, ...]:
    """Put our layers in the place of PEFT's; return the active adapters. PEFT's layers are free afterwards."""
    peft = load_peft()
    made: dict[nn.Module, nn.Module] = {}  # a module under two names stays one module
    active: tuple[str, ...] = ()
    for name, module in list(base.named_modules(remove_duplicate=False)):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            active = () if module.disable_adapters else tuple(module.active_adapters)
            made.setdefault(module, AdaptersLinear(module, routing, names, trainable, mode))
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            made.setdefault(module, SavedModules(module.original_module, module.modules_to_save))
        else:
            continue
        made[module].training = module.training
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, made[module])
    return active


class MaskedLoRAModel(nn.Module):
    """Run a model whose layers read named adapters from one routing table; ``from_peft`` makes it.

    What it does not define itself (``config``, ``device``, ``generation_config``, ...) is the wrapped model's.

    Args:
        model: the model, of ``AdaptersLinear`` and ``SavedModules``; ``routing``: their table, (1, N).
        configs: PEFT's configuration of each adapter, by name, in the order of the pools.
        active: the adapters active at first.
    """

    def __init__(self, model: nn.Module, routing: Routing, configs: Mapping[str, Any], active: Sequence[str]) -> None:
        super().__init__()
        self.model, self.routing, self.configs = model, routing, dict(configs)
        self._ids = {name: n for n, name in enumerate(configs)}
        self.routing.to(next(model.parameters()).device)
        self.activate(*active)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: unpickling
                raise
            if name in INSTEAD:  # the wrapped model's own would know nothing of the adapters
                raise AttributeError(f"{name}: not of a converted model; use {INSTEAD[name]}") from None
            return getattr(self.model, name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters."""
        return tuple(self._ids)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that a forward pass without ``adapter_names`` sums."""
        return self._active

    def activate(self, *names: str) -> None:
        """Make these adapters, and no others, the active ones; none at all: the base model.

        Only the routing table changes, in place, at its fixed address: no weight is touched and a captured CUDA graph
        stays valid. What is trainable stays so. Not to be called while another thread is inside a forward pass.

        Raises:
            ValueError: a name is unknown or given twice, or two of the adapters bring copies of the same module.
        """
        ids = self.ids_of(names)
        if len(set(names)) < len(names):
            raise wrong("names", "different adapters", names)
        saved = [module for module in self.model.modules() if isinstance(module, SavedModules)]
        for module in saved:
            if len(clash := [name for name in names if name in module.modules_to_save]) > 1:
                raise ValueError(f"names: expected at most one adapter with modules_to_save, got {clash}")
        for module in saved:
            module.active = next((name for name in names if name in module.modules_to_save), BASE)
        for layer in self.model.modules():
            if isinstance(layer, AdaptersLinear):
                layer.choose_dropout(ids)
        row = ids + [-1] * (len(self._ids) - len(ids))
        self.routing.table.copy_(torch.tensor([row], dtype=torch.int32))  # (1, N)
        self._active = tuple(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Answer as the base model inside the block, as in PEFT; see ``activate``."""
        active = self.active
        self.activate()
        try:
            yield
        finally:
            self.activate(*active)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the wrapped model.

        Args:
            adapter_names: one name for each sample, ``"__base__"`` for none, in place of the active adapters; not in
                training. Samples are dimension 0 of what every layer reads.
        """
        if adapter_names is None:  # nothing but the model: a compiler sees one graph
            return self.model(*args, **kwargs)
        with self._routed(adapter_names, 1, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate as the wrapped model does; ``adapter_names``: one for each sample, as in ``forward``."""
        generate: Any = self.model.generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        config = kwargs.get("generation_config") or self.model.generation_config
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        if beams > 1 and getattr(self.model.config, "is_encoder_decoder", False):
            raise NotImplementedError(
                "adapter_names: beam search of an encoder and decoder is not supported; use num_beams=1, or activate()"
            )
        with self._routed(adapter_names, beams, args, kwargs):
            return generate(*args, **kwargs)

    @contextmanager
    def _routed(self, names: Sequence[str], beams: int, args: tuple, kwargs: dict) -> Iterator[None]:
        """Route the samples of one call by their names, each repeated for its beams."""
        if self.training:
            raise ValueError("adapter_names: expected None in training mode; call eval(), or activate() to train")
        ids = self.ids_of(names, "adapter_names", {BASE: -1})
        given = [args[0] if args else None, *map(kwargs.get, (getattr(self.model, "main_input_name", ""), "inputs"))]
        for x in given:
            if isinstance(x, Tensor) and len(x) != len(names):
                raise wrong("adapter_names", f"one name for each of {len(x)} samples", f"{len(names)} names")
        table = torch.tensor(ids, dtype=torch.int32).repeat_interleave(beams).view(-1, 1)  # (G, 1)
        PASS.names = tuple(name for name in names for _ in range(beams))
        try:
            with self.routing.batch([1] * len(table), table.to(self.routing.table.device)):
                yield
        finally:
            PASS.names = None

    def ids_of(self, names: Sequence[str], argument: str = "names", more: Mapping[str, int] | None = None) -> list[int]:
        """Give the index of each adapter in the pools; ``more``: other names that are legal."""
        if isinstance(names, str):
            raise wrong(argument, "a list of names", repr(names))
        ids = {**self._ids, **(more or {})}
        if unknown := [name for name in names if name not in ids]:
            raise wrong(argument, f"names of {list(ids)}", unknown)
        return [ids[name] for name in names]
