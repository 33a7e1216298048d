"""Whether the compiled code serves: the one place that decides, for the CPU and for a GPU.

Everybody who has a compiled and a torch form of something asks here, and adds at most what its own
shapes want.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import Tensor, nn

from . import gpu, loader, native


def serves(
    *tensors: Tensor, dtypes: Collection[torch.dtype] | None = None, contiguous: bool = False
) -> bool:
    """Whether the library may run over these tensors: it is there and chosen, and they are plain
    CPU tensors with elements that nobody traces.

    ``dtypes``: those they may have (None: any). ``contiguous``: whether all must be.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or loader.chosen_isa() is None:
        return False
    return all(
        (type(t) is Tensor or issubclass(type(t), nn.Parameter))
        and t.is_cpu
        and t.numel() > 0
        and (dtypes is None or t.dtype in dtypes)
        and (not contiguous or t.is_contiguous())
        for t in tensors
    )


def native_serves(x: Tensor, weight: Tensor, levels: int, groups: int) -> bool:
    """Whether a compiled kernel can multiply ``x`` (..., columns) with this packed weight. Graphs
    of ``torch.compile`` may hold such a product (``ops``)."""
    if x.dtype == torch.float64 or not x.numel() or type(x) is not Tensor or _exporting():
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if x.is_cpu and weight.is_cpu:  # comparing devices takes longer
        return _has_library() and native.fits(x.shape[-1], groups, levels)
    return x.device == weight.device and gpu_serves(x.device) and gpu.fits(x.shape[-1], groups)


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return loader.chosen_isa() is not None


@torch.compiler.assume_constant_result
def gpu_serves(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``."""
    return os.environ.get(loader.KERNEL_VARIABLE) != "reference" and gpu.missing(device) is None


def _exporting() -> bool:
    """An exported or traced program must run where this package is not: it gets plain torch."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing()
