"""Fake quantization in training: compiled passes, or functional's in torch.

In torch every operation of it is a pass over a matrix in new memory; compiled (``csrc/
fake_quantize.c``) a row goes through all of them in the cache. ``functional`` holds the equations,
is the oracle, and serves everywhere else: other devices and dtypes, tracing, no compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import loader
from .serving import serves

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_CODES = 2


def weight_codes(weight: Tensor, step: Tensor, levels: int) -> Tensor:
    """Codes (out, in), float in 0..M-1: see ``functional.weight_codes``.

    Packing and training both come here, so that they agree in every code.
    """
    if not _fits(weight, step):
        return functional.weight_codes(weight, step, levels)
    return _forward(weight, step, None, None, levels, torch.empty_like(weight), _CODES)


def fake_quantize_weight(
    weight: Tensor,
    step: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    levels: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight in force, in ``dtype`` (None: its own): see ``functional.fake_quantize_weight``.

    A product in bfloat16 rounds its weight to it anyway; asked for here, that costs no pass.

    >>> w, step, scale = torch.randn(4, 8), torch.ones(4, 1), torch.full((4, 1), 0.5)
    >>> fake_quantize_weight(w, step, scale, None, 3).unique().abs()
    tensor([0.5000, 0.0000, 0.5000])
    """
    dtype = dtype or weight.dtype
    tables = (step, scale) if offset is None else (step, scale, offset)
    if not _fits(weight, *tables):
        return functional.fake_quantize_weight(weight, step, scale, offset, levels).to(dtype)
    inner = dtype if dtype in _KINDS else torch.float32
    result: Tensor = _FakeQuantizeWeight.apply(weight, step, scale, offset, levels, inner)
    return result.to(dtype)


def round_tokens(
    x: Tensor, levels: int, clip_ratio: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Every token of ``x`` (..., D) on its own grid, in ``dtype`` (None: ``x``'s): see
    ``functional.round_tokens``.

    >>> round_tokens(torch.tensor([[0.1, -1.5, 0.6]]), levels=4)
    tensor([[ 0.5000, -1.5000,  0.5000]])
    """
    dtype = dtype or x.dtype
    if not (serves(x, dtypes=_KINDS) and dtype in _KINDS and x.dim() > 0):
        return functional.round_tokens(x, levels, clip_ratio).to(dtype)
    result: Tensor = _RoundTokens.apply(x, functional.check_levels(levels), clip_ratio, dtype)
    return result


def _fits(weight: Tensor, *tables: Tensor) -> bool:
    """Whether the library can read these. Shapes that do not fit are left to torch's errors."""
    plain = serves(weight, *tables, dtypes=(torch.float32,), contiguous=True)
    if not plain or weight.dim() != 2:
        return False
    rows, columns = weight.shape
    groups = tables[0].shape[-1]
    return (
        columns % groups == 0
        and all(t.shape in ((rows, groups), (rows, 1)) for t in tables)
        and all(t.shape == (rows, groups) for t in tables[:2])
    )


def _forward(
    weight: Tensor,
    step: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    levels: int,
    out: Tensor,
    kind: int,
) -> Tensor:
    _run("maqd_fake_quantize", weight, step, scale, offset, out, levels, kind)
    return out


class _FakeQuantizeWeight(torch.autograd.Function):
    """Keeps the latent, which is alive anyway, and nothing of its size."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        levels: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, scale)
        ctx.levels, ctx.offset = levels, offset is not None
        out = torch.empty_like(weight, dtype=dtype)
        return _forward(weight, step, scale, offset, levels, out, _KINDS[dtype])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, scale = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight, grad_scale = torch.empty_like(weight), torch.empty_like(scale)
        grad_offset = weight.new_empty(len(weight), 1) if ctx.offset else None
        narrow = int(grad.dtype == torch.bfloat16)
        tensors = (scale, grad, grad_weight, grad_scale, grad_offset)
        _run("maqd_fake_quantize_backward", weight, step, *tensors, ctx.levels, narrow)
        return grad_weight, None, grad_scale, grad_offset, None, None


class _RoundTokens(torch.autograd.Function):
    """The gradient passes whole, as if nothing was rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, clip_ratio: float, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        rows = x.contiguous()
        out = torch.empty_like(rows, dtype=dtype)
        width = rows.shape[-1]
        sizes, kinds = (rows.numel() // width, width), (_KINDS[rows.dtype], _KINDS[dtype])
        threads = torch.get_num_threads()
        loader.call("maqd_round_tokens", rows, out, *sizes, clip_ratio, levels, *kinds, threads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.to(ctx.dtype), None, None, None


def _run(name: str, weight: Tensor, step: Tensor, *rest: Tensor | int | None) -> None:
    """Call an entry on ``weight``, ``step``, other tensors and, at last, two options."""
    *others, levels, option = rest
    sizes = (*weight.shape, step.shape[1])
    threads = torch.get_num_threads()
    loader.call(name, weight, step, *others, *sizes, levels, option, threads)
