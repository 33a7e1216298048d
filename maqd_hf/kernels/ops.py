"""The packed product as an operator of torch, so that ``torch.compile`` keeps it as one call.

A graph cannot hold a layer's repacked weight. It holds the number the layer registered under; the
operator finds the layer by it when the graph runs, and with it whatever the layer repacked.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Product(Protocol):
    """What registers itself: a layer whose ``product`` takes inputs and their steps."""

    def product(self, x: Tensor, step: Tensor | None) -> Tensor: ...


_numbers = count(1)
_registered: WeakValueDictionary[int, Product] = WeakValueDictionary()


def register(layer: Product) -> int:
    """The number under which graphs find ``layer``; it is forgotten with the layer."""
    number = next(_numbers)
    _registered[number] = layer
    return number


_library = torch.library.Library("maqd", "DEF")  # kept: operators vanish with it
_library.define("packed_linear(Tensor x, Tensor? step, int layer, int out_features) -> Tensor")


@torch.library.impl(_library, "packed_linear", "CPU")
@torch.library.impl(_library, "packed_linear", "CUDA")
def _packed_linear(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    found = _registered.get(layer)
    if found is None:
        raise RuntimeError(
            f"packed layer {layer} is gone: this graph was compiled for a model that was deleted"
        )
    return found.product(x, step)


@torch.library.register_fake("maqd::packed_linear", lib=_library)
def _packed_linear_shape(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def packed_linear(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    """``x`` (..., in) times the weight of the layer registered as ``layer`` -> (..., out).

    ``step``: as in ``NativeWeight.__call__``.
    """
    result: Tensor = torch.ops.maqd.packed_linear(x, step, layer, out_features)
    return result
