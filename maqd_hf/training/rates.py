"""Learning rates for a number of weight levels: what a user gets who names none.

levels    rate  perplexity
======  ======  ===============
    16   start   36.69 /  55.62
    16    1e-4   35.25 /  53.50
    16    2e-4   35.22 /  52.89
     4   start  136.87 / 266.47
     4    2e-4   94.81 / 183.14
     4    5e-4   91.81 / 181.02
======  ======  ===============

Those are from before channels were smoothed and inputs rotated. With both, 65,536 tokens, of which
a third are film reviews:

======  ============  ======  =============
levels  input levels    rate  perplexity
======  ============  ======  =============
    16            15   start  47.38 / 69.80
    16            15    1e-4  40.14 / 59.56
    16            15    2e-4  39.62 / 58.94
======  ============  ======  =============

Ternary, started on 32,768 tokens (127.8 / 178.9) and trained on as many, one run each: between
half and all of the rate there is no difference to speak of, three times as much is too fast.

==========================  ======  ==============
what                          rate  perplexity
==========================  ======  ==============
warm-up of 2 steps of 128   2.5e-4  85.6 / 116.9
the same                      5e-4  87.0 / 114.4
warm-up of 24 steps           5e-4  87.0 / 113.2
2 steps, scales at 5e-3     1.5e-3  95.2 / 120.2
==========================  ======  ==============

Shorter samples, twice the steps for as many tokens, gain nothing: ternary, started on 8,192 tokens
and trained on 32,768, 95.9 / 125.7 on samples of 128 and 95.7 / 127.5 on samples of 256.

Gammas kept fixed in the runs of the first table: 35.39 / 53.20 (16 levels, 1e-4), no difference to
speak of. With gammas folded into the weights, whose rows then differ a hundredfold in size, larger
rates did harm (WikiText-2 alone):

======  ======  ==============  ======  ==========
levels  tokens  samples a step    rate  perplexity
======  ======  ==============  ======  ==========
    16  start                                39.30
    16  16,384               4    1e-4       36.86
    16  16,384               1    5e-5       36.42
    16  16,384               1    1e-4       36.23
    16  16,384               1    2e-4       37.79
     4  start                               181.85
     4  32,768               4    5e-4      126.00
     4  32,768               4    2e-4      116.03
     4  32,768               1    5e-4      131.55
     4  32,768               1    2e-4      110.14
======  ======  ==============  ======  ==========

So a short budget is better spent on many small steps. With scales at the latents' own rate instead
of ten times it, 116.03 becomes 120.20. With channels smoothed and inputs rotated, 4 levels, 32,768
tokens: 65.6 / 90.7 at ten times, 66.2 / 92.1 at the latents' own, 66.9 / 92.9 with scales fixed.
=======
Not in the paper, which trains from scratch. SmolLM2-135M, 16,384 tokens of distillation, perplexity
of WikiText-2 / IMDB: 4 levels 91.8 / 181.0 at 5e-4 and 94.8 / 183.1 at 2e-4
(docs/notebook.md, "Rates by the number of levels").
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
    """The levels (weights, inputs) of most quantized weights; (256, None) where there are none.

    >>> usual_levels(nn.Linear(2, 2))
    (256, None)
    """
    counts: Counter[tuple[int, int | None]] = Counter({(256, None): 0})
    for module in model.modules():
        if isinstance(module, MaQDLinear) and module.weight_levels is not None:
            counts[module.weight_levels, module.spec.activation_levels] += module.weight.numel()
    return counts.most_common(1)[0][0]
