"""Tuples of our classes, for ``isinstance``."""

from __future__ import annotations

from .embedding import MaQDEmbedding
from .linear import MaQDLinear
from .norm import LayerBatchNorm
from .packed import PackedEmbedding, PackedLinear

LINEARS = (MaQDLinear, PackedLinear)
TABLES = (MaQDEmbedding, PackedEmbedding)
TRAINABLE = (MaQDLinear, MaQDEmbedding)
PACKED = (PackedLinear, PackedEmbedding)
QUANTIZED = (*TRAINABLE, *PACKED)
"""Layers and tables with low-bit weights."""
OURS = (*QUANTIZED, LayerBatchNorm)
"""Every class that a conversion puts into a model."""
