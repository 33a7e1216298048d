"""Layers: trainable (``MaQDLinear``, ``MaQDEmbedding``, ``LayerBatchNorm``) and packed."""

from .context import BatchContext, FirstToken
from .embedding import MaQDEmbedding
from .linear import (
    ActivationQuantizer,
    ActivationScaling,
    LinearSpec,
    MaQDLinear,
    Start,
    own_rows,
    rotate,
)
from .norm import LayerBatchNorm, NormSpec
from .packed import PackedEmbedding, PackedLinear
from .stamp import Stamp

__all__ = [
    "ActivationQuantizer",
    "ActivationScaling",
    "BatchContext",
    "FirstToken",
    "LayerBatchNorm",
    "LinearSpec",
    "MaQDEmbedding",
    "MaQDLinear",
    "NormSpec",
    "PackedEmbedding",
    "PackedLinear",
    "Stamp",
    "Start",
    "own_rows",
    "rotate",
]
