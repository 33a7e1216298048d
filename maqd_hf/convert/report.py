"""The report of a conversion, for people and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..config import MaQDConfig
from ..models.finding import modules_of
from ..models.names import collapse
from ..nn import LayerBatchNorm, MaQDLinear, PackedLinear
from ..nn.kinds import LINEARS, QUANTIZED, TABLES
from .plan import ConversionPlan
from .size import ModelSize, model_size


@dataclass
class ConversionReport:
    """The result of ``quantize_model`` and ``pack_model``; ``str(report)`` is the readable form.

    Every mapping goes from full module names to a few words. ``size`` is that of the packed model.
    ``untraced`` says why no forward of the model was seen, if so: a layer whose weight the model
    reads by itself, instead of calling the layer, then goes unnoticed.
    """

    state: str
    linears: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    not_folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    size: ModelSize | None = None
    untraced: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole packed model."""
        return self.size.bits_per_weight if self.size else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    def __str__(self) -> str:
        lines = [f"MaQD {self.state} model"]
        if self.untraced:
            lines.append(f"  {self.untraced}: weights it reads past their layers go unnoticed")
        for title, table in (
            ("layers", self.linears),
            ("embeddings", self.embeddings),
            ("norms", self.norms),
            ("affine kept in the norm", self.not_folded),
            ("left as they were", self.kept),
        ):
            lines += _section(title, table)
        if self.size is not None:
            lines.append(self.size.table())
        return "\n".join(lines)


def _section(title: str, table: dict[str, str]) -> list[str]:
    """Lines that say each text of ``table`` once, with the names it holds for."""
    by_text: dict[str, list[str]] = {}
    for name, text in table.items():
        by_text.setdefault(text, []).append(name)
    lines = [f"  {title}: {len(table)}"] if table else []
    for text, names in by_text.items():
        shown = collapse(names)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        lines.append(f"    {', '.join(shown[:8])}{more}: {text}")
    return lines


def _levels_text(layer: MaQDLinear | PackedLinear) -> str:
    spec, mixed = layer.spec, layer.rotation
    weight = "float weights" if spec.weight_levels is None else f"{spec.weight_levels} levels"
    group = f", groups of {spec.group_size}" if spec.group_size else ""
    rotation = f", {mixed} rotated" if mixed > 1 else ""
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
        "static": "static, folded into its consumers"
        if norm.spec.folded and not norm.spec.weight
        else "static",
    }[norm.spec.statistics]
    return f"{statistics} ({reason})" if reason else statistics


def make_report(
    model: nn.Module, config: MaQDConfig, plan: ConversionPlan | None = None
) -> ConversionReport:
    """The report on a converted ``model``; its ``plan`` adds the reasons."""
    untraced = plan.untraced if plan else ""
    report = ConversionReport(config.state, size=model_size(model), untraced=untraced)
    for name, layer in modules_of(model, *LINEARS):
        report.linears[name] = _levels_text(layer)
    for name, table in modules_of(model, *TABLES):
        report.embeddings[name] = f"{table.levels} levels, a scale a row"
    for name, norm in modules_of(model, LayerBatchNorm):
        norm_plan = plan.norms.get(name) if plan else None
        report.norms[name] = _norm_text(norm, norm_plan.not_gated if norm_plan else "")
        if norm_plan and norm_plan.not_folded:
            report.not_folded[name] = norm_plan.not_folded
    report.kept = dict(plan.kept) if plan else _untouched(model)
    return report


def _untouched(model: nn.Module) -> dict[str, str]:
    """The modules with a matrix of their own that were not converted, and their classes."""
    return {
        name: f"float ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, QUANTIZED)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
