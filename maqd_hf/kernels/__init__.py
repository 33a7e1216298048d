"""Packed matrix products: the one place that decides which implementation runs.

``reference`` is plain torch, always there, and the oracle for every other path. ``native`` is a
compiled library for the CPU. ``native_weight`` says which of the two serves a layer, ``info`` says
it to people. ``MAQD_KERNEL=reference`` (or a path of ``info()``) overrides the choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .native import NativeWeight
from .ops import packed_linear as packed_linear_op
from .ops import register
from .reference import packed_embedding, packed_linear, unpack_weight

__all__ = [
    "NativeWeight",
    "embedding_for",
    "info",
    "native_serves",
    "packed_embedding",
    "packed_linear",
    "packed_linear_op",
    "register",
    "unpack_weight",
]


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return native.chosen_path() is not None


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


def embedding_for(ids: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """The lookup that serves these ``ids``: the compiled one or ``packed_embedding``."""
    on_cpu = ids.device.type == weight.device.type == "cpu"
    if not on_cpu or torch.compiler.is_compiling() or not _has_library():
        return packed_embedding
    return native.embedding


def info() -> dict[str, object]:
    """Which implementation serves packed layers on this machine, and why.

    >>> sorted(info())
    ['available', 'embedding', 'linear', 'why']
    """
    path = native.chosen_path()
    if path is not None:
        why = "best instruction set of this machine that the compiled library has"
    elif native.library() is None:
        why = "the package was installed without a C compiler: weights are unpacked at every call"
    else:
        why = f"{native.PATH_VARIABLE} asks for the reference"
    return {
        "linear": f"native, {path}" if path else "torch reference",
        "embedding": "native" if path else "torch reference",
        "available": ["torch reference", *native.paths()],
        "why": why,
    }
