"""How to train for a number of weight levels: what a user gets who names no rates.

Not in the paper, which trains from scratch. ``scripts/benchmark_quality.py`` and
``scripts/blockwise_experiments.py`` measured what stands here, by distillation from the float model
over a few ten thousand tokens, cosine schedule.
"""

from __future__ import annotations

# Of the latents, up to so many levels.
_LEARNING_RATES = ((4, 5e-4), (8, 2e-4), (16, 1e-4))
_FINER = 3e-5

# Of the scales (logarithms), in units of the latents' rate. On stories260K, M=4, 64 steps at 1e-3,
# the loss after training is 2.356 at 0.1, 2.344 at 1, 2.332 at 3, 2.308 at 10.
SCALE_RATE = 10.0


def learning_rate(levels: int) -> float:
    """Of the latents of a model with so many weight levels.

    >>> learning_rate(4) > learning_rate(16)
    True
    """
    return next((rate for most, rate in _LEARNING_RATES if levels <= most), _FINER)
