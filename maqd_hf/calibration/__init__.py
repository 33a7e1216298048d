"""Start values from a little text: weights by GPTQ, then by training block after block; static
activation steps by search."""

from __future__ import annotations

from torch import nn

from .activations import best_step, calibrate_activations
from .blocks import Batches, as_batches
from .blockwise import BlockwiseReport, reconstruct_blocks
from .gptq import GPTQReport, gptq

__all__ = [
    "BlockwiseReport",
    "GPTQReport",
    "best_step",
    "calibrate",
    "calibrate_activations",
    "gptq",
    "reconstruct_blocks",
]


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    gptq_weights: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> GPTQReport | None:
    """Give a freshly converted model its start values: weights, then activation steps.

    The steps come second because a layer's inputs depend on the quantised weights before it.
    ``gptq_weights=False`` leaves the weights at their searched grid. ``data``: token ids (samples,
    tokens), a few thousand tokens like those the model is for, or batches. ``batch_size``: samples
    in a forward when it is ids; None: 8192 tokens. Returns ``gptq``'s report.

        quantize_model(model, MaQDConfig(weight_levels=16, group_size=64))
        calibrate(model, token_ids)
    """
    batches = as_batches(data, model, batch_size)
    report = gptq(model, batches, progress=progress) if gptq_weights else None
    calibrate_activations(model, batches, progress=progress)
    return report
