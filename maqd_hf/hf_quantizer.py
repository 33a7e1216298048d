"""The only module that knows ``from_pretrained``: registers MaQD with transformers.

Three ways in, one class:
- a checkpoint in state "qat" or "packed": its layers are put into the empty model first, then the
  tensors load under their own names (no converters, no tensor subclasses);
- a float checkpoint with ``quantization_config=MaQDConfig(...)``: loads as float, then converts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .config import QUANT_METHOD, MaQDConfig
from .building import build_modules
from .conversion import quantize_model
from .finalize import dequantize_model
from .nn import LayerBatchNorm, MaQDEmbedding, MaQDLinear, PackedEmbedding, PackedLinear
from .packing import largest_valid_word

_OURS = (MaQDLinear, MaQDEmbedding, PackedLinear, PackedEmbedding, LayerBatchNorm)


class MaQDHfQuantizer(HfQuantizer):
    """Loads, saves and converts MaQD models for transformers."""

    requires_calibration = False

    def __init__(self, quantization_config: MaQDConfig, **kwargs: Any) -> None:
        # transformers keeps one config object per call; ours is written to on conversion
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    @property
    def _state(self) -> str:
        return self.quantization_config.state

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict):
            if "disk" in device_map.values():
                raise ValueError(
                    "device_map sends modules to disk, where weights cannot be converted; "
                    "quantise with enough memory first, then load the packed checkpoint"
                )
        if self.pre_quantized and self.quantization_config.modules is None:
            raise ValueError(
                "the checkpoint's quantization_config lists no converted modules: config.json was "
                "edited or cut; save the model again with save_pretrained"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        build_modules(model, self.quantization_config)
        strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        strict |= {name for name, m in model.named_modules() if isinstance(m, _FLOAT32)}
        model._keep_in_fp32_modules_strict = strict
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            del model.config.quantization_config
            quantize_model(model, self.quantization_config)
            _detach(model)
            return model
        _check_loaded(model)
        if self._state == "qat":
            _detach(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        left = dequantize_model(model)
        if left:
            raise ValueError(
                f"a plain architecture cannot express {left[:3]} (static norms or moved biases)"
            )
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return bool(self._state == "qat")

    @property
    def is_compileable(self) -> bool:
        return True


_FLOAT32 = (MaQDLinear, MaQDEmbedding, PackedLinear, PackedEmbedding)


def _detach(model: Any) -> None:
    """A QAT model is an ordinary model: with a quantizer attached ``save_pretrained(state_dict=X)``
    would ignore X and ``.float()`` would be refused. The config keeps saying what it is."""
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
            module.config._is_quantized = False


def _check_loaded(model: nn.Module) -> None:
    """Every tensor of our layers must have come from the file and make sense.

    transformers fills what a checkpoint lacks with uninitialised memory, and a flipped bit in a
    word gives a code above M-1 or a scale that is not finite; both would be a silently wrong model.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _OURS):
            continue
        for tensor_name, tensor in module.state_dict(keep_vars=True, prefix="").items():
            if tensor.is_meta or "." in tensor_name and not tensor_name.startswith("activation."):
                continue
            full = f"{name}.{tensor_name}"
            if not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(
                    f"{full} is missing from the checkpoint: its config.json and its safetensors "
                    "do not belong together, or the file was cut; download or save it again"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                if tensor_name == "activation.log_step":
                    continue  # NaN says "not calibrated yet"
                raise ValueError(f"{full} holds NaN or infinity: the checkpoint is corrupt")
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            _check_words(name, module)


def _check_words(name: str, module: PackedLinear | PackedEmbedding) -> None:
    limit = largest_valid_word(module.levels)
    if module.weight.is_meta or limit == 2**32 - 1:
        return
    # int32 holds the unsigned word: those above 2**31 - 1 are the negative ones
    as_signed = limit - 2**32 if limit >= 2**31 else limit
    wrong = (
        (module.weight < 0) & (module.weight > as_signed)
        if limit >= 2**31
        else ((module.weight < 0) | (module.weight > as_signed))
    )
    if bool(torch.any(wrong)):
        raise ValueError(
            f"{name}.weight has {int(wrong.sum())} words that no code of {module.levels} levels "
            "packs to: the checkpoint is corrupt, or weight_levels in config.json was changed"
        )


def register() -> None:
    """Make ``from_pretrained`` know quant_method "maqd"; safe to call twice."""
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MaQDHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MaQDConfig
