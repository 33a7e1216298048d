"""The column loops of error compensation: one block of columns, each rounded given the ones before.

The loops do little for one column, and a small model has half a million columns: in torch one takes
50 microseconds whatever is done for it. So the loops stand here twice, compiled
(``csrc/compensate.c``) and in torch, which is the oracle and the fallback.

All matrices are (columns, rows), float32: a column of the weight is contiguous. ``step`` (columns,
rows) and ``center`` (rows,) are the grid, see ``functional``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import dequantize, quantize
from . import loader
from .serving import serves

ColumnGrid = tuple[Tensor, Tensor, int]
"""``step`` (columns, rows), ``center`` (rows,), levels."""


def compensate_columns(w: Tensor, factor: Tensor, grid: ColumnGrid) -> tuple[Tensor, Tensor]:
    """Round the columns ``w`` in order, moving each one's error to the later ones, in place.

    ``w`` becomes the values that were rounded. ``factor`` (columns, columns) upper: its row i says
    how the error of column i, over the diagonal, spreads. Returns codes and these scaled errors.
    """
    step, center, levels = grid
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    if _call("maqd_compensate", (w,), factor, grid, (codes, errors)):
        return codes, errors
    for i in range(len(w)):
        codes[i] = quantize(w[i] - center, levels, step[i])
        value = dequantize(codes[i], levels, step[i]) + center
        errors[i] = (w[i] - value) / factor[i, i]
        # addmm_, not addr_, which wakes threads for each: 100 times slower on a busy machine
        w[i + 1 :].addmm_(factor[i, i + 1 :, None], errors[i, None], alpha=-1)
    return codes, errors


def descend_columns(
    value: Tensor, gradient: Tensor, h: Tensor, grid: ColumnGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Move each column of ``value`` to its best code given all others, in place.

    ``gradient``: ``h`` (columns, columns) times what ``value`` misses, brought up to date.
    Returns codes, the values that were rounded to them, and how far each column moved.
    """
    step, center, levels = grid
    codes, wanted, moved = (torch.empty_like(value) for _ in range(3))
    if _call("maqd_descend", (value, gradient), h, grid, (codes, wanted, moved)):
        return codes, wanted, moved
    for i in range(len(value)):
        wanted[i] = value[i] + gradient[i] / h[i, i]
        codes[i] = quantize(wanted[i] - center, levels, step[i])
        new = dequantize(codes[i], levels, step[i]) + center
        moved[i] = new - value[i]
        value[i] = new
        gradient.addmm_(h[:, i, None], moved[i, None], alpha=-1)
    return codes, wanted, moved


def _call(
    name: str,
    state: tuple[Tensor, ...],
    matrix: Tensor,
    grid: ColumnGrid,
    out: tuple[Tensor, ...],
) -> bool:
    """Run the compiled loop on these contiguous tensors; False where it does not serve.

    ``ValueError`` for shapes that do not belong together: the library trusts them.
    """
    step, center, levels = grid
    shape = state[0].shape
    fits = len(shape) == 2 and matrix.shape == (shape[0], shape[0]) and center.shape == shape[1:]
    if not fits or any(tensor.shape != shape for tensor in (*state, step)):
        raise ValueError(
            f"columns {[tuple(tensor.shape) for tensor in (*state, step)]} must all be (columns, "
            f"rows), with {tuple(matrix.shape)} (columns, columns), {tuple(center.shape)} (rows,)"
        )
    tensors = (*state, matrix.contiguous(), step, center, *out)
    if not serves(*tensors, dtypes=(torch.float32,), contiguous=True):
        return False
    loader.call(name, *tensors, levels, *step.shape, torch.get_num_threads())
    return True
