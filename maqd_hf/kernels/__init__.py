"""Packed matrix products and the other compiled loops, each beside its form in plain torch.

Imports ``functional`` and ``packing``, and no transformers.

- ``reference``: packed products in plain torch, always there, and the oracle for every kernel;
- ``serving``: the one place that decides whether compiled code serves; everybody asks there;
- ``loader``: the compiled library (C sources in ``csrc``) and its instruction sets, ``abi`` what
  its structures and entries are;
- ``native``: its packed products for the CPU; ``decoder``, ``key_values``, ``norm``, ``hadamard``:
  a whole decode step and its parts; ``columns``, ``fake_quantize``, ``divergence``: loops of
  calibration and training; ``ops``: operators for ``torch.compile``;
- ``gpu``, ``gpu_kernels``: the same arithmetic in Triton for NVIDIA GPUs.

``weight_type`` says which class serves a layer, and ``info`` says it to people.
``MAQD_KERNEL=reference`` (or an instruction set of ``info()``) overrides the choice.
"""

from __future__ import annotations

from typing import Any

import torch

from . import gpu, loader
from .gpu import GpuWeight
from .loader import release
from .native import NativeWeight, Table
from .ops import packed_linear as packed_linear_op
from .ops import register
from .reference import packed_embedding, packed_linear, unpack_weight
from .serving import gpu_serves, native_serves, serves

__all__ = [
    "GpuWeight",
    "NativeWeight",
    "Table",
    "info",
    "native_serves",
    "packed_embedding",
    "packed_linear",
    "packed_linear_op",
    "register",
    "release",
    "serves",
    "unpack_weight",
    "weight_type",
]


def weight_type(device: torch.device) -> type[Any]:
    """The repacked weight for layers on ``device``: ``NativeWeight``, or its twin ``GpuWeight``."""
    return NativeWeight if device.type == "cpu" else GpuWeight


def info() -> dict[str, object]:
    """Which implementation serves packed layers on this machine, and why.

    >>> sorted(info())
    ['available', 'embedding', 'gpu', 'linear', 'why']
    """
    isa, missing = loader.chosen_isa(), gpu.missing(torch.device("cuda"))
    switched_off = f"{loader.KERNEL_VARIABLE} asks for the reference"
    if isa is not None:
        why = "best instruction set of this machine that the compiled library has"
    elif loader.library() is None:
        why = (
            "there is no compiled library that belongs to this package (installed without a C "
            "compiler, or from other sources): weights are unpacked at every call"
        )
    else:
        why = switched_off
    if missing is None and not gpu_serves(torch.device("cuda")):
        missing = switched_off
    return {
        "linear": f"native, {isa}" if isa else "torch reference",
        "embedding": "native" if isa else "torch reference",
        "available": ["torch reference", *loader.isas()],
        "why": why,
        "gpu": "Triton" if missing is None else f"torch reference: {missing}",
    }
