"""Adapter layers: every ``nn.Linear`` of a model over pools of slice adapters, steered by one routing table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from s3t_ext.lora.kernels import serves
from s3t_ext.lora.kernels.reference import unpack
from s3t_ext.lora.ops import Packed, direct, masked_lora, masked_lora_linear, pack
from s3t_ext.lora.routing import Routing

_Model = TypeVar("_Model", bound=nn.Module)


class MaskedLoRALinear(nn.Module):
    """Apply a frozen linear layer and, in the same pass, the live adapters of each sample's group.

    ``y = W x + bias + scale * sum_p (x a[n_p].T) b[n_p]``, n_p from the routing table's ``columns``.

    Args:
        linear: the layer to take over; its weight and bias are frozen.
        routing: the model's table; ``columns``: the stages that this layer adapts (none: the plain layer, exact).
        rank: r; ``scale``: alpha / r in LoRA's terms, one number or one for each adapter.
        mode: ``exact`` or ``fast``, see ``masked_lora_linear``.
        number: of the layer among the model's adapted layers; names its column of dropout seeds.

    Notes:
        After ``pack`` the weight lies in ``packed`` and nowhere else. State dicts have it plain, as ``weight``, and are
        loaded by plain and packed layers alike. A layer cast to another type is packed anew; where panels are of no use
        (another device, float64) it becomes plain, and stays so.
    """

    a: Tensor
    b: Tensor
    packed: Packed | None  # no buffers: a module casts those, and the layout hangs on the type

    def __init__(
        self,
        linear: nn.Linear,
        routing: Routing,
        columns: slice,
        rank: int,
        scale: float | Tensor,
        mode: str = "exact",
        number: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._take(linear)
        self.columns, self.rank, self.scale, self.mode, self.number = columns, rank, scale, mode, number
        self._routing = (routing,)  # in a tuple: the table belongs to the model, not to each layer
        self.train_pool: tuple[Tensor, Tensor] | None = None
        for name, width in (("a", self.in_features), ("b", self.out_features)):  # (N, r, K), (N, r, O)
            pool = linear.weight.new_empty(0, rank, width, dtype=torch.float32)
            self.register_buffer(name, pool, persistent=False)

    def _take(self, linear: nn.Linear) -> None:
        self._hold(linear.weight.detach().contiguous())  # (O, K)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)  # (O,)
        self.register_parameter("bias", bias)

    # --- the frozen weight -------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Any:
        """The frozen weight (O, K). Of a packed layer it is a copy made now: what is written to it is lost."""
        if self.packed is None:
            return self._parameters["weight"]
        # A copy even where panels and plain weight look alike (K = 1), and one of no more than the weight's own size.
        return unpack(self.packed.panels, self.out_features, self.in_features).clone(
            memory_format=torch.contiguous_format
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self.packed = None  # it was of another weight

    def _hold(self, weight: Tensor) -> None:
        """Hold a weight plain."""
        self.packed = None
        # Not as an attribute: register_parameter would take the property for something else of that name.
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def pack(self, backward: bool = False) -> MaskedLoRALinear:
        """Hold the weight as the CPU kernels read it, and not also plain; mode ``exact`` gives the same bits.

        Args:
            backward: hold also what makes the gradient of x fast, for training. Memory: 2x the weight, else 1x.

        Raises:
            NotImplementedError: the weight is not on the CPU.
        """
        if self.packed is None or (backward and self.packed.turned is None):
            plain = self.unpack().weight  # not a copy beside the panels: the peak is one weight above what is held
            self.packed = pack(plain, backward=backward)
            self._parameters["weight"] = None
        elif not backward:
            self.packed = self.packed._replace(turned=None)
        return self

    def unpack(self) -> MaskedLoRALinear:
        """Hold the weight plain again, as the parameter ``weight``."""
        if self.packed is not None:
            self._hold(self.weight)
        return self

    def packs(self) -> bool:
        """Tell whether the compiled kernels read the weight packed: on the CPU, in float32, float16 or bfloat16."""
        weight = self._parameters["weight"] if self.packed is None else self.packed.panels
        return weight is not None and serves("native", "pack", weight.device.type, weight.dtype)

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Hold the weight plain inside the block, and after it as before if panels are served for it then."""
        packed = self.packed
        self.unpack()
        yield
        if packed is not None and self.packs():
            self.pack(packed.turned is not None)

    def _apply(self, fn, recurse=True):
        packed = self.packed
        if packed is None:
            return super()._apply(fn, recurse)
        was, probe = packed.panels, fn(packed.panels.new_empty(0))
        if (probe.dtype, probe.device) != (was.dtype, was.device):
            with self._unpacked():
                return super()._apply(fn, recurse)
        both: Any = (t if t is None else fn(t.view(-1)).view(t.shape) for t in (was, packed.turned))  # share_memory()
        self.packed = packed._replace(panels=next(both), turned=next(both))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, *args):
        with self._unpacked():
            super()._load_from_state_dict(*args)

    # --- the layer ---------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> range:
        """The stages (columns of the table, from 0) whose adapters live in this layer."""
        return range(self.columns.start, self.columns.stop)

    def forward(self, x: Tensor) -> Tensor:
        ids, offsets = self._routing[0].view(self.columns, x)
        own: Any = {**self._buffers, **self._parameters}  # by attribute each is half a microsecond of search
        try:
            weight, bias, a, b = own["weight"], own["bias"], own["a"], own["b"]
        except KeyError:  # one of them is computed: pruned, or parametrized
            weight, bias, a, b = None if self.packed else self.weight, self.bias, self.a, self.b
        if weight is None:  # and not lent for this call, as by torch.func.functional_call
            weight = self.packed
        scale, train, mode, dropout = self.scale, self.train_pool, self.mode, self.dropout(x)
        if dropout is None:
            y = direct(x, weight, bias, a, b, ids, offsets, scale, train, mode, matrix=False)  # (..., O)
            if y is not None:
                return y
        flat = x.dim() == 2
        rows = x if flat else x.reshape(-1, self.in_features)  # (T, K)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()  # what nn.Linear takes, this takes
        y = masked_lora_linear(
            rows, weight, bias, a, b, ids, offsets, scale=scale, train=train, dropout=dropout, mode=mode
        )  # (T, O)
        return y if flat else y.view(*x.shape[:-1], self.out_features)

    def dropout(self, x: Tensor) -> tuple[float, Tensor, Tensor] | None:
        """Give what ``masked_lora_linear`` takes as ``dropout`` in this pass, or None."""
        return None if self.train_pool is None else self._routing[0].dropout(self.number, x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"adapters={len(self.a)}, stages={list(self.stages)}, mode={self.mode}, "
            f"packed={self.packed is not None}"
        )


class MaskedLoRAQuantised(MaskedLoRALinear):
    """Leave a quantised frozen layer to its own forward pass and add the live adapters of each sample's group.

    ``y = layer(x) + scale * sum_p (x a[n_p].T) b[n_p]``, rounded once more than ``MaskedLoRALinear`` does.

    Notes:
        The adapters' part has the bits that ``masked_lora`` promises; those of ``layer(x)`` are its owner's business.
    """

    packed = None  # the layer's weight lies as its owner likes

    def _take(self, linear: nn.Linear) -> None:
        self.layer = linear.requires_grad_(False)

    @property
    def weight(self) -> Any:
        """The weight of the layer, packed as its owner packs it."""
        return self.layer.weight

    def pack(self, backward: bool = False) -> MaskedLoRAQuantised:
        """Do nothing: there is no plain weight to pack."""
        return self

    def packs(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)  # (..., O)
        if not len(self.stages):
            return y
        ids, offsets = self._routing[0].view(self.columns, x)
        rows = x.reshape(-1, self.in_features).contiguous()  # (T, K)
        more = masked_lora(
            rows, self.a, self.b, ids, offsets, scale=self.scale, train=self.train_pool, dropout=self.dropout(x)
        )  # (T, O)
        return y + more.view(y.shape).to(y.dtype)


def quantised(linear: nn.Linear) -> bool:
    """Tell whether a layer holds its weight in fewer bits and multiplies by itself, as those of bitsandbytes do."""
    ours = type(linear).__module__.partition(".")[0] == "bitsandbytes"  # before it is moved its weight is still plain
    return type(linear) is not nn.Linear and (ours or not linear.weight.is_floating_point())


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Tell whether a module's dotted name is meant by ``targets``, in the sense of PEFT's ``target_modules``.

    ``"all-linear"`` means every linear layer, another string is a regular expression for the whole name, and in a list
    an item means a whole name or its last whole components.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def adapt(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    stages: int,
    groups: int = 1,
    rank: int = 8,
    scale: float = 2.0,
    stage_of: Mapping[str, int] | None = None,
    mode: str = "exact",
) -> Routing:
    """Replace the linear layers of a model, in place, by ``MaskedLoRALinear`` over one routing table.

    Args:
        targets: which layers get adapters, see ``matches``. All other ``nn.Linear`` become frozen layers of the same
            kind without adapters, so that the whole model keeps the promise of mode ``exact``.
        stages: L; ``groups``: G, rows of the table.
        stage_of: placement ``layers``: the stage (from 0) that owns each target; None: placement ``stack``, every
            target holds adapters of all stages.

    Returns:
        Routing: the table, with all slots masked, on the device of the first layer; move it along with the model.

    Raises:
        ValueError: no linear layer matches ``targets``, a target has no stage in ``stage_of``, or a linear layer is of
            a subclass of ``nn.Linear`` that is not ``quantised``.
    """
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear and not quantised(linear):
            raise ValueError(
                f"model: expected plain nn.Linear layers, got {type(linear).__name__} at {name!r}, whose owner may "
                "read its weight and pass the adapters by; use a model with plain layers"
            )
    wanted = [name for name in linears if matches(name, targets)]
    if not wanted:
        raise ValueError(
            f"targets: expected a pattern for some of the model's linear layers {sorted(linears)[:8]}, got {targets!r}"
        )
    routing = Routing(groups, stages).to(next(iter(linears.values())).weight.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made: dict[nn.Linear, MaskedLoRALinear] = {}  # a layer under two names stays one layer
    for name, linear in linears.items():
        columns = slice(0, 0)
        if name in wanted and stage_of is None:
            columns = slice(0, stages)
        elif name in wanted and stage_of is not None:
            if name not in stage_of:
                raise ValueError(f"stage_of: expected a stage for every target, got none for {name!r}")
            columns = slice(stage_of[name], stage_of[name] + 1)
        if linear not in made:
            number = sum(len(layer.stages) > 0 for layer in made.values())
            kind = MaskedLoRAQuantised if quantised(linear) else MaskedLoRALinear
            made[linear] = kind(linear, routing, columns, rank, scale, mode, number)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[linear])
    return routing


def adapted_layers(model: nn.Module) -> dict[str, MaskedLoRALinear]:
    """List a model's layers that hold adapters, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLoRALinear) and len(m.stages)}


def routing_of(model: nn.Module) -> Routing | None:
    """Give the table that a model's layers read, or None where it was not adapted."""
    return next((m._routing[0] for m in model.modules() if isinstance(m, MaskedLoRALinear)), None)


def pack_layers(model: _Model, backward: bool = False) -> _Model:
    """Call ``pack`` on all adapted layers of a model: their weights then lie in panels for the CPU, and not also plain.

    Args:
        model: changed in place. Layers on another device or in float64 stay as they are.
        backward: for training: see ``MaskedLoRALinear.pack``. Layers up to the first one with adapters, in the model's
            order, go without: nothing below them asks for a gradient.

    Returns:
        The model.

    Notes:
        One layer after the other, so that the peak is one weight above what the model holds. A plain weight is freed
        when nothing outside of the layer holds it: one tied to an embedding stays, beside its panels.
    """
    above = False  # of the first layer with adapters
    for layer in model.modules():
        if isinstance(layer, MaskedLoRALinear):
            if layer.packs():
                layer.pack(backward and above)
            above = above or len(layer.stages) > 0
    return model
