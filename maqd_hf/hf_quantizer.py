"""The only module that knows ``from_pretrained``: registers MaQD with transformers.

Three ways in, one class:
- a checkpoint in state "qat" or "packed": its layers are put into the empty model first, then the
  tensors load under their own names (no converters, no tensor subclasses);
- a float checkpoint with ``quantization_config=MaQDConfig(...)``: loads as float, then converts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import wraps
from inspect import getattr_static, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .checkpoint.files import seal
from .checkpoint.integrity import (
    FileCheck,
    Forms,
    check_files,
    check_forms,
    check_loaded,
    check_new,
    check_plain,
    check_plan,
    check_shapes,
    forms,
)
from .checkpoint.layout import build_modules, refresh
from .checkpoint.saving import recover
from .checkpoint.version1 import VersionOneCheck
from .config import FORMAT_VERSION, QUANT_METHOD, MaQDConfig
from .convert.dequantize import dequantize_model
from .convert.quantize import quantize_model
from .convert.resize import resize_tokens, resizes
from .decoding.forward import attach_native
from .models.finding import modules_of
from .nn import PackedLinear
from .nn.kinds import OURS, PACKED


class MaQDHfQuantizer(HfQuantizer):
    """Loads, saves and converts MaQD models for transformers."""

    requires_calibration = False
    quantization_config: MaQDConfig

    def __init__(self, quantization_config: MaQDConfig, **kwargs: Any) -> None:
        # transformers keeps one config object per call; ours is written to on conversion
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._new_heads: list[str] = []
        self._forms: Forms = {}
        self._frozen: list[str] = []
        self._check: FileCheck | VersionOneCheck = FileCheck(None)

    @property
    def _state(self) -> str:
        return self.quantization_config.state

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if not self.pre_quantized and to_disk:
            raise ValueError(
                "device_map sends modules to disk, where weights cannot be converted; "
                "quantize with enough memory first, then load the packed checkpoint"
            )
        if self.pre_quantized and self.quantization_config.modules is None:
            raise ValueError(
                "the checkpoint's quantization_config lists no converted modules: config.json was "
                "edited or cut; save the model again with save_pretrained"
            )

    def update_tp_plan(self, config: Any) -> Any:
        """Look at what is going to be built; the plan stays as it is."""
        if self.pre_quantized:
            check_plan(config, self.quantization_config.digest)
        return config

    update_attn_implementation = update_tp_plan  # which later transformers ask in its place

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._forms = forms(model)
            return model
        check_files(kwargs.get("checkpoint_files"))
        self._check = self._open_check(kwargs.get("checkpoint_files"))
        self._check.check_architecture()
        self._new_heads = build_modules(model, self.quantization_config)
        self._check.check_settings()
        for _, layer in modules_of(model, PackedLinear):
            layer.widen_scale()  # checked as it was saved, which was once in float32
        strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        strict |= {_float32_tensors(name, module) for name, module in modules_of(model, *OURS)}
        model._keep_in_fp32_modules_strict = strict
        if isinstance(getattr(model, "dtype_plan", None), dict):  # transformers 5.0
            model.dtype_plan.update(dict.fromkeys(strict, torch.float32))
        self._forms = forms(model)
        check_shapes(model, self._forms, kwargs.get("checkpoint_files"))
        parameters = model.named_parameters(remove_duplicate=False)
        self._frozen = [name for name, p in parameters if not p.requires_grad]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_forms(model, self._forms)
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
        check_loaded(model)
        self._check.check_tensors(model)
        check_new(model)
        for _, layer in modules_of(model, PackedLinear):
            layer.narrow_scale()
        for _, packed in modules_of(model, *PACKED):
            packed.freeze()
        if self._state == "qat":
            _detach(model)
        else:
            attach_native(model)
        return model

    def _open_check(self, files: list[str] | None) -> FileCheck | VersionOneCheck:
        """The check of these files; ``quantization_config`` is then one of a model in memory."""
        config, old = self.quantization_config, self.quantization_config.format_version == 1
        check = VersionOneCheck(config) if old else FileCheck(files)
        for folder in {Path(file).parent for file in files or ()}:
            recover(folder)
        config.digest, config.format_version = None, FORMAT_VERSION
        return check

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


def _detach(model: Any) -> None:
    """A QAT model is an ordinary model: with a quantizer attached ``save_pretrained(state_dict=X)``
    would ignore X and ``.float()`` would be refused. The config keeps saying what it is."""
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
            module.config._is_quantized = False


# ------------------------------------------------------------------------------------- patches
# transformers asks a quantizer before it saves, a trained model has none, and neither sees the
# files that were written; nobody is asked when tokens are added, or when a damaged config.json no
# longer says that it is ours. So these methods of PreTrainedModel are wrapped; other models pass.


def _is_converted(model: Any) -> bool:
    return isinstance(getattr(model.config, "quantization_config", None), MaQDConfig)


def _sealed(save: Callable[..., Any]) -> Callable[..., Any]:
    """``save_pretrained`` that writes a digest of what it wrote into ``config.json``."""

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        converted = _is_converted(self)
        if converted:
            refresh(self, self.config.quantization_config)
        result = save(self, save_directory, *args, **kwargs)
        main = kwargs.get("is_main_process", args[0] if args else True)
        on_this_rank = getattr(self, "should_save_on_this_rank", bool)
        if converted and on_this_rank(main):
            seal(save_directory, kwargs.get("variant"))
        return result

    return save_pretrained


def _uploads_sealed(upload: Callable[..., Any]) -> Callable[..., Any]:
    """``_upload_modified_files``, which ``save_pretrained(push_to_hub=True)`` calls at its end."""

    @wraps(upload)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_converted(self):
            seal(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _resizes_ours(resize: Callable[..., Any]) -> Callable[..., Any]:
    """``resize_token_embeddings`` that keeps quantized tables and heads on their grids."""

    @wraps(resize)
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        if not (_is_converted(self) and resizes(self)):
            return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        table = self.get_input_embeddings()
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        rows += -rows % (pad_to_multiple_of or 1)
        if rows != table.num_embeddings:
            resize_tokens(self, rows, mean_resizing)
        return table

    return resize_token_embeddings


def _loads_ours_as_ours(load: Callable[..., Any]) -> Callable[..., Any]:
    """``_load_pretrained_model`` that refuses files of ours for a model that is not to be ours."""

    names = signature(load)

    @wraps(load)
    def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs).arguments  # adapters are loaded by their names
        quantizer = given["load_config"].hf_quantizer
        if not (isinstance(quantizer, MaQDHfQuantizer) and quantizer.pre_quantized):
            check_plain(given["checkpoint_files"])
        return load(*args, **kwargs)

    return _load_pretrained_model


_WRAPPERS = {
    "_load_pretrained_model": _loads_ours_as_ours,
    "save_pretrained": _sealed,
    "_upload_modified_files": _uploads_sealed,
    "resize_token_embeddings": _resizes_ours,
}


def _patch(name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a method of ``PreTrainedModel``, once however often it is asked for."""
    method = getattr(PreTrainedModel, name)
    if not getattr(method, "_knows_maqd", False):
        wrapped = wrapper(method)
        wrapped._knows_maqd = True
        static = isinstance(getattr_static(PreTrainedModel, name), staticmethod)
        setattr(PreTrainedModel, name, staticmethod(wrapped) if static else wrapped)


def register() -> None:
    """Make transformers load and save quant_method "maqd"; safe to call twice."""
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MaQDHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MaQDConfig
    for name, wrapper in _WRAPPERS.items():
        _patch(name, wrapper)
