"""Start values from a little text: weights by GPTQ, static activation steps by search."""

from __future__ import annotations

from torch import nn

from .activations import best_step, calibrate_activations
from .blocks import Batches, as_batches
from .gptq import GPTQReport, gptq

__all__ = ["GPTQReport", "best_step", "calibrate", "calibrate_activations", "gptq"]


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    gptq_weights: bool = True,
    batch_size: int = 4,
    progress: bool = True,
) -> GPTQReport | None:
    """Give a freshly converted model its start values: weights, then activation steps.

    The steps come second because a layer's inputs depend on the quantised weights before it.
    ``gptq_weights=False`` leaves the weights at their searched grid. ``data``: token ids (samples,
    tokens), a few thousand tokens like those the model is for, or batches. Returns ``gptq``'s
    report.

        quantize_model(model, MaQDConfig(weight_levels=16, group_size=64))
        calibrate(model, token_ids)
    """
    batches = as_batches(data, model, batch_size)
    report = gptq(model, batches, progress=progress) if gptq_weights else None
    calibrate_activations(model, batches, progress=progress)
    return report
