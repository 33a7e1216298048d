"""Tuples of our classes, for ``isinstance``."""

from __future__ import annotations

from .embedding import MaQDEmbedding
from .linear import MaQDLinear
from .norm import LayerBatchNorm
from .packed import PackedEmbedding, PackedLinear

LINEARS = (MaQDLinear, PackedLinear)
"""Linear layers, trainable and packed."""
TABLES = (MaQDEmbedding, PackedEmbedding)
"""Embeddings, trainable and packed."""
TRAINABLE = (MaQDLinear, MaQDEmbedding)
"""Layers and embeddings in training."""
PACKED = (PackedLinear, PackedEmbedding)
"""Layers and embeddings on packed codes."""
QUANTIZED = (*TRAINABLE, *PACKED)
"""Layers and embeddings with low-bit weights."""
OURS = (*QUANTIZED, LayerBatchNorm)
"""Every class that a conversion puts into a model."""
