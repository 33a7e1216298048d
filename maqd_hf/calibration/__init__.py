"""Start values from a little text, before any training.

Imports ``nn``, ``models`` and below.

- ``pipeline``: ``calibrate``, all of it in order;
- ``smoothing``: channels of inputs evened out; ``gptq``, ``compensation``: weights with the errors
  of the columns before them; ``activations``: static steps by search;
- ``static_norms``: which norms can be static, and at what cost;
- ``blocks``: walking a model block by block;
- ``blockwise``: a room apart, see there.
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
