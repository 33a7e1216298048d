"""Moving a norm's affine and its static scalar to where they cost nothing, exactly or not at all.

- ``fold_affine`` works at conversion and on request (``norm_affine="fold"``): ``W (gamma * z +
  beta) + b = (W diag(gamma)) z + (W beta + b)``. gamma is then trained as part of the weight.
- ``fold_scale`` works at packing: a static norm multiplies by one constant c. Where gamma is still
  the norm's own it becomes gamma * c; else c moves into the weight scales of the layers that read
  the norm, and their activation steps are divided by it. It does not move into scales of groups: in
  their 16 bits the product would be rounded, so there the norm goes on multiplying by c.

Folding is all or nothing: ``plan`` lists the consumers only when every reader of the norm's output
accepts. What cannot be folded stays where it is and the report names it.

gamma stays in the norm unless one asks (our reading of arXiv:2403.14999 folds it): W diag(gamma)
puts the spread of gamma, which is wide in pretrained models, inside the groups that share one step:
perplexity 223.0 with gamma folded and 72.2 with gamma kept (notebook: "Gamma folded into the layers
behind it"). ``calibration.smoothing`` can also move the spread in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..nn import LayerBatchNorm, MaQDLinear, PackedLinear


@torch.no_grad()
def fold_affine(norm: LayerBatchNorm, consumers: Sequence[MaQDLinear]) -> None:
    """Move ``norm``'s weight and bias into ``consumers``, before their grids are chosen."""
    for layer in consumers:
        if norm.bias is not None:
            shift = layer.input_weight().double() @ norm.bias.double()
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
            layer.bias.add_(shift.to(layer.bias))
        if norm.weight is not None:
            layer.set_input_weight(layer.input_weight().double() * norm.weight.double())
    norm.weight = norm.bias = None
    norm.spec = replace(norm.spec, weight=False, bias=False)


def takes_scale(layer: nn.Module) -> bool:
    """Whether a norm's constant can move into ``layer`` without being rounded to fewer bits."""
    return isinstance(layer, PackedLinear) and layer.weight_scale.shape[1] == 1


@torch.no_grad()
def fold_scale(norm: LayerBatchNorm, consumers: Sequence[PackedLinear]) -> None:
    """Move a static ``norm``'s constant into its gamma or, without one, into packed ``consumers``.

    Afterwards the norm's statistic is 1 (a LayerNorm still centers its input, and a first token
    with a statistic of its own is still scaled).
    """
    if norm.spec.statistics != "static" or norm.spec.folded:
        raise ValueError(
            f"only a static norm has a constant to fold, and only once; this one is {norm.spec}"
        )
    factor = torch.exp(-0.5 * norm.running_log_ms)
    if norm.weight is not None:
        norm.weight.mul_(factor)
    elif norm.bias is not None or not all(takes_scale(layer) for layer in consumers):
        raise ValueError(
            "a norm's constant folds into its own gamma or, if it has no affine, into packed "
            "layers with one scale a row; this one has neither"
        )
    else:
        for layer in consumers:
            layer.weight_scale.mul_(factor)
            if layer.weight_offset is not None:
                layer.weight_offset.mul_(factor)
            if layer.activation_step is not None:
                layer.activation_step.div_(factor)
    norm.spec = replace(norm.spec, folded=True)
