"""Keys and values of the native decode step inside a ``DynamicCache`` of transformers.

The library and the model's own forward read the same numbers, so that calls may alternate and beam
search, cropping and assistants work as ever.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .kernels.decoder import KeyValues, NativeDecoder


class NativeLayer(DynamicLayer):
    """One block's part of a ``KeyValues`` store, as a layer of transformers' ``DynamicCache``.

    Reading ``keys`` and ``values`` makes copies in transformers' layout. What is assigned to them
    (beam search reorders them so) is kept as it is until somebody appends.
    """

    def __init__(self, store: _Store, index: int) -> None:
        self._store, self._index = store, index
        self._given: dict[str, Tensor] = {}
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.is_initialized = True

    def _read(self, name: str) -> Tensor:
        if name in self._given:
            return self._given[name]
        return self._store.values.read(self._index)[0 if name == "keys" else 1]

    def _assign(self, name: str, value: Tensor | None) -> None:
        if value is None or not value.numel():
            self._given.pop(name, None)
            self._store.values.lengths[self._index] = 0
        else:
            self._given[name] = value

    @property
    def keys(self) -> Tensor:
        return self._read("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign("keys", value)

    @property
    def values(self) -> Tensor:
        return self._read("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign("values", value)

    def lazy_initialization(self, *states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._store.settle(len(key_states))
        store = self._store.values
        store.write(self._index, store.lengths[self._index], key_states, value_states)
        keys, values = store.read(self._index)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_seq_length(self, *args: Any) -> int:
        if self._given:
            return next(iter(self._given.values())).shape[-2]
        return self._store.values.lengths[self._index]

    def crop(self, length: int) -> None:
        """Forget the last ``-length`` positions, or (transformers 5.0) all behind ``length``; 0
        forgets none."""
        now = self.get_seq_length()
        new = max(now + length, 0) if length <= 0 else min(length, now)
        if new == now:
            return
        if self._given:
            self._given = {name: value[..., :new, :] for name, value in self._given.items()}
        else:
            self._store.values.lengths[self._index] = new


class _Store:
    """The ``KeyValues`` all layers of a cache share, remade when their batch size changes."""

    def __init__(self, decoder: NativeDecoder, batch: int) -> None:
        self.decoder_store = decoder.store
        self.values: KeyValues = decoder.store(batch)
        self.layers = [NativeLayer(self, i) for i in range(len(decoder.blocks))]

    def settle(self, batch: int) -> None:
        """Bring assigned keys and values into the store."""
        if not any(layer._given for layer in self.layers):
            if self.values.batch != batch and not any(self.values.lengths):
                self.values = self.decoder_store(batch)
            return
        states = [(layer.keys, layer.values) for layer in self.layers]
        if self.values.batch != len(states[0][0]):
            self.values = self.decoder_store(len(states[0][0]))
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer._given.clear()
            self.values.write(layer._index, 0, keys, values)


def adopt(cache: DynamicCache, decoder: NativeDecoder, batch: int) -> KeyValues:
    """The store behind ``cache``, whose layers are replaced on first sight."""
    layers: list[Any] = cache.layers
    if not layers or not isinstance(layers[0], NativeLayer):
        store = _Store(decoder, batch)
        for new, old in zip(store.layers, list(layers), strict=False):
            if getattr(old, "is_initialized", False) and old.get_seq_length():
                new._given = {"keys": old.keys, "values": old.values}
        cache.layers = list(store.layers)
    owner = cast(NativeLayer, cache.layers[0])._store
    owner.settle(batch)
    return owner.values


def cache_problem(cache: Any, blocks: int) -> str | None:
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"a {type(cache).__name__}"
    layers = cache.layers
    if any(type(layer) not in (DynamicLayer, NativeLayer) for layer in layers):
        return f"cache layers of type {type(layers[0]).__name__}"
    return None if len(layers) in (0, blocks) else f"a cache of {len(layers)} layers"
