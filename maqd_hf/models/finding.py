"""Which modules of a model are of a kind, by their full names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import (
    LayerBatchNorm,
)


def find_module(model: nn.Module, module: nn.Module | None) -> str | None:
    """Full name of ``module`` in ``model``."""
    return next((n for n, m in model.named_modules() if m is module), None) if module else None


def modules_of(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[str, Any]]:
    """Full names and modules of these classes."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]


def gated_norms(model: nn.Module) -> dict[str, LayerBatchNorm]:
    """The Layer-Batch Normalizations in training, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LayerBatchNorm) and module.spec.statistics == "gated"
    }
