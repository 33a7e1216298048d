"""The rotation of inputs, ``functional.hadamard``, in one compiled pass over a row.

SmolLM2-135M at 2 bits, 8-bit head, one thread of a shared machine, nine runs in turn with and
without: 64 new tokens take 1.013 of the time (median of the ratios), 512 tokens of prefill 1.026.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from . import loader


def hadamard(x: Tensor, size: int) -> Tensor:
    """``functional.hadamard``, bit for bit; ``x`` (..., D), D a multiple of ``size``.

    >>> x = torch.randn(3, 128)
    >>> torch.equal(hadamard(x, 64), functional.hadamard(x, 64))
    True
    """
    serves = (
        not torch.compiler.is_compiling()
        and loader.chosen_path() is not None
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
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
        out = torch.empty_like(rows)
        numbers = [
            ctypes.c_int64(n) for n in (rows.numel() // rows.shape[-1], rows.shape[-1], size)
        ]
        threads = ctypes.c_int32(torch.get_num_threads())
        path = ctypes.c_int32(loader.path_number())
        loader.run("maqd_hadamard", (rows, out), *numbers, path, threads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard(grad, ctx.size), None
