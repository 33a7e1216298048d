"""The rotation of inputs, ``functional.hadamard``, in one compiled pass over a row.

SmolLM2-135M at 2 bits, 8-bit head, one thread of a shared machine, nine times in turn with and
without, medians of the ratios in five such runs: 64 new tokens take 0.97, 1.01, 1.05, 1.06 and 1.24
of the time, 512 tokens of prefill 1.03 to 1.05. The machine is that noisy.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import loader


def hadamard(x: Tensor, size: int) -> Tensor:
    """``functional.hadamard``, bit for bit; ``x`` (..., D), D a multiple of ``size``.

    >>> x = torch.randn(3, 128)
    >>> torch.equal(hadamard(x, 64), functional.hadamard(x, 64))
    True
    """
    serves = (
        loader.reads(x)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel() > 0
        and size > 0
        and size & (size - 1) == 0
        and x.shape[-1] % size == 0
    )
    if not serves:
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
        threads = loader.threads_for(rows.numel())
        sizes = [ctypes.c_int64(n) for n in (rows.numel() // width, width, size)]
        options = [ctypes.c_int32(n) for n in (loader.path_number(), threads)]
        loader.run("maqd_hadamard", (rows, out), *sizes, *options)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard(grad, ctx.size), None
