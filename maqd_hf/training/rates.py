"""Learning rates for a number of weight levels: what a user gets who names none.

Not in the paper, which trains from scratch. SmolLM2-135M, 16,384 tokens of distillation, perplexity
of WikiText-2 / IMDB: 4 levels 91.8 / 181.0 at 5e-4 and 94.8 / 183.1 at 2e-4
(docs/notebook/training.md, "Rates by the number of levels").
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..nn import MaQDLinear

# The rate of the latents for at most so many levels.
_LEARNING_RATES = ((4, 5e-4), (8, 2e-4), (16, 1e-4))
_FINER = 3e-5

# What few levels of the inputs take away has to be learned by the weights: at least this rate.
_COARSE_INPUTS = (16, 2e-4)

# The rate of the scales (logarithms) in units of the latents'. On stories260K, 4 levels, 64 steps,
# the loss after training is 2.308 at 10 and 2.344 at 1 (notebook, "The scales' own rate").
SCALE_RATE = 10.0


def learning_rate(weight_levels: int, activation_levels: int | None = None) -> float:
    """The rate of the latents of a model with so many levels of weights and inputs (None: float).

    >>> learning_rate(4) > learning_rate(16, 15) > learning_rate(16, 255)
    True
    """
    found = next((rate for most, rate in _LEARNING_RATES if weight_levels <= most), _FINER)
    most, least = _COARSE_INPUTS
    return max(found, least) if activation_levels and activation_levels <= most else found


def usual_levels(model: nn.Module) -> tuple[int, int | None]:
    """The levels (weights, inputs) of most quantised weights; (256, None) where there are none.

    >>> usual_levels(nn.Linear(2, 2))
    (256, None)
    """
    counts: Counter[tuple[int, int | None]] = Counter({(256, None): 0})
    for module in model.modules():
        if isinstance(module, MaQDLinear) and module.weight_levels is not None:
            counts[module.weight_levels, module.spec.activation_levels] += module.weight.numel()
    return counts.most_common(1)[0][0]
