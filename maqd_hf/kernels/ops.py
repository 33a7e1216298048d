"""Packed products and decode steps as operators of torch, so that ``torch.compile`` keeps each as
one call.

A graph cannot hold a layer's repacked weight. It holds the number the layer registered under; the
operator finds the layer by it when the graph runs, and with it whatever the layer repacked. The
same for a model and its native decode step.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .key_values import FixedKeyValues


class Product(Protocol):
    """What registers itself: a layer whose ``product`` takes inputs and their steps."""

    def product(self, x: Tensor, step: Tensor | None) -> Tensor: ...


class Step(Protocol):
    """What registers itself: a model whose ``step`` takes the next tokens and a static cache."""

    def step(
        self,
        ids: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        store: FixedKeyValues,
    ) -> Tensor: ...


_numbers = count(1)
_registered: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(owner: Product | Step) -> int:
    """The number under which graphs find ``owner``; it is forgotten with it."""
    number = next(_numbers)
    _registered[number] = owner
    return number


def _find(number: int) -> Any:
    found = _registered.get(number)
    if found is None:
        raise RuntimeError(
            f"packed layer or model {number} is gone: this graph was compiled for one that was "
            "deleted"
        )
    return found


_library = torch.library.Library("maqd", "DEF")  # kept: operators vanish with it
_library.define("packed_linear(Tensor x, Tensor? step, int layer, int out_features) -> Tensor")


@torch.library.impl(_library, "packed_linear", "CPU")
@torch.library.impl(_library, "packed_linear", "CUDA")
def _packed_linear(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    return _find(layer).product(x, step)


@torch.library.register_fake("maqd::packed_linear", lib=_library)
def _packed_linear_shape(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def packed_linear(x: Tensor, step: Tensor | None, layer: int, out_features: int) -> Tensor:
    """``x`` (..., in) times the weight of the layer registered as ``layer`` -> (..., out).

    ``step``: as in ``NativeWeight.__call__``.
    """
    result: Tensor = torch.ops.maqd.packed_linear(x, step, layer, out_features)
    return result


_library.define(
    "decode(Tensor ids, Tensor? positions, Tensor? mask, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!)? scales, Tensor(d!) length, int limit, int model, int vocabulary) -> Tensor"
)


@torch.library.impl(_library, "decode", "CPU")
def _decode(
    ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scales: Tensor | None,
    length: Tensor,
    limit: int,
    model: int,
    vocabulary: int,
) -> Tensor:
    store = FixedKeyValues(keys, values, scales, length, limit)
    return _find(model).step(ids, positions, mask, store)


@torch.library.register_fake("maqd::decode", lib=_library)
def _decode_shape(
    ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scales: Tensor | None,
    length: Tensor,
    limit: int,
    model: int,
    vocabulary: int,
) -> Tensor:
    return ids.new_empty(len(ids), 1, vocabulary, dtype=torch.float32)


def decode(
    ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    store: FixedKeyValues,
    model: int,
    vocabulary: int,
) -> Tensor:
    """Logits (batch, 1, vocabulary), float32, of the last of ``ids`` (batch, tokens), whose keys
    and values are added to ``store``; of the model registered as ``model``."""
    result: Tensor = torch.ops.maqd.decode(
        ids,
        positions,
        mask,
        store.keys,
        store.values,
        store.scales,
        store.length,
        store.limit,
        model,
        vocabulary,
    )
    return result
