"""The ways out of training: ``pack_model`` for inference, ``dequantize_model`` back to float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .building import (
    QUANTIZED,
    TIED_TENSORS,
    describe,
    modules_of,
    note_tied_tensors,
    remove_context,
    replace_module,
)
from .conversion import make_report, quantization_config
from .decoding import attach_native, use_native
from .folding import absorb_scale, takes_scale
from .integrity import checksum
from .matching import Names
from .nn import (
    LayerBatchNorm,
    LinearSpec,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
    rotate,
)
from .nn.packed import check_calibrated
from .probing import probe_norm
from .report import ConversionReport


def pack_model(model: nn.Module) -> ConversionReport:
    """Replace every trained layer by its packed form, in place; static norms are folded.

    A norm whose gate is open (1) becomes static and its constant moves into its gamma or its
    consumers; one whose gate is closed (0) stays per token. The output is the same up to float
    rounding.

    Raises:
        ValueError: not a QAT model, activations not calibrated, a weight not finite, or a gate
            half open. The model is then unchanged.
    """
    config = quantization_config(model)
    if config.state != "qat":
        raise ValueError("this model is packed already")
    _check_packable(model)
    names, entries = Names(model), config.modules or {}
    absorbed_by = {
        names.absolute(norm): [names.absolute(n) for n in entry["absorbed_by"]]
        for norm, entry in entries.items()
        if entry["kind"] == "norm"
    }
    tied_to = {
        names.absolute(head): names.absolute(entry["tied_to"])
        for head, entry in entries.items()
        if "tied_to" in entry
    }
    for name, layer in modules_of(model, MaQDLinear):
        if layer.spec.weight_levels is not None:
            packed = PackedLinear.from_qat(layer)
            if name in tied_to:
                packed.bias = layer.bias  # may itself be tied, as that of BERT's head is
            replace_module(model, name, packed)
    for name, table in modules_of(model, MaQDEmbedding):
        replace_module(model, name, PackedEmbedding.from_qat(table))
    for head, embedding in tied_to.items():
        model.get_submodule(embedding).tie(model.get_submodule(head))  # type: ignore[operator]
        note_tied_tensors(model, embedding, head)
    for name, norm in modules_of(model, LayerBatchNorm):
        _freeze_norm(norm, [model.get_submodule(n) for n in absorbed_by[name]])
    modules = describe(model, config, absorbed_by, tied_to)
    for relative, entry in modules.items():
        entry["crc32"] = checksum(model.get_submodule(names.absolute(relative)))
    config = replace(config, state="packed", modules=modules)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.eval()
    attach_native(model)
    return make_report(model, config)


def _check_packable(model: nn.Module) -> None:
    for name, layer in modules_of(model, MaQDLinear):
        check_calibrated(layer, name)
    for name, module in modules_of(model, *QUANTIZED, LayerBatchNorm):
        for tensor_name, tensor in module.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}.{tensor_name} holds NaN or infinity: training diverged")
    for name, norm in modules_of(model, LayerBatchNorm):
        gate = float(norm.gate)
        if norm.spec.statistics == "gated" and gate not in (0.0, 1.0):
            raise ValueError(
                f"{name}: its gate stands at {gate:.3f}, half way from per-token to static; finish "
                "the schedule (resume training), or set norm.gate to 0 or 1"
            )
        if gate == 1 and norm.spec.statistics == "gated" and not bool(norm.batches_seen):
            raise ValueError(f"{name}: its gate is open but it never saw a batch in training mode")


@torch.no_grad()
def _freeze_norm(norm: LayerBatchNorm, consumers: list[nn.Module]) -> None:
    if norm.spec.statistics != "gated":
        return
    if float(norm.gate) == 0:
        norm.spec = replace(norm.spec, statistics="token")
        return
    norm.spec = replace(norm.spec, statistics="static")
    takers = bool(consumers) and all(takes_scale(layer) for layer in consumers)
    if norm.weight is not None or takers:
        absorb_scale(norm, consumers)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ back to float


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Turn a QAT or packed model into a plain float one, in place; its weights keep their grid.

    Activations are no longer quantised. ``dtype`` is that of the result, by default the model's.

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
    packed = isinstance(layer, (PackedLinear, PackedEmbedding))
    weight = (layer.dequantized_weight() if packed else layer.quantized_weight()).clone()
    if isinstance(layer, (PackedLinear, MaQDLinear)):
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
    assert not isinstance(kind, str)  # it was recognised when the model was converted
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
