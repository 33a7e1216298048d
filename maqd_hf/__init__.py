"""MaQD for Hugging Face: 1 to 8 bit models by quantization-aware training, packed and reloadable.

Importing this package registers ``quant_method: "maqd"`` with transformers, so that
``from_pretrained`` can load its checkpoints, and tells peft, once that is imported, how to merge
into its layers. What only training and measuring need is imported when it is first asked for.

The rooms, each of which imports only from those before it (``tests/test_imports.py``):

- ``functional``, ``packing``: the method's equations, and codes in words of 32 bits;
- ``data``: text and models to work on;
- ``kernels``: the packed products and norms, compiled and in plain torch;
- ``nn``: the layers, trainable and packed;
- ``config``, ``models``, ``decoding``: the settings; a transformers model and its modules; the
  native decode step;
- ``checkpoint``, ``calibration``, ``evaluation``: what a saved model says of itself; start values;
  measuring;
- ``convert``, ``training``: float to trainable to packed; the trainer;
- ``hf_quantizer``: what makes ``from_pretrained`` know all this.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint import save_model
from .config import MaQDConfig
from .convert import ConversionReport, dequantize_model, model_size, pack_model, quantize_model
from .decoding import use_native
from .hf_quantizer import register
from .models.adapters import watch_peft

if TYPE_CHECKING:
    from .calibration import calibrate, select_static_norms
    from .evaluation import inference_cost
    from .training import MaQDTrainer, MaQDTrainingArguments

__version__ = "0.1.0"

_LAZY = {
    "MaQDTrainer": "training",
    "MaQDTrainingArguments": "training",
    "calibrate": "calibration",
    "inference_cost": "evaluation",
    "select_static_norms": "calibration",
}
"""Public names whose rooms are imported at their first use.

The package takes 0.05 s beside any transformers model, the trainer more than a second (notebook:
"What importing the package takes").
"""

__all__ = [
    "ConversionReport",
    "MaQDConfig",
    "MaQDTrainer",
    "MaQDTrainingArguments",
    "calibrate",
    "dequantize_model",
    "inference_cost",
    "model_size",
    "pack_model",
    "quantize_model",
    "save_model",
    "select_static_norms",
    "use_native",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
watch_peft()
