"""A module of the user's own as a base model, by a small description."""

from __future__ import annotations

from torch import Tensor, nn

from s3t_ext.models.base import BaseModel


class Described(BaseModel):
    """Map inputs (n, *shape), or token ids (n, l), to the features (n, ``features``) that a plain module gives.

    Args:
        module: its list of blocks is any ``nn.ModuleList``; each block takes the state as its first argument. For
            texts it is given ids padded with -1 at the end, and has to mask and to pool by itself.
        spec: ``features``, ``blocks`` (dotted path inside the module), and ``shape``, or ``vocabulary`` and, if there
            is a bound, ``positions``; ``where``: the file that says so.

    Raises:
        ValueError: the description lacks something or names what is not there.
    """

    def __init__(self, module: nn.Module, spec: dict, where: object) -> None:
        super().__init__()
        for key in ("features", "blocks"):
            if key not in spec:
                raise ValueError(f"{where}: expected {key!r} beside an architecture of your own, got {sorted(spec)}")
        if ("shape" in spec) == ("vocabulary" in spec):
            raise ValueError(f"{where}: expected 'shape' (numbers) or 'vocabulary' (texts), got {sorted(spec)}")
        self.module, self.where = module, where
        self.features, self.blocks = int(spec["features"]), f"module.{spec['blocks']}"
        self.shape = tuple(spec["shape"]) if "shape" in spec else None
        self.vocabulary, self.positions = int(spec.get("vocabulary", 0)), int(spec.get("positions", 0))
        self.block_list()

    def forward(self, x: Tensor) -> Tensor:
        features = self.module(x)  # (n, F)
        if features.shape != (len(x), self.features):
            raise ValueError(
                f"{self.where}: expected features of shape {(len(x), self.features)} from the module, "
                f"got {tuple(features.shape)}"
            )
        return features
