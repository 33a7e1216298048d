"""Moving a norm's affine and its static scalar to where they cost nothing. Exact, or refused.

- ``absorb_affine``, at conversion and on request (``norm_affine="absorb"``): ``W (gamma * z + beta)
  + b = (W diag(gamma)) z + (W beta + b)``. gamma is then trained as part of the weight.
- ``absorb_scale``, at packing: a static norm multiplies by one constant c. Where gamma is still the
  norm's own it becomes gamma * c; else c moves into the weight scales of the layers that read the
  norm, and their activation steps are divided by it. Not into scales of groups: in their 16 bits
  the product would be rounded, so there the norm goes on multiplying by c.

Absorbing is all or nothing: ``matching`` lists the consumers only when every reader of the norm's
output accepts. What cannot be absorbed stays where it is and the report names it.

Why gamma stays in the norm unless one asks (our reading of arXiv:2403.14999 absorbed it): gamma of
a pretrained model varies widely from feature to feature, and W diag(gamma) puts that spread inside
the groups that share one step. SmolLM2-135M, groups of 64, 8-bit inputs per token, no training,
perplexity of 24 windows of 512 of WikiText-2's test text / IMDB, float 32.3 / 47.9:

====================================  ===============  ===============
16 levels                             gamma absorbed   gamma kept
====================================  ===============  ===============
rounded to nearest                    223.0 / 302.9    72.2 / 98.4
start values by GPTQ                  39.8 / 60.4      36.7 / 55.6
====================================  ===============  ===============

Trained on 16,384 tokens: 37.1 / 56.6 and 35.3 / 53.5. A norm per token pays nothing for it, a
static one one multiplication a feature, no reduction.

Spread between gamma (or the rows of up_proj) and the columns behind it can also be moved without
putting all of it on one side: ``calibration.smoothing`` does, and has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..nn import LayerBatchNorm, MaQDLinear, PackedLinear


@torch.no_grad()
def absorb_affine(norm: LayerBatchNorm, consumers: Sequence[MaQDLinear]) -> None:
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
def absorb_scale(norm: LayerBatchNorm, consumers: Sequence[PackedLinear]) -> None:
    """Move a static ``norm``'s constant into its gamma or, without one, into packed ``consumers``.

    Afterwards the norm's statistic is 1 (a LayerNorm still centres its input, and a first token
    with a statistic of its own is still scaled).
    """
    if norm.spec.statistics != "static" or norm.spec.absorbed:
        raise ValueError(f"only a static norm has a constant to absorb, not {norm.spec}")
    factor = torch.exp(-0.5 * norm.running_log_ms)
    if norm.weight is not None:
        norm.weight.mul_(factor)
    elif norm.bias is not None or not all(takes_scale(layer) for layer in consumers):
        raise ValueError(
            "a norm's constant is absorbed by its own gamma or, if it has no affine, by packed "
            "layers with one scale a row"
        )
    else:
        for layer in consumers:
            layer.weight_scale.mul_(factor)
            if layer.weight_offset is not None:
                layer.weight_offset.mul_(factor)
            if layer.activation_step is not None:
                layer.activation_step.div_(factor)
    norm.spec = replace(norm.spec, absorbed=True)
