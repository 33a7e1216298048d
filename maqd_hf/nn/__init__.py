"""Layers, trainable and packed, and what they share.

Imports ``kernels`` and below, and no transformers.

- ``linear``, ``embedding``, ``activation``, ``norm``: ``MaQDLinear``, ``MaQDEmbedding``,
  ``ActivationQuantizer``, ``LayerBatchNorm``;
- ``packed``: ``PackedLinear`` and ``PackedEmbedding``: where trained weights become words of codes;
- ``spec``: the settings of a layer; ``kinds``: tuples of our classes;
- ``calls``: which call of the model a layer runs in;
- ``context``: which tokens of the batch are padding and which are first;
- ``step_search``: the step of least error for given rows;
- ``stamp``: values derived from tensors, and whether they still hold; ``precision``: dtypes;
  ``modes``: evaluation for a while.
"""

from .activation import ActivationQuantizer, own_rows, rotate
from .context import BatchContext, FirstToken, Masks
from .embedding import MaQDEmbedding
from .linear import MaQDLinear, Start
from .norm import LayerBatchNorm, NormSpec
from .packed import PackedEmbedding, PackedLinear
from .spec import ActivationScaling, LinearSpec
from .stamp import CountedModule, FrozenParameter, Stamp, count_together, freeze

__all__ = [
    "ActivationQuantizer",
    "ActivationScaling",
    "BatchContext",
    "CountedModule",
    "FirstToken",
    "FrozenParameter",
    "LayerBatchNorm",
    "LinearSpec",
    "MaQDEmbedding",
    "MaQDLinear",
    "Masks",
    "NormSpec",
    "PackedEmbedding",
    "PackedLinear",
    "Stamp",
    "Start",
    "count_together",
    "freeze",
    "own_rows",
    "rotate",
]
