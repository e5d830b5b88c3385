"""What a base model offers: features for a head."""

from __future__ import annotations

from torch import nn


class FeatureExtractor(nn.Module):
    """Map inputs (n, *``shape``) to features (n, ``features``)."""

    shape: tuple[int, ...]
    features: int
