"""The conversion of a float model into a QAT model, in place.

``quantize_model`` plans first (``plan``) and touches the model only when the plan holds, so a
refused model is left as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checkpoint.layout import describe
from ..config import MaQDConfig
from ..models.finding import modules_of
from ..models.surgery import attach_context, replace_module, tie_head
from ..nn import (
    BatchContext,
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    Start,
)
from ..nn.kinds import LINEARS, TRAINABLE
from .folding import fold_affine
from .plan import ConversionPlan, NormPlan, plan_conversion
from .report import ConversionReport, make_report


def quantize_model(
    model: nn.Module,
    config: MaQDConfig | None = None,
    *,
    start: Start = "search",
    **settings: Any,
) -> ConversionReport:
    """Make ``model`` trainable on its grids, in place, and report what was and was not converted.

    Args:
        model: a transformers causal LM or encoder, float weights on a real device.
        config: what to convert and how; or give its fields as keyword ``settings``.
        start: where the grids start (``nn.Start``). "range" saves the search (20 s at 135 M
            weights) when a calibration follows that searches again.

    Every norm starts with its gate closed and every weight at the grid nearest to it, so the model
    starts as itself up to rounding. Static activation steps are not known yet: calibrate them
    (``maqd_hf.calibration``), or train with ``MaQDTrainer``, which does it first. Until then inputs
    stay float, with a warning, and another trainer's first backward is refused.

    Raises:
        ValueError: nothing matches, a group size does not divide a width, a weight is not finite,
            or the model is quantized already. The model is then unchanged.
    """
    if config is not None and settings:
        raise ValueError(f"give a MaQDConfig or its fields, not both (got {sorted(settings)})")
    config = config or MaQDConfig(**settings)
    if config.state != "qat" or config.modules is not None:
        raise ValueError("this MaQDConfig comes from a converted model; make a new one")
    existing = getattr(getattr(model, "config", None), "quantization_config", None)
    if existing is not None or modules_of(model, *LINEARS):
        raise ValueError(
            f"{type(model).__name__} is quantized already; load the float model to convert it"
        )
    plan = plan_conversion(model, config)
    _check_finite(model, plan)
    context = BatchContext()
    _convert_linears(model, plan, context)
    _convert_embedding(model, plan, config.embedding_levels, context)
    for name, norm_plan in plan.norms.items():
        _convert_norm(model, name, norm_plan, config, context)
    grids = {id(layer.weight): layer for _, layer in modules_of(model, *TRAINABLE)}
    for layer in grids.values():  # a tied head has the embedding's; calibrations leave that alone
        searched = isinstance(layer, MaQDEmbedding) and start == "range"
        layer.reset_quantizer("search" if searched else start)
    attach_context(model, context)
    folded_into = {name: norm.folded_into for name, norm in plan.norms.items()}
    tied_to = {plan.head: plan.embedding} if plan.head and plan.embedding and plan.head_tied else {}
    config = config.settled()
    config.modules = describe(model, config, folded_into, tied_to)
    model.config.quantization_config = config  # type: ignore[union-attr]
    return make_report(model, config, plan)


def _check_finite(model: nn.Module, plan: ConversionPlan) -> None:
    """Raise ``ValueError`` if a tensor that is to be converted holds NaN or infinity."""
    for name in [*plan.linears, *plan.norms, *([plan.embedding] if plan.embedding else [])]:
        for tensor_name, tensor in model.get_submodule(name).named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name}.{tensor_name} holds NaN or infinity: the float checkpoint is broken, "
                    "nothing was converted"
                )


def _convert_linears(model: nn.Module, plan: ConversionPlan, context: BatchContext) -> None:
    """Replace the planned layers, except for a head that is tied to the embedding."""
    for name, spec in plan.linears.items():
        if name == plan.head and plan.head_tied:
            continue
        linear = model.get_submodule(name)
        replace_module(model, name, MaQDLinear.from_linear(linear, spec, context, start=None))


def _convert_embedding(
    model: nn.Module, plan: ConversionPlan, levels: int | None, context: BatchContext
) -> None:
    """Replace the planned embedding, and the head that is tied to it."""
    if plan.embedding is None or levels is None:
        return
    embedding: nn.Embedding = model.get_submodule(plan.embedding)  # type: ignore[assignment]
    table = MaQDEmbedding.from_embedding(embedding, levels, plan.embedding_scale, start=None)
    replace_module(model, plan.embedding, table)
    if plan.head is not None and plan.head_tied:
        tie_head(model, plan.embedding, plan.head, plan.linears[plan.head], context)


def _convert_norm(
    model: nn.Module, name: str, plan: NormPlan, config: MaQDConfig, context: BatchContext
) -> None:
    """Replace the norm ``name``, and move its affine into its readers where that is planned."""
    norm, kind = model.get_submodule(name), plan.kind
    spec = config.norm_spec(kind.centered, kind.has_bias)
    if not plan.gated:
        spec = replace(spec, statistics="token")
    gamma = kind.gamma(norm)
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    new = LayerBatchNorm(kind.features, spec, kind.eps, context, gamma.device, dtype)
    with torch.no_grad():
        if new.weight is not None:
            new.weight.copy_(gamma)
        if new.bias is not None:
            new.bias.copy_(norm.bias)  # type: ignore[arg-type]
    consumers = [model.get_submodule(n) for n in plan.folded_into]
    if consumers:
        fold_affine(new, consumers)  # type: ignore[arg-type]
    replace_module(model, name, new)
