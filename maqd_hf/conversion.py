"""Float model -> QAT model, in place.

``quantize_model`` plans first (``matching``) and touches the model only when the plan holds, so a
refused model is left as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .building import (
    QUANTIZED,
    attach_context,
    describe,
    modules_of,
    replace_module,
    tie_head,
)
from .config import MaQDConfig
from .folding import absorb_affine
from .matching import ConversionPlan, NormPlan, plan_conversion
from .nn import (
    BatchContext,
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
    Start,
)
from .report import ConversionReport
from .size import model_size


def quantization_config(model: nn.Module) -> MaQDConfig:
    """The ``MaQDConfig`` of a converted model; ``ValueError`` if it is not one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, MaQDConfig):
        raise ValueError(
            f"{type(model).__name__} is not a MaQD model (its quantization_config is "
            f"{type(config).__name__}); convert it with quantize_model first"
        )
    return config


def quantize_model(
    model: nn.Module,
    config: MaQDConfig | None = None,
    *,
    start: Start = "search",
    **settings: Any,
) -> ConversionReport:
    """Make ``model`` trainable on the grid, in place, and report what was and was not converted.

    Args:
        model: a transformers causal LM or encoder, float weights on a real device.
        config: what to convert and how; or give its fields as keyword ``settings``.
        start: where the grids start (``nn.Start``). "range" saves the search (20 s at 135 M
            weights) when a calibration follows that searches again.

    Every norm starts with its gate closed and every weight at the grid nearest to it, so the model
    starts as itself up to rounding. Static activation steps are not known yet: calibrate them
    (``maqd_hf.calibration``), or train with ``MaQDTrainer``, which does it first.

    Raises:
        ValueError: nothing matches, a group size does not divide a width, a weight is not finite,
            or the model is quantised already. The model is then unchanged.
    """
    if config is not None and settings:
        raise ValueError(f"give a MaQDConfig or its fields, not both (got {sorted(settings)})")
    config = config or MaQDConfig(**settings)
    if config.state != "qat" or config.modules is not None:
        raise ValueError("this MaQDConfig comes from a converted model; make a new one")
    existing = getattr(getattr(model, "config", None), "quantization_config", None)
    if existing is not None or modules_of(model, MaQDLinear, PackedLinear):
        raise ValueError(
            f"{type(model).__name__} is quantised already; load the float model to convert it"
        )
    plan = plan_conversion(model, config)
    _check_finite(model, plan)
    context = BatchContext()
    _convert_linears(model, plan, context)
    _convert_embedding(model, plan, config.embedding_levels, context)
    for name, norm_plan in plan.norms.items():
        _convert_norm(model, name, norm_plan, config, context)
    grids = {id(layer.weight): layer for _, layer in modules_of(model, MaQDLinear, MaQDEmbedding)}
    for layer in grids.values():  # a tied head has the embedding's; calibrations leave that alone
        searched = isinstance(layer, MaQDEmbedding) and start == "range"
        layer.reset_quantizer("search" if searched else start)
    attach_context(model, context)
    absorbed_by = {name: norm.absorbed_by for name, norm in plan.norms.items()}
    tied_to = {plan.head: plan.embedding} if plan.head and plan.embedding and plan.head_tied else {}
    config = config.settled()
    config.modules = describe(model, config, absorbed_by, tied_to)
    model.config.quantization_config = config  # type: ignore[union-attr]
    return make_report(model, config, plan)


def _check_finite(model: nn.Module, plan: ConversionPlan) -> None:
    for name in [*plan.linears, *plan.norms, *([plan.embedding] if plan.embedding else [])]:
        for tensor_name, tensor in model.get_submodule(name).named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name}.{tensor_name} holds NaN or infinity: the float checkpoint is broken, "
                    "nothing was converted"
                )


def _convert_linears(model: nn.Module, plan: ConversionPlan, context: BatchContext) -> None:
    for name, spec in plan.linears.items():
        if name == plan.head and plan.head_tied:
            continue
        linear = model.get_submodule(name)
        replace_module(model, name, MaQDLinear.from_linear(linear, spec, context, start=None))


def _convert_embedding(
    model: nn.Module, plan: ConversionPlan, levels: int | None, context: BatchContext
) -> None:
    if plan.embedding is None or levels is None:
        return
    embedding = model.get_submodule(plan.embedding)
    assert isinstance(embedding, nn.Embedding)
    table = MaQDEmbedding.from_embedding(embedding, levels, plan.embedding_scale, start=None)
    replace_module(model, plan.embedding, table)
    if plan.head is not None and plan.head_tied:
        tie_head(model, plan.embedding, plan.head, plan.linears[plan.head], context)


def _convert_norm(
    model: nn.Module, name: str, plan: NormPlan, config: MaQDConfig, context: BatchContext
) -> None:
    norm, kind = model.get_submodule(name), plan.kind
    spec = config.norm_spec(kind.centered, kind.has_bias)
    if not plan.gated:
        spec = replace(spec, statistics="token")
    gamma = kind.gamma(norm)
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    new = LayerBatchNorm(kind.features, spec, kind.eps, context, gamma.device, dtype)
    with torch.no_grad():
        assert new.weight is not None
        new.weight.copy_(gamma)
        if new.bias is not None:
            new.bias.copy_(norm.bias)  # type: ignore[arg-type]
    absorb_into = [model.get_submodule(n) for n in plan.absorbed_by]
    if absorb_into:
        absorb_affine(new, absorb_into)  # type: ignore[arg-type]
    replace_module(model, name, new)


def _levels_text(layer: MaQDLinear | PackedLinear) -> str:
    spec, turned = layer.spec, layer.rotation
    weight = "float weights" if spec.weight_levels is None else f"{spec.weight_levels} levels"
    group = f", groups of {spec.group_size}" if spec.group_size else ""
    rotation = f", {turned} rotated" if turned > 1 else ""
    if spec.activation_levels is None:
        return f"{weight}{group}, float activations{rotation}"
    inputs = f"{spec.activation_levels}-level {spec.activation_scaling} activations"
    if spec.activation_clip_ratio != 1:
        inputs = f"{inputs} clipped at {spec.activation_clip_ratio:g} of absmax"
    return f"{weight}{group}, {inputs}{rotation}"


def _norm_text(norm: LayerBatchNorm, reason: str) -> str:
    statistics = {
        "token": "per token",
        "gated": "layer-batch norm, gate " + ("closed" if float(norm.gate) == 0 else "open"),
        "static": "static, folded into its consumers" if norm.spec.folded else "static",
    }[norm.spec.statistics]
    return f"{statistics} ({reason})" if reason else statistics


def make_report(
    model: nn.Module, config: MaQDConfig, plan: ConversionPlan | None = None
) -> ConversionReport:
    untraced = plan.untraced if plan else ""
    report = ConversionReport(config.state, size=model_size(model), untraced=untraced)
    for name, layer in modules_of(model, MaQDLinear, PackedLinear):
        report.linears[name] = _levels_text(layer)
    for name, table in modules_of(model, MaQDEmbedding, PackedEmbedding):
        report.embeddings[name] = f"{table.levels} levels, a scale a row"
    for name, norm in modules_of(model, LayerBatchNorm):
        norm_plan = plan.norms.get(name) if plan else None
        report.norms[name] = _norm_text(norm, norm_plan.not_gated if norm_plan else "")
        if norm_plan and norm_plan.not_absorbed:
            report.not_absorbed[name] = norm_plan.not_absorbed
    report.kept = dict(plan.kept) if plan else _untouched(model)
    return report


def _untouched(model: nn.Module) -> dict[str, str]:
    """Layers with a matrix that are not ours."""
    return {
        name: f"float ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, QUANTIZED)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
