"""The step of least (weighted) squared error for given rows: the start value of pretrained ones.

Not in the paper: outliers of pretrained rows rule out the Gaussian constant (perplexity 104 with
it, 32 with the full range; notebook: "The Gaussian step for pretrained rows").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import dequantize, grid_center, quantize

_CHUNK = 1 << 22  # elements searched at a time, so that a 50k-row head needs no extra gigabytes
_RATIO, _COARSE = 0.88, 18  # ratio of two candidates, and their number: 0.88 ** 17 is a tenth
_EMPTY_STEP = 1e-6  # all-zero rows get it: even grids have no zero and make step / 2 of it


def _error(rows: Tensor, levels: int, step: Tensor, importance: Tensor | None) -> Tensor:
    """The (weighted) squared error of each row (..., width) on its ``step`` (...,)."""
    step = step.unsqueeze(-1)
    gap = dequantize(quantize(rows, levels, step), levels, step).sub_(rows).square_()
    return gap.sum(-1) if importance is None else gap.mul_(importance).sum(-1)


def full_range_step(rows: Tensor, levels: int) -> Tensor:
    """The step (...,) of each of ``rows`` (..., width) that clips nothing; 1e-6 for zeros alone."""
    full = rows.abs().amax(-1) / grid_center(levels)
    return torch.where(full > 0, full, _EMPTY_STEP)


def _search(rows: Tensor, levels: int, importance: Tensor | None) -> Tensor:
    """The best step of each row: a coarse scan, then two rounds that halve the distance around it.

    The scan goes from slightly beyond the full range down to a tenth of it, or a third where there
    are many levels, which clip little even at the best step.
    """
    full = full_range_step(rows, levels)
    best, best_error = full, _error(rows, levels, full, importance)
    for power in range(-1, _COARSE if levels < 64 else _COARSE // 2):
        candidate = full * _RATIO**power
        best, best_error = _keep_better(rows, levels, candidate, best, best_error, importance)
    for exponent in (0.5, 0.25):
        center = best
        for ratio in (_RATIO**exponent, _RATIO**-exponent):
            candidate = center * ratio
            best, best_error = _keep_better(rows, levels, candidate, best, best_error, importance)
    return best


def _keep_better(
    rows: Tensor,
    levels: int,
    candidate: Tensor,
    best: Tensor,
    best_error: Tensor,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    error = _error(rows, levels, candidate, importance)
    better = error < best_error
    return torch.where(better, candidate, best), torch.where(better, error, best_error)


@torch.no_grad()
def search_step(rows: Tensor, levels: int, importance: Tensor | None = None) -> Tensor:
    """The step (rows, groups) of least squared error for ``rows`` (rows, groups, width).

    ``importance`` (groups, width), e.g. the mean square of the layer's input, weights the error.
    Groups of zeros get step 1e-6.

    >>> rows = torch.tensor([[[-1.5, -0.5, 0.5, 1.5]]])
    >>> search_step(rows, levels=4)
    tensor([[1.]])
    """
    per_row = max(1, rows[0].numel()) if len(rows) else 1
    chunks = rows.split(max(1, _CHUNK // per_row))
    return torch.cat([_search(chunk, levels, importance) for chunk in chunks])
