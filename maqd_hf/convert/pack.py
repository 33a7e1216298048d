"""The conversion of a trained QAT model into a packed one, in place: ``pack_model``.

What a layer becomes is told by its class in ``nn.packed``; here the model is checked first, so that
a refused one is left as it was, and static norms are folded last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..checkpoint.layout import describe, relations
from ..config import quantization_config
from ..decoding.forward import attach_native
from ..models.finding import modules_of
from ..models.surgery import note_tied_tensors, replace_module
from ..nn import (
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
)
from ..nn.kinds import QUANTIZED
from ..nn.packed import check_calibrated
from .folding import fold_scale, takes_scale
from .report import ConversionReport, make_report


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
    folded_into, tied_to = relations(model, config)
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
        _settle_norm(norm, [model.get_submodule(n) for n in folded_into.get(name, ())])
    modules = describe(model, config, folded_into, tied_to)
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
def _settle_norm(norm: LayerBatchNorm, consumers: list[nn.Module]) -> None:
    if norm.spec.statistics != "gated":
        return
    if float(norm.gate) == 0:
        norm.spec = replace(norm.spec, statistics="token")
        return
    norm.spec = replace(norm.spec, statistics="static")
    takers = bool(consumers) and all(takes_scale(layer) for layer in consumers)
    if norm.weight is not None or takers:
        fold_scale(norm, consumers)  # type: ignore[arg-type]
