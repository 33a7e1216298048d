"""Packed matrix products: the one place that decides which implementation runs.

``reference`` is plain torch, always there, and the oracle for every other path. ``native`` is a
compiled library for the CPU. ``native_weight`` says which of the two serves a layer, ``info`` says
it to people. ``MAQD_KERNEL=reference`` (or a path of ``info()``) overrides the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import loader, native
from .loader import release
from .native import NativeWeight, Table
from .ops import packed_linear as packed_linear_op
from .ops import register
from .reference import packed_embedding, packed_linear, unpack_weight

__all__ = [
    "NativeWeight",
    "Table",
    "info",
    "native_looks_up",
    "native_serves",
    "packed_embedding",
    "packed_linear",
    "packed_linear_op",
    "register",
    "release",
    "unpack_weight",
]


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return loader.chosen_path() is not None


def _exporting() -> bool:
    """An exported program must run where this package is not: it gets plain torch."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def native_serves(x: Tensor, weight: Tensor, levels: int, groups: int) -> bool:
    """Whether the compiled kernel can multiply ``x`` (..., columns) with this packed weight."""
    if _exporting() or not _has_library():
        return False
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype == torch.float64:
        return False
    if not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return type(x) is Tensor and native.fits(x.shape[-1], groups, levels)


def native_looks_up(ids: Tensor, weight: Tensor) -> bool:
    """Whether the compiled library can look up rows of this packed table."""
    on_cpu = ids.device.type == weight.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling() and _has_library()


def info() -> dict[str, object]:
    """Which implementation serves packed layers on this machine, and why.

    >>> sorted(info())
    ['available', 'embedding', 'linear', 'why']
    """
    path = loader.chosen_path()
    if path is not None:
        why = "best instruction set of this machine that the compiled library has"
    elif loader.library() is None:
        why = "the package was installed without a C compiler: weights are unpacked at every call"
    else:
        why = f"{loader.PATH_VARIABLE} asks for the reference"
    return {
        "linear": f"native, {path}" if path else "torch reference",
        "embedding": "native" if path else "torch reference",
        "available": ["torch reference", *loader.paths()],
        "why": why,
    }
