"""The only module that knows ``from_pretrained``: registers MaQD with transformers.

Three ways in, one class:
- a checkpoint in state "qat" or "packed": its layers are put into the empty model first, then the
  tensors load under their own names (no converters, no tensor subclasses);
- a float checkpoint with ``quantization_config=MaQDConfig(...)``: loads as float, then converts.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .checkpoint.integrity import check_loaded, check_shapes
from .checkpoint.layout import build_modules
from .config import QUANT_METHOD, MaQDConfig
from .convert.dequantize import dequantize_model
from .convert.quantize import quantize_model
from .decoding.forward import attach_native
from .models.finding import modules_of
from .nn import PackedLinear
from .nn.kinds import OURS


class MaQDHfQuantizer(HfQuantizer):
    """Loads, saves and converts MaQD models for transformers."""

    requires_calibration = False
    quantization_config: MaQDConfig

    def __init__(self, quantization_config: MaQDConfig, **kwargs: Any) -> None:
        # transformers keeps one config object per call; ours is written to on conversion
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._new_heads: list[str] = []
        self._shapes: dict[str, torch.Size] = {}
        self._frozen: list[str] = []

    @property
    def _state(self) -> str:
        return self.quantization_config.state

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if not self.pre_quantized and to_disk:
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
            self._shapes = _shapes(model)
            return model
        self._new_heads = build_modules(model, self.quantization_config)
        for _, layer in modules_of(model, PackedLinear):
            layer.widen_scale()  # checked as it was saved, which was once in float32
        strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        strict |= {_float32_tensors(name, module) for name, module in modules_of(model, *OURS)}
        model._keep_in_fp32_modules_strict = strict
        if isinstance(getattr(model, "dtype_plan", None), dict):  # transformers 5.0
            model.dtype_plan.update(dict.fromkeys(strict, torch.float32))
        self._shapes = _shapes(model)
        parameters = model.named_parameters(remove_duplicate=False)
        self._frozen = [name for name, p in parameters if not p.requires_grad]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_shapes(model, self._shapes)
        if not self.pre_quantized:
            del model.config.quantization_config
            quantize_model(model, self.quantization_config)
            _detach(model)
            return model
        for name in self._new_heads:
            bias = model.get_submodule(name).bias
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
                bias._is_hf_initialized = True
        for name in self._frozen:  # loading makes every float tensor trainable
            model.get_parameter(name).requires_grad_(False)
        check_loaded(model, self.quantization_config)
        for _, layer in modules_of(model, PackedLinear):
            layer.narrow_scale()
        if self._state == "qat":
            _detach(model)
        else:
            attach_native(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        left = dequantize_model(model, dtype)
        if left:
            raise ValueError(
                f"a plain architecture cannot express {left[:3]} (static norms or moved biases)"
            )
        return model

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


def _float32_tensors(name: str, module: nn.Module) -> str:
    """A pattern of the tensors of one of our layers that stay float32 whatever dtype is asked for.

    Not of its words, and not of an embedding's empty mark, which has the dtype of the model.
    """
    tensors = module.state_dict(keep_vars=True)
    floats = [key for key in tensors if tensors[key].is_floating_point() and key != "output_like"]
    return rf"(?:^|\.){re.escape(name)}\.(?:{'|'.join(map(re.escape, floats))})$"


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}


def _detach(model: Any) -> None:
    """A QAT model is an ordinary model: with a quantizer attached ``save_pretrained(state_dict=X)``
    would ignore X and ``.float()`` would be refused. The config keeps saying what it is."""
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
            module.config._is_quantized = False


def register() -> None:
    """Make ``from_pretrained`` know quant_method "maqd"; safe to call twice."""
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MaQDHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MaQDConfig
