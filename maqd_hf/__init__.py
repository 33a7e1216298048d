"""MaQD for Hugging Face: 1 to 8 bit models by quantization-aware training, packed and reloadable.

Importing this package registers ``quant_method: "maqd"`` with transformers, so that
``from_pretrained`` can load its checkpoints.
"""

from .accounting import inference_cost
from .config import MaQDConfig
from .conversion import quantize_model
from .decoding import use_native
from .finalize import dequantize_model, pack_model
from .hf_quantizer import register
from .report import ConversionReport
from .saving import save_model
from .size import model_size

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "MaQDConfig",
    "dequantize_model",
    "inference_cost",
    "model_size",
    "pack_model",
    "quantize_model",
    "save_model",
    "use_native",
]

register()
