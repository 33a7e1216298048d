"""Packed matrix products: the one place that decides which implementation runs.

Imports ``functional`` and ``packing``, and no transformers.

- ``reference``: plain torch, always there, and the oracle for every other path;
- ``native``: the products of the compiled library (C sources in ``csrc``) for the CPU; ``decoder``,
  ``key_values``, ``norm``, ``hadamard``: a whole decode step and its parts; ``columns``,
  ``fake_quantize``, ``divergence``: loops of calibration and training; ``loader``: the library
  itself; ``ops``: operators for ``torch.compile``;
- ``gpu``, ``gpu_kernels``: the same arithmetic in Triton for NVIDIA GPUs.

``native_serves`` says whether one of them serves a layer, ``weight_type`` which, ``info`` says it
to people. ``MAQD_KERNEL=reference`` (or a path of ``info()``) overrides the choice.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import gpu, loader, native
from .gpu import GpuWeight
from .loader import release
from .native import NativeWeight, Table
from .ops import packed_linear as packed_linear_op
from .ops import register
from .reference import packed_embedding, packed_linear, unpack_weight

__all__ = [
    "GpuWeight",
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
    "weight_type",
]


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return loader.chosen_path() is not None


@torch.compiler.assume_constant_result
def _gpu_serves(device: torch.device) -> bool:
    return os.environ.get(loader.PATH_VARIABLE) != "reference" and gpu.missing(device) is None


def _exporting() -> bool:
    """An exported or traced program must run where this package is not: it gets plain torch."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing()


def native_serves(x: Tensor, weight: Tensor, levels: int, groups: int) -> bool:
    """Whether a compiled kernel can multiply ``x`` (..., columns) with this packed weight."""
    if x.dtype == torch.float64 or not x.numel() or type(x) is not Tensor or _exporting():
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if x.is_cpu and weight.is_cpu:  # comparing devices takes longer
        return _has_library() and native.fits(x.shape[-1], groups, levels)
    return x.device == weight.device and _gpu_serves(x.device) and gpu.fits(x.shape[-1], groups)


def weight_type(device: torch.device) -> type[Any]:
    """The repacked weight for layers on ``device``: ``NativeWeight``, or its twin ``GpuWeight``."""
    return NativeWeight if device.type == "cpu" else GpuWeight


def native_looks_up(ids: Tensor, weight: Tensor) -> bool:
    """Whether the compiled library can look up rows of this packed table."""
    return loader.reads(ids, weight)


def info() -> dict[str, object]:
    """Which implementation serves packed layers on this machine, and why.

    >>> sorted(info())
    ['available', 'embedding', 'gpu', 'linear', 'why']
    """
    path = loader.chosen_path()
    if path is not None:
        why = "best instruction set of this machine that the compiled library has"
    elif loader.library() is None:
        why = "the package was installed without a C compiler: weights are unpacked at every call"
    else:
        why = f"{loader.PATH_VARIABLE} asks for the reference"
    no_gpu = gpu.missing(torch.device("cuda"))
    if no_gpu is None and not _gpu_serves(torch.device("cuda")):
        no_gpu = f"{loader.PATH_VARIABLE} asks for the reference"
    return {
        "linear": f"native, {path}" if path else "torch reference",
        "embedding": "native" if path else "torch reference",
        "available": ["torch reference", *loader.paths()],
        "why": why,
        "gpu": "Triton" if no_gpu is None else f"torch reference: {no_gpu}",
    }
