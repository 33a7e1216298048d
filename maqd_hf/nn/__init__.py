"""Layers: trainable (``MaQDLinear``, ``MaQDEmbedding``, ``LayerBatchNorm``) and packed."""

from .activation import ActivationQuantizer, own_rows, rotate
from .context import BatchContext, FirstToken
from .embedding import MaQDEmbedding
from .linear import MaQDLinear, Start
from .norm import LayerBatchNorm, NormSpec
from .packed import PackedEmbedding, PackedLinear
from .spec import ActivationScaling, LinearSpec
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
