"""Packed products in plain torch: unpack a block of rows, multiply, forget it.

Never more than ``_BLOCK`` weights are float at a time, so a packed model stays packed in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import grid_center, weight_values
from ..packing import unpack_codes

_BLOCK = 1 << 22


def unpack_weight(
    words: Tensor, levels: int, columns: int, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """Float weight (rows, columns) of packed ``words`` (rows, words): the inverse of packing.

    The very expression the simulated layer uses, so both have equal values bit for bit.
    """
    dtype = torch.promote_types(torch.float32, scale.dtype if offset is None else offset.dtype)
    codes = unpack_codes(words, levels, columns).to(dtype)
    return weight_values(codes, scale.to(dtype), offset, levels)


def half_a_code(
    words: Tensor, levels: int, columns: int, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """What half a code more in every input adds to each row (rows,), float32, in units of the
    activation step: kernels that sum integers leave it out of even activation grids."""
    scale = scale.detach().float()
    total = scale.new_empty(len(words))
    block = max(1, _BLOCK // columns)
    for start in range(0, len(words), block):
        part = slice(start, start + block)
        codes = unpack_codes(words[part], levels, columns).float()
        units = (codes - grid_center(levels)).unflatten(1, (scale.shape[1], -1)).sum(-1)
        total[part] = (units * scale[part]).sum(1)
    if offset is not None:
        total += offset.detach().float().flatten() * columns
    return total / 2


def packed_linear(
    x: Tensor,
    words: Tensor,
    levels: int,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` with W from int32 ``words`` (out, words); x (..., in) -> (..., out).

    Args:
        x: input on its own grid already (or float, for weight-only models).
        words: packed codes, ``packing.pack_codes`` row by row.
        levels: M of the weight.
        scale: (out, groups), what one code is worth, of any float dtype.
        offset: (out, 1) or None.
        bias: (out,) or None.
    """
    columns, rows = x.shape[-1], words.shape[0]
    block = max(1, _BLOCK // columns)
    parts = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        weight = unpack_weight(
            words[start:stop],
            levels,
            columns,
            scale[start:stop],
            None if offset is None else offset[start:stop],
        )
        part_bias = None if bias is None else bias[start:stop].to(x.dtype)
        parts.append(torch.nn.functional.linear(x, weight.to(x.dtype), part_bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def packed_embedding(
    ids: Tensor, words: Tensor, levels: int, columns: int, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """Rows ``ids`` (...) of a packed table: (..., columns), float32. Unpacks those rows only."""
    flat = ids.flatten()
    rows = unpack_weight(
        words[flat], levels, columns, scale[flat], None if offset is None else offset[flat]
    )
    return rows.view(*ids.shape, columns)
