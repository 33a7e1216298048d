"""Waste that a training step does not need: casts of a teacher's weights, and page faults.

SmolLM2-135M, one sample of 256 tokens a step in bfloat16: the products take 1.4 s of one thread.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_DEFAULT_THRESHOLD = 128 << 10
_KEPT = 1 << 30


@contextmanager
def economy(teacher: nn.Module | None, accelerator: Accelerator) -> Iterator[None]:
    """Both savings, as far as ``accelerator``'s device and mixed precision have them."""
    dtype = _NARROW.get(accelerator.mixed_precision)
    with narrow_products(teacher, dtype), kept_memory(accelerator.device.type == "cpu"):
        yield


@contextmanager
def narrow_products(model: nn.Module | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Within this context the ``nn.Linear`` weights of ``model`` are constants in ``dtype``.

    For a teacher that runs under autocast, which rounds its weights anew at every forward: the
    products are the same. A tied embedding stays as it is. None for either: nothing happens.
    """
    modules = [] if model is None or dtype is None else list(model.modules())
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    layers = [m for m in linears if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Within this context freed memory stays with the process (Linux with glibc; else nothing).

    Each step allocates the same gradients and activations again. glibc gives large blocks back to
    the system, which clears their pages when they come back: a quarter of a step. It concerns the
    whole process; afterwards glibc's start values are in force, and what is free goes back.
    """
    libc = ctypes.CDLL(None) if wanted and platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _KEPT)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT * 2 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.malloc_trim(0)
