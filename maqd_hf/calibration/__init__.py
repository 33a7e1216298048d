"""Start values from a little text: channels smoothed, weights by GPTQ, then by training block after
block; static activation steps by search."""

from __future__ import annotations

from torch import nn

from .activations import best_step, calibrate_activations
from .blocks import Batches, as_batches
from .blockwise import BlockwiseReport, reconstruct_blocks
from .gptq import GPTQReport, gptq
from .smoothing import SmoothingReport, smooth

__all__ = [
    "BlockwiseReport",
    "GPTQReport",
    "SmoothingReport",
    "best_step",
    "calibrate",
    "calibrate_activations",
    "gptq",
    "reconstruct_blocks",
    "smooth",
]


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    gptq_weights: bool = True,
    smoothing: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> GPTQReport | None:
    """Give a freshly converted model its start values: channels, weights, then activation steps.

    The steps come last because a layer's inputs depend on the quantised weights before it.
    ``smoothing=False`` leaves the channels' spread where it is; ``gptq_weights=False`` leaves the
    weights at their searched grid. ``data``: token ids (samples,
    tokens), a few thousand tokens like those the model is for, or batches. ``batch_size``: samples
    in a forward when it is ids; None: 8192 tokens. Returns ``gptq``'s report.

        quantize_model(model, MaQDConfig(weight_levels=16, group_size=64))
        calibrate(model, token_ids)
    """
    batches = as_batches(data, model, batch_size)
    if smoothing:
        smooth(model, batches, start="range" if gptq_weights else "search", progress=progress)
    report = gptq(model, batches, progress=progress) if gptq_weights else None
    calibrate_activations(model, batches, progress=progress)
    return report
