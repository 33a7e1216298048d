"""The modules of a model that are of a kind, by their full names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import LayerBatchNorm


def find_module(model: nn.Module, module: nn.Module | None) -> str | None:
    """The full name of ``module`` in ``model``; None where it is not in there."""
    return next((n for n, m in model.named_modules() if m is module), None) if module else None


def modules_of(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[str, Any]]:
    """The modules of these classes with their full names, in the model's order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]


def gated_norms(model: nn.Module) -> dict[str, LayerBatchNorm]:
    """The norms that have a gate (``statistics="gated"``), by name, in the model's order."""
    norms = modules_of(model, LayerBatchNorm)
    return {name: norm for name, norm in norms if norm.spec.statistics == "gated"}
