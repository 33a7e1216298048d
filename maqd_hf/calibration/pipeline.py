"""All start values in order: channels smoothed, weights by GPTQ, then static activation steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import Start
from .activations import calibrate_activations
from .blocks import Batches, as_batches
from .gptq import GPTQReport, gptq
from .smoothing import SmoothingReport, smooth


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` did, stage by stage; None where a stage was left out.

    >>> print(CalibrationReport(SmoothingReport(), None))
    smoothing: no channels that may move
    """

    smoothing: SmoothingReport | None
    gptq: GPTQReport | None

    def summary(self) -> dict[str, dict[str, Any] | None]:
        """Plain JSON values by stage."""
        return {
            "smoothing": None if self.smoothing is None else self.smoothing.summary(),
            "gptq": None if self.gptq is None else self.gptq.summary(),
        }

    def __str__(self) -> str:
        return "\n".join(str(r) for r in (self.smoothing, self.gptq) if r is not None)


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    gptq_weights: bool = True,
    smoothing: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Give a freshly converted model its start values: channels, weights, then activation steps.

    The activation steps come last because a layer's inputs depend on the quantized weights before
    it.

        quantize_model(model, MaQDConfig(weight_levels=16, group_size=64))
        calibrate(model, token_ids)

    Args:
        model: converted by ``quantize_model``; changed in place.
        data: token ids (samples, tokens) of text like that the model is for, or batches; the fewer
            the levels, the more tokens are wanted (``gptq`` says what they are worth).
        gptq_weights: compensate rounding errors; False leaves the weights at their searched grid.
        smoothing: move the channels' spread first; False leaves it where it is.
        batch_size: samples in a forward when ``data`` is ids; None: as ``gptq``.
        progress: show bars.
    """
    batches = as_batches(data, model, batch_size)
    start: Start = "range" if gptq_weights else "search"
    smoothed = smooth(model, batches, start=start, progress=progress) if smoothing else None
    compensated = gptq(model, batches, progress=progress) if gptq_weights else None
    calibrate_activations(model, batches, progress=progress)
    return CalibrationReport(smoothed, compensated)
