"""Moving a norm's affine and its static scalar into the layers that read it. Exact, or refused.

- ``absorb_affine``, at conversion: ``W (gamma * z + beta) + b = (W diag(gamma)) z + (W beta + b)``.
  gamma is then trained as part of the weight and the packed grid stays intact.
- ``absorb_scale``, at packing: a static norm multiplies by one constant c, which moves into the
  weight scales; the activation step of the consumers is divided by c. Not into scales of groups:
  in their 16 bits the product would be rounded, so there the norm goes on multiplying by c.

Both are all or nothing: ``matching`` lists the consumers only when every reader of the norm's
output accepts. What cannot be absorbed stays where it is and the report names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .nn import LayerBatchNorm, MaQDLinear, PackedLinear


@torch.no_grad()
def absorb_affine(norm: LayerBatchNorm, consumers: Sequence[MaQDLinear]) -> None:
    """Move ``norm``'s weight and bias into ``consumers``, before their grids are chosen."""
    for layer in consumers:
        if norm.bias is not None:
            shift = layer.weight.double() @ norm.bias.double()
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
            layer.bias.add_(shift.to(layer.bias))
        if norm.weight is not None:
            layer.weight.copy_(layer.weight.double() * norm.weight.double())
    norm.weight = norm.bias = None
    norm.spec = replace(norm.spec, weight=False, bias=False)


def takes_scale(layer: nn.Module) -> bool:
    """Whether a norm's constant can move into ``layer`` without being rounded to fewer bits."""
    return isinstance(layer, PackedLinear) and layer.weight_scale.shape[1] == 1


@torch.no_grad()
def absorb_scale(norm: LayerBatchNorm, consumers: Sequence[PackedLinear]) -> None:
    """Move a static, affine-free ``norm``'s constant into packed ``consumers`` that take it.

    Afterwards the norm passes its input through (a LayerNorm still centres it, and a first token
    with a statistic of its own is still scaled).
    """
    if norm.spec.statistics != "static" or norm.weight is not None or norm.bias is not None:
        raise ValueError(f"only a static norm without affine can be absorbed, not {norm.spec}")
    if not all(takes_scale(layer) for layer in consumers):
        raise ValueError("a norm's constant is absorbed by packed layers with one scale a row only")
    factor = torch.exp(-0.5 * norm.running_log_ms)
    for layer in consumers:
        layer.weight_scale.mul_(factor)
        if layer.weight_offset is not None:
            layer.weight_offset.mul_(factor)
        if layer.activation_step is not None:
            layer.activation_step.div_(factor)
    norm.spec = replace(norm.spec, absorbed=True)
