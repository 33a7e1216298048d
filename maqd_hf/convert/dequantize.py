"""A QAT or packed model back to float: ``dequantize_model``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.layout import describe
from ..config import quantization_config
from ..decoding.forward import use_native
from ..models.finding import modules_of
from ..models.probing import probe_norm
from ..models.surgery import TIED_TENSORS, remove_context, replace_module
from ..nn import (
    LayerBatchNorm,
    LinearSpec,
    MaQDLinear,
    rotate,
)
from ..nn.kinds import LINEARS, PACKED, QUANTIZED


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Turn a QAT or packed model into a plain float one, in place; its weights keep their grid.

    Activations are no longer quantized. ``dtype`` is that of the result, by default the model's.

    Returns the names of the modules a plain architecture cannot express: static norms, and layers
    whose bias came from a norm's beta where the original has none. They stay as they are, and the
    model still needs this package to load. If there are none, plain transformers loads it.
    """
    config = quantization_config(model)
    use_native(model, False)
    dtype = dtype or model.dtype  # type: ignore[assignment]
    originals, left = dict(_float_skeleton(model).named_modules()), []
    for name, module in modules_of(model, *QUANTIZED):
        plain = _plain_layer(originals[name], module)
        if isinstance(plain, MaQDLinear):
            left.append(name)
        replace_module(model, name, plain.to(dtype))
    for name, norm in modules_of(model, LayerBatchNorm):
        if norm.spec.statistics == "static" or float(norm.gate) != 0:
            left.append(name)
        else:
            replace_module(model, name, _plain_norm(originals[name], norm).to(dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    keys: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    for key in [k for k in keys if k.rpartition(".")[2] in TIED_TENSORS]:
        del keys[key]
    model.tie_weights()  # type: ignore[operator]
    _forget_quantization(model)
    if left:
        remaining = replace(config, state="qat", modules=describe(model, config, {}, {}))
        model.config.quantization_config = remaining  # type: ignore[union-attr]
    else:
        remove_context(model)
    return left


def _float_skeleton(model: nn.Module) -> nn.Module:
    settings = model.config.to_dict()  # type: ignore[union-attr, operator]
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        skeleton: nn.Module = type(model)(type(model.config).from_dict(settings))  # type: ignore[union-attr]
    return skeleton


def _plain_layer(original: nn.Module, layer: Any) -> nn.Module:
    """The float layer of ``layer``'s weight: ``original`` filled, or a float ``MaQDLinear``."""
    packed = isinstance(layer, PACKED)
    weight = (layer.dequantized_weight() if packed else layer.quantized_weight()).clone()
    if isinstance(layer, LINEARS):
        weight = rotate(weight, layer.rotation)
    bias = getattr(layer, "bias", None)
    if bias is not None and getattr(original, "bias", None) is None:
        spec = LinearSpec(weight_levels=None, activation_levels=None)
        kept = MaQDLinear(layer.in_features, layer.out_features, True, spec, device="meta")
        kept.weight, kept.bias = nn.Parameter(weight), nn.Parameter(bias.clone())
        return kept
    transposed = isinstance(original, Conv1D)
    original.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    if bias is not None:
        original.bias = nn.Parameter(bias.clone())
    for name, buffer in original.named_buffers():  # Gemma's embed_scale
        scale = torch.full(buffer.shape, layer.output_scale, dtype=buffer.dtype)
        setattr(original, name, scale.to(weight.device))
    return original


def _plain_norm(original: nn.Module, norm: LayerBatchNorm) -> nn.Module:
    kind = probe_norm(original)
    assert not isinstance(kind, str)  # it was recognized when the model was converted
    ones = torch.ones(norm.features, device=norm.gate.device)
    gamma = ones if norm.weight is None else norm.weight
    original.weight = nn.Parameter(gamma - float(kind.unit_offset))
    if kind.has_bias:
        original.bias = nn.Parameter(torch.zeros_like(ones) if norm.bias is None else norm.bias)
    return original


def _forget_quantization(model: nn.Module) -> None:
    del model.config.quantization_config  # type: ignore[union-attr]
    for attribute in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.is_quantized = False  # type: ignore[assignment]
