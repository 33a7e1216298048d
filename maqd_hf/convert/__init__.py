"""From float to trainable (``quantize_model``), to packed (``pack_model``), and back to float.

Imports ``checkpoint``, ``decoding`` and below.

- ``plan``: which modules are converted, and why the others are not; nothing is touched yet;
- ``quantize``: the plan carried out, float model -> QAT model;
- ``pack``: QAT model -> packed model (the bytes themselves: ``nn.packed`` and ``packing``);
- ``dequantize``: back to a plain float model;
- ``folding``: a norm's affine and static scalar moved to where they cost nothing;
- ``resize``: tokens added to quantized tables and heads, or taken from them;
- ``report``, ``size``: what was done, and what it weighs.
"""

from .dequantize import dequantize_model
from .pack import pack_model
from .quantize import quantize_model
from .report import ConversionReport
from .size import model_size

__all__ = [
    "ConversionReport",
    "dequantize_model",
    "model_size",
    "pack_model",
    "quantize_model",
]
