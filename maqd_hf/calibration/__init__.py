"""Start values from a little text, before any training.

Imports ``nn``, ``models`` and below.

- ``pipeline``: ``calibrate``, all of the start values in order;
- ``smoothing``: moves the spread of channels between inputs and weights;
- ``gptq``: rounds weights so that later columns make up for the errors of earlier ones;
  ``compensation`` is that for one matrix;
- ``activations``: searches the static steps of layer inputs;
- ``static_norms``: finds the norms that can be static, and what that costs;
- ``blocks``: walks a model block by block;
- ``blockwise``: trains block after block, a room of its own.
"""

from .activations import best_step, calibrate_activations
from .gptq import GPTQReport, gptq
from .pipeline import CalibrationReport, calibrate
from .smoothing import SmoothingReport, smooth
from .static_norms import NormSelection, select_static_norms

__all__ = [
    "CalibrationReport",
    "GPTQReport",
    "NormSelection",
    "SmoothingReport",
    "best_step",
    "calibrate",
    "calibrate_activations",
    "gptq",
    "select_static_norms",
    "smooth",
]
