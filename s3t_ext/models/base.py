"""What every base model offers: features for a head, and its two halves around any of its numbered blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class BaseModel(nn.Module):
    """Map a batch of inputs, one tensor, to features.

    Numbers are floats (n, *``shape``), of any type, and give features (n, ``features``) in float32. Texts are token ids
    (n, l) int32 or int64, padded with -1 at the end, and give the same, or with ``causal`` the hidden states
    (n, l, ``features``) in the type of the weights. Weights and activations are float32 as loaded, or cast by ``to``.

    Attributes:
        shape: of one input of numbers; None for texts.
        features: F, the width of what a head reads.
        blocks: dotted path of the ``nn.ModuleList`` of numbered blocks, each of which takes the state that the one
            before it gives, as its first argument.
        vocabulary: number of token ids; 0 for numbers.
        positions: the longest text in tokens; 0: no bound of the model's own.
        causal: hidden states of every token, for ``output``, in place of pooled features.
        output: of a causal model, the frozen layer (vocabulary, F) that gives logits; it is no part of ``forward``.
        fingerprint: a hash of what the weights do not say: configuration, tokenizer.

    Notes:
        The bits of a record's features are a function of that record alone. ``below`` and ``above`` exchange blocks of
        this very object while they run, so threads need a copy of it each (``copy.deepcopy`` with the parameters in
        its memo shares the weights).
    """

    shape: tuple[int, ...] | None = None
    features: int
    blocks: str
    vocabulary: int = 0
    positions: int = 0
    causal: bool = False
    output: nn.Linear | None
    fingerprint: str = ""

    @property
    def unpads(self) -> bool:
        """Whether padding is left out: texts of any lengths may share a pass, and no bit hangs on how wide it is."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.output = None

    def block_list(self) -> nn.ModuleList:
        """Give the numbered blocks.

        Raises:
            ValueError: ``blocks`` names no ``nn.ModuleList``.
        """
        try:
            found: Any = self.get_submodule(self.blocks)
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList) or not len(found):
            lists = [n for n, m in self.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
            raise ValueError(
                f"blocks: expected the path of the list of numbered layers, one of {lists}, got {self.blocks!r}"
            )
        return found

    def adaptable(self) -> list[str]:
        """List the names of the linear layers that adapters may be put into: all but ``output``."""
        return [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and m is not self.output]

    def below(self, x: Tensor, block: int) -> Tensor:
        """Give the state (n, ...) that enters block ``block`` (from 0); blocks from there on do not run."""
        with self._exchanged({self._number(block): _Reach()}):
            try:
                self(x)
            except _Reached as reached:
                return reached.state
        raise RuntimeError(f"the model ran past block {block} of {self.blocks!r}")

    def above(self, hidden: Tensor, x: Tensor, block: int) -> Tensor:
        """Go on from ``hidden``, the state that enters block ``block``, to what ``forward`` gives for the inputs x.

        ``above(below(x, k), x, k)`` has the bits of ``forward(x)``. Blocks under ``block`` do not run; masks and
        positions are derived from x again.
        """
        if self._number(block) == 0:
            with self.block_list()[0].register_forward_pre_hook(lambda _, given: (hidden, *given[1:])):
                return self(x)
        with self._exchanged(dict.fromkeys(range(block), _Give(hidden))):
            return self(x)

    def _number(self, block: int) -> int:
        count = len(self.block_list())
        if not 0 <= block < count:
            raise ValueError(f"block: expected a number from 0 to {count - 1}, got {block}")
        return block

    @contextmanager
    def _exchanged(self, others: Mapping[int, nn.Module]) -> Iterator[None]:
        """Put other modules in the places of some blocks inside the ``with`` block."""
        held: dict = self.block_list()._modules
        self.block_list()._modules = {name: others.get(k, own) for k, (name, own) in enumerate(held.items())}
        try:
            yield
        finally:
            self.get_submodule(self.blocks)._modules = held


class _Reached(Exception):
    """Carry the state that enters a block out of the forward pass."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


class _Reach(nn.Module):
    def forward(self, state: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Reached(state)


class _Give(nn.Module):
    """Stand in the place of a block below a cut: whatever comes in, the state at the cut goes out."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.state
