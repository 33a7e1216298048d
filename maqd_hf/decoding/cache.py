"""Keys and values of the native decode step inside a cache of transformers, dynamic or static.

The library and the model's own forward read the same numbers, so that calls may alternate and beam
search, cropping and assistants work as ever. A cache's layers are replaced at the first native call
that meets it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..kernels.decoder import NativeDecoder
from ..kernels.key_values import FixedKeyValues, KeyValues, KeyValueType


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
        store = self._store.values
        return store.read(self._index, store.lengths[self._index])[0 if name == "keys" else 1]

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
        self._store.append(self._index, key_states, value_states)
        keys, values = self._store.values.read(self._index, self.get_seq_length())
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

    def __init__(self, decoder: NativeDecoder, batch: int, kind: KeyValueType) -> None:
        self.empty = partial(decoder.store, kind=kind)
        self.values: KeyValues = self.empty(batch)
        self.layers = [NativeLayer(self, i) for i in range(len(decoder.blocks))]

    def settle(self, batch: int) -> None:
        """Bring assigned keys and values into the store."""
        if not any(layer._given for layer in self.layers):
            if self.values.batch != batch and not any(self.values.lengths):
                self.values = self.empty(batch)
            return
        states = [(layer.keys, layer.values) for layer in self.layers]
        if self.values.batch != len(states[0][0]):
            self.values = self.empty(len(states[0][0]))
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer._given.clear()
            self.values.lengths[layer._index] = 0
            self.append(layer._index, keys, values)

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        start = self.values.lengths[index]
        stop = start + keys.shape[2]
        self.values.reserve(stop)
        self.values.write(index, torch.arange(start, stop), keys, values)
        self.values.lengths[index] = stop


class NativeStaticLayer(StaticLayer):
    """One block's part of a ``FixedKeyValues`` store, as a layer of transformers' ``StaticCache``.

    All layers share the store's number of positions, which the last of them advances. Reading
    ``keys`` and ``values`` makes copies in transformers' layout.
    """

    def __init__(self, store: FixedKeyValues, index: int) -> None:
        self.store, self.index = store, index
        super().__init__(store.limit)
        self.cumulative_length = store.length
        self.dtype, self.device = torch.float32, torch.device("cpu")
        _, self.batch_size, self.num_heads = store.shape
        self.k_head_dim = self.v_head_dim = store.head_dim
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        return self.store.read(self.index, self.store.limit)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> Tensor:
        return self.store.read(self.index, self.store.limit)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse(value)

    @staticmethod
    def _refuse(value: Tensor | None) -> None:
        if value is not None:
            raise TypeError("a static cache of the native decode step: use update(), not keys=")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        store, tokens = self.store, key_states.shape[2]
        if len(key_states) != self.batch_size:
            raise ValueError(f"{len(key_states)} sequences in a cache for {self.batch_size}")
        if not torch.compiler.is_compiling():  # a graph cannot ask
            store.reserve(store.past + tokens)
        store.write(self.index, torch.arange(tokens) + store.length, key_states, value_states)
        if self.index == store.shape[0] - 1:
            store.length.add_(tokens)
        keys, values = store.read(self.index, store.limit)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def reset(self) -> None:
        self.store.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(self.index, beam_idx)


def adopt(cache: Any, decoder: NativeDecoder, batch: int, kind: KeyValueType) -> KeyValues:
    """The store behind ``cache``, whose layers are replaced on first sight."""
    if isinstance(cache, StaticCache):
        return _adopt_static(cache, decoder, batch, kind)
    layers: list[Any] = cache.layers
    if not layers or not isinstance(layers[0], NativeLayer):
        store = _Store(decoder, batch, kind)
        for new, old in zip(store.layers, list(layers), strict=False):
            if getattr(old, "is_initialized", False) and old.get_seq_length():
                new._given = {"keys": old.keys, "values": old.values}
        cache.layers = list(store.layers)
    owner = cast(NativeLayer, cache.layers[0])._store
    owner.settle(batch)
    return owner.values


def _adopt_static(
    cache: StaticCache, decoder: NativeDecoder, batch: int, kind: KeyValueType
) -> FixedKeyValues:
    old: list[Any] = cache.layers
    if not isinstance(old[0], NativeStaticLayer):
        store = FixedKeyValues.empty(decoder.store(batch, kind), old[0].max_cache_len)
        past = int(old[0].get_seq_length())
        for index, layer in enumerate(old if past else ()):
            keys, values = layer.keys[:, :, :past], layer.values[:, :, :past]
            store.write(index, torch.arange(past), keys, values)
        store.fill(past)
        cache.layers = [NativeStaticLayer(store, index) for index in range(len(old))]
    return cast(NativeStaticLayer, cache.layers[0]).store


def cache_problem(cache: Any, blocks: int, batch: int, positions: int) -> str | None:
    """Why the library cannot work on ``cache`` for so many sequences and positions, or None."""
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return f"a {type(cache).__name__}"
    layers = cache.layers
    static = type(cache) is StaticCache
    kinds = (StaticLayer, NativeStaticLayer) if static else (DynamicLayer, NativeLayer)
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            continue  # the library keeps all positions and looks at some
        if type(layer) not in kinds:
            return f"cache layers of type {type(layer).__name__}"
    if len(layers) not in ((blocks,) if static else (0, blocks)):
        return f"a cache of {len(layers)} layers"
    if not static:
        return None
    first = layers[0]
    if not isinstance(getattr(first, "cumulative_length", None), Tensor):
        return "static caches of this transformers version do not know their length"
    if first.is_initialized and first.batch_size != batch:
        return f"a static cache for {first.batch_size} sequences, not {batch}"
    if positions > first.max_cache_len:
        return f"{positions} positions in a static cache of {first.max_cache_len}"
    return None
