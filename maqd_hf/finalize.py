"""The two ways out of training: ``pack_model`` for inference, ``dequantize_model`` back to float."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from .building import QUANTIZED, TIED_TENSORS, modules_of, replace_module
from .conversion import make_report, quantization_config
from .folding import absorb_scale
from .matching import Names, is_linear, looks_like_norm, probe_norm
from .nn import (
    ActivationQuantizer,
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
)
from .report import ConversionReport


def pack_model(model: nn.Module) -> ConversionReport:
    """Replace every trained layer by its packed form, in place; static norms are folded.

    A norm whose gate is open (1) becomes static and its constant moves into its consumers; one
    whose gate is closed (0) stays per token. The output is the same up to float rounding.

    Raises:
        ValueError: not a QAT model, activations not calibrated, a weight not finite, or a gate
            half open. The model is then unchanged.
    """
    config = quantization_config(model)
    if config.state != "qat":
        raise ValueError("this model is packed already")
    _check_packable(model)
    names = Names(model)
    modules: dict[str, Any] = {k: dict(v) for k, v in (config.modules or {}).items()}
    for name, layer in modules_of(model, MaQDLinear):
        if layer.spec.weight_levels is not None and "tied_to" not in modules[names.relative(name)]:
            replace_module(model, name, PackedLinear.from_qat(layer))
    for name, table in modules_of(model, MaQDEmbedding):
        replace_module(model, name, PackedEmbedding.from_qat(table))
    for relative, entry in modules.items():
        if "tied_to" in entry:
            _pack_tied_head(model, names.absolute(relative), names.absolute(entry["tied_to"]))
    for name, norm in modules_of(model, LayerBatchNorm):
        entry = modules[names.relative(name)]
        _freeze_norm(norm, [model.get_submodule(names.absolute(n)) for n in entry["absorbed_by"]])
        entry.update(asdict(norm.spec))
    config = replace(config, state="packed", modules=modules)
    model.config.quantization_config = config  # type: ignore[union-attr, assignment]
    model.eval()
    return make_report(model, config)


def _check_packable(model: nn.Module) -> None:
    for name, layer in modules_of(model, MaQDLinear):
        if isinstance(layer.activation, ActivationQuantizer) and not layer.activation.calibrated:
            raise ValueError(
                f"{name}: the static activation step was never calibrated; run "
                "maqd_hf.calibration.calibrate_activations(model, batches), train with "
                "MaQDTrainer, or use activation_scaling='token'"
            )
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(f"{name}.weight holds NaN or infinity: training diverged")
    for name, norm in modules_of(model, LayerBatchNorm):
        gate = float(norm.gate)
        if norm.spec.statistics == "gated" and gate not in (0.0, 1.0):
            raise ValueError(
                f"{name}: its gate stands at {gate:.3f}, half way from per-token to static; finish "
                "the schedule (resume training), or set norm.gate to 0 or 1"
            )
        if gate == 1 and norm.spec.statistics == "gated" and not bool(norm.batches_seen):
            raise ValueError(f"{name}: its gate is open but it never saw a batch in training mode")


def _pack_tied_head(model: nn.Module, head: str, embedding: str) -> None:
    old, table = model.get_submodule(head), model.get_submodule(embedding)
    assert isinstance(old, MaQDLinear) and isinstance(table, PackedEmbedding)
    packed = PackedLinear.from_qat(old)
    table.tie(packed)
    replace_module(model, head, packed)
    keys = getattr(model, "all_tied_weights_keys", None)
    if keys is not None:
        for name in TIED_TENSORS:
            keys.pop(f"{head}.{name}", None)
        for name in ("weight", "weight_scale", "weight_offset"):
            keys[f"{head}.{name}"] = f"{embedding}.{name}"


@torch.no_grad()
def _freeze_norm(norm: LayerBatchNorm, consumers: list[nn.Module]) -> None:
    if norm.spec.statistics != "gated":
        return
    if float(norm.gate) == 0:
        norm.spec = replace(norm.spec, statistics="token")
        return
    norm.spec = replace(norm.spec, statistics="static")
    if consumers and all(isinstance(c, PackedLinear) for c in consumers):
        absorb_scale(norm, consumers)  # type: ignore[arg-type]


@torch.no_grad()
def dequantize_model(model: nn.Module) -> list[str]:
    """Turn a QAT or packed model into a plain float one, in place; its weights keep their grid.

    Returns the names of what a plain architecture cannot express and was therefore left: static
    norms, and biases that a norm's beta moved into a layer that had none. Activations are no
    longer quantised.
    """
    config = quantization_config(model)
    clean = type(model.config).from_dict(  # type: ignore[union-attr, operator]
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}  # type: ignore[union-attr, operator]
    )
    with torch.device("meta"):
        skeleton = type(model)(clean)
    originals, left = dict(skeleton.named_modules()), []
    for name, module in modules_of(model, QUANTIZED):
        packed = isinstance(module, (PackedLinear, PackedEmbedding))
        weight = module.dequantized_weight() if packed else module.quantized_weight()
        _restore(model, name, originals[name], weight, getattr(module, "bias", None), left)
    for name, norm in modules_of(model, LayerBatchNorm):
        if norm.spec.statistics == "static" or float(norm.gate) != 0:
            left.append(name)
        else:
            _restore_norm(model, name, originals[name], norm)
    for relative, entry in (config.modules or {}).items():
        if "tied_to" in entry:
            names = Names(model)
            source = model.get_submodule(names.absolute(entry["tied_to"]))
            model.get_submodule(names.absolute(relative)).weight = source.weight
    keys = getattr(model, "all_tied_weights_keys", {})
    for key in [k for k in keys if k.rpartition(".")[2] in TIED_TENSORS]:
        del keys[key]
    if not left:
        del model.config.quantization_config  # type: ignore[union-attr]
    for attribute in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.is_quantized = False  # type: ignore[assignment]
    return left


def _restore(
    model: nn.Module,
    name: str,
    original: nn.Module,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    left: list[str],
) -> None:
    weight = weight.detach().clone()
    if is_linear(original) and not isinstance(original, nn.Linear):
        weight = weight.t().contiguous()
    original.weight = nn.Parameter(weight)
    if bias is not None:
        if getattr(original, "bias", None) is None:
            left.append(f"{name}.bias")
        original.bias = nn.Parameter(bias.detach().clone())
    for buffer_name, buffer in original.named_buffers():  # Gemma's embed_scale
        source = model.get_submodule(name)
        value = torch.as_tensor(getattr(source, "output_scale", 1.0))
        setattr(original, buffer_name, value.to(buffer.dtype).expand(buffer.shape).clone())
    replace_module(model, name, original)


def _restore_norm(model: nn.Module, name: str, original: nn.Module, norm: LayerBatchNorm) -> None:
    kind = probe_norm(original)
    assert looks_like_norm(original) and not isinstance(kind, str)
    device, dtype = norm.gate.device, original.weight.dtype  # type: ignore[union-attr]
    gamma = torch.ones(norm.features, device=device) if norm.weight is None else norm.weight
    original.weight = nn.Parameter((gamma.detach() - float(kind.unit_offset)).to(dtype))  # type: ignore[arg-type]
    if kind.has_bias:
        beta = torch.zeros_like(gamma) if norm.bias is None else norm.bias
        original.bias = nn.Parameter(beta.detach().to(dtype))  # type: ignore[arg-type]
    replace_module(model, name, original)
