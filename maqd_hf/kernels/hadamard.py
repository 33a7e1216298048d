"""The rotation of inputs, ``functional.hadamard``, in one compiled pass over a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import loader
from .serving import serves

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hadamard(x: Tensor, size: int) -> Tensor:
    """``functional.hadamard``, bit for bit; ``x`` (..., D), D a multiple of ``size``.

    >>> x = torch.randn(3, 128)
    >>> torch.equal(hadamard(x, 64), functional.hadamard(x, 64))
    True
    """
    power = size > 0 and size & (size - 1) == 0
    if not (power and serves(x, dtypes=_DTYPES) and x.shape[-1] % size == 0):
        return functional.hadamard(x, size)
    result: Tensor = _Hadamard.apply(x.float(), size)
    return result.to(x.dtype)


class _Hadamard(torch.autograd.Function):
    """Its own inverse and symmetric, so the gradient goes through it as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        rows = x.contiguous()
        out, width = torch.empty_like(rows), rows.shape[-1]
        sizes = (rows.numel() // width, width, size)
        threads = loader.threads_for(rows.numel())
        loader.call("maqd_hadamard", rows, out, *sizes, loader.isa_number(), threads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard(grad, ctx.size), None
