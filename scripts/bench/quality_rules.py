"""Other people's rules of quantizing as small reference layers, for the same training as ours.

=======  =============================================================================
LSQ      arXiv:1902.08153: learned step, clip to -2^(b-1) .. 2^(b-1)-1 (odd M: symmetric);
         ParetoQ's rule for 3 bits and more (arXiv:2502.02631)
SEQ      ParetoQ's stretched elastic quantizer for 2 bits and ternary: levels
         (i + 1/2) / (M/2) of the range, odd M: i / (M/2)
BitNet   b1.58 (arXiv:2402.17764): ternary, one scale a tensor, the mean magnitude, not learned
=======  =============================================================================

They are written from the papers' equations, with their start values: LSQ 2 mean|w| / sqrt(Q), SEQ
the largest magnitude of the row. Inputs are rounded to 8 bits with one step per token, for all
alike. `RoundLatents` is a rule of training: it keeps latents in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from maqd_hf.functional import grid_center, scaled_round_clip, token_step
from maqd_hf.nn import MaQDLinear

ACTIVATION_LEVELS = 255


def _round(x: Tensor) -> Tensor:
    """Nearest whole number; the gradient passes straight through."""
    return x.round().detach() + (x - x.detach())


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``factor``."""
    return (x * factor) + (x - x * factor).detach()


def lsq_range(levels: int) -> tuple[int, int]:
    """The lowest and the highest code: -8..7 for 16 levels, -1..1 for 3."""
    return -(levels // 2), (levels - 1) // 2


def lsq(weight: Tensor, step: Tensor, levels: int) -> Tensor:
    """``step * round(clip(w / step))``; (..., width) with ``step`` (..., 1).

    The step's gradient is scaled by 1 / sqrt(weights it serves * highest code).
    """
    low, high = lsq_range(levels)
    step = _scale_gradient(step, 1 / math.sqrt(weight.shape[-1] * max(high, 1)))
    return _round((weight / step).clamp(low, high)) * step


def lsq_start(weight: Tensor, levels: int) -> Tensor:
    return 2 * weight.abs().mean(-1, keepdim=True) / math.sqrt(max(lsq_range(levels)[1], 1))


def seq(weight: Tensor, alpha: Tensor, levels: int) -> Tensor:
    """``alpha * (round(clip(w / alpha) * M/2 - 1/2) + 1/2) / (M/2)``; odd M without the halves."""
    shift = 0.0 if levels % 2 else 0.5
    alpha = _scale_gradient(alpha, 1 / math.sqrt(weight.shape[-1] * max(lsq_range(levels)[1], 1)))
    inside = (weight / alpha).clamp(-0.99, 0.99)  # keeps the outermost code from rounding past M
    return (_round(inside * (levels / 2) - shift) + shift) / (levels / 2) * alpha


def seq_start(weight: Tensor, levels: int) -> Tensor:
    return weight.abs().amax(-1, keepdim=True)


def absmean(weight: Tensor, step: Tensor, levels: int) -> Tensor:
    """``mean|W| * round(clip(W / mean|W|, -c, c))`` with one mean of the whole tensor."""
    mean = weight.detach().abs().mean().clamp(min=1e-5)
    center = grid_center(levels)
    rounded = (weight / mean).round().clamp(-center, center) * mean
    return rounded.detach() + (weight - weight.detach())


def absmean_start(weight: Tensor, levels: int) -> Tensor:
    return weight.new_ones(1)  # nothing is learned


Rule = tuple[Callable[[Tensor, Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]
RULES: dict[str, Rule] = {
    "LSQ": (lsq, lsq_start),
    "SEQ": (seq, seq_start),
    "BitNet": (absmean, absmean_start),
}


class RuleLinear(nn.Linear):
    """A Linear whose weight passes through one of ``RULES`` and whose input is rounded to 8 bits.

    ``group_size`` inputs of a row share a step; None: the row.
    """

    def __init__(self, linear: nn.Linear, rule: str, levels: int, group_size: int | None) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rule, self.levels, self.group_size = rule, levels, group_size
        self.step = nn.Parameter(RULES[rule][1](self._grouped().detach(), levels))
        self.step.requires_grad_(rule != "BitNet")

    def _grouped(self) -> Tensor:
        return self.weight.unflatten(1, (-1, self.group_size or self.in_features))

    def quantized_weight(self) -> Tensor:
        """The (out, in) weight in force; differentiable."""
        return RULES[self.rule][0](self._grouped(), self.step, self.levels).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        x = input.float()
        x = scaled_round_clip(x, ACTIVATION_LEVELS, token_step(x, ACTIVATION_LEVELS))
        return nn.functional.linear(
            x.to(input.dtype), self.quantized_weight().to(input.dtype), self.bias
        )


@torch.no_grad()
def apply_rule(model: PreTrainedModel, rule: str, levels: int, group_size: int | None) -> None:
    """Replace every Linear of the base model, in place; embedding and head stay."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; choose one of {sorted(RULES)}")
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, RuleLinear(child, rule, levels, group_size))


class RoundLatents(TrainerCallback):
    """Rounds latents after every optimizer step as if they were kept in bfloat16."""

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        for layer in known["model"].modules():
            if isinstance(layer, MaQDLinear):
                layer.weight.copy_(layer.weight.bfloat16())
