"""Keys and values of the native decode step inside a cache of transformers, dynamic or static.

The library and the model's own forward read the same numbers, so that calls may alternate and beam
search, cropping and assistants work as ever. A cache's layers are replaced at the first native call
that meets it. They are ordinary objects: they can be copied, pickled and saved, and their ``keys``
and ``values`` read, edited in place and assigned.

The library stores keys and values in a layout of its own. What somebody reads is a copy in
transformers' layout, which counts from then on until the next call: only then is it compared with
what is stored, and written back where it differs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..kernels.decoder import NativeDecoder
from ..kernels.key_values import FixedKeyValues, KeyValues, KeyValueType


class _Readable:
    """``keys`` and ``values`` that can be read, edited in place and assigned.

    ``given``: both, while somebody may hold them; empty else.
    """

    given: Any

    def _read(self) -> tuple[Tensor, Tensor]:
        """Copies of what is stored, each (batch, heads, positions, head_dim)."""
        raise NotImplementedError

    def _handed_out(self) -> dict[str, Tensor]:
        if not self.given:
            self.given = dict(zip(("keys", "values"), self._read(), strict=True))
        return self.given

    def _assign(self, name: str, value: Tensor) -> None:
        self._handed_out()[name] = value

    def edited(self) -> bool:
        """Whether ``given`` says something else than what is stored."""
        given = self.given.values()
        return not all(map(torch.equal, given, self._read())) if self.given else False


class NativeLayer(_Readable, DynamicLayer):
    """One block's part of a ``KeyValues`` store, as a layer of transformers' ``DynamicCache``."""

    def __init__(self, store: _Store, index: int) -> None:
        self._store, self._index = store, index
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def _read(self) -> tuple[Tensor, Tensor]:
        store = self._store.values
        keys, values = store.read(self._index, store.lengths[self._index])
        return keys.clone(), values.clone()

    @property
    def given(self) -> dict[str, Tensor]:
        return self._store.given.get(self._index, {})

    @given.setter
    def given(self, value: dict[str, Tensor]) -> None:
        self._store.given[self._index] = value
        if not value:
            del self._store.given[self._index]

    def _set(self, name: str, value: Tensor | None) -> None:
        if value is None or not value.numel():
            self.given, self._store.values.lengths[self._index] = {}, 0
        else:
            self._assign(name, value)

    @property
    def keys(self) -> Tensor:
        return self._handed_out()["keys"]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set("keys", value)

    @property
    def values(self) -> Tensor:
        return self._handed_out()["values"]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set("values", value)

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Follows from what is stored."""

    def lazy_initialization(self, *states: Tensor) -> None:
        """There is nothing to do: the store has its shapes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._store.settle(len(key_states))
        self._store.append(self._index, key_states, value_states)
        keys, values = self._store.values.read(self._index, self.get_seq_length())
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_seq_length(self, *args: Any) -> int:
        if self.given:
            return self.given["keys"].shape[-2]
        return self._store.values.lengths[self._index]

    def crop(self, length: int) -> None:
        """Forget the last ``-length`` positions, or (transformers 5.0) all behind ``length``; 0
        forgets none."""
        now = self.get_seq_length()
        new = max(now + length, 0) if length <= 0 else min(length, now)
        if new == now:
            return
        if self.given and new:
            self.given = {name: value[..., :new, :] for name, value in self.given.items()}
        else:
            self.given, self._store.values.lengths[self._index] = {}, new


class _Store:
    """The ``KeyValues`` all layers of a cache share, remade when their batch size changes, and what
    was ``given`` out of them, by the layer's number."""

    def __init__(self, values: KeyValues) -> None:
        self.values = values
        self.given: dict[int, dict[str, Tensor]] = {}
        self.layers = [NativeLayer(self, index) for index in range(values.shape[0])]

    def _resize(self, batch: int) -> None:
        """An empty store for ``batch`` sequences."""
        old = self.values
        kind: KeyValueType = "float32" if old.scales is None else "int8"
        blocks, _, heads = old.shape
        self.values = KeyValues(blocks, batch, heads, old.head_dim, kind)

    def settle(self, batch: int) -> None:
        """Bring what was assigned to layers, or edited in place, into the store."""
        given = [self.layers[index] for index in self.given]
        sizes = {len(value) for layer in given for value in layer.given.values()}
        if not given:
            if self.values.batch != batch and not any(self.values.lengths):
                self._resize(batch)
        elif sizes == {self.values.batch}:
            for layer in given:
                if layer.edited():
                    self._write(layer, *layer.given.values())
        elif len(sizes) == 1 and len(given) == len([n for n in self._lengths() if n]):
            self._resize(*sizes)
            for layer in given:
                self._write(layer, *layer.given.values())
        else:
            raise ValueError(f"layers of a cache hold different numbers of sequences: {sizes}")
        for layer in given:
            layer.given = {}

    def _lengths(self) -> list[int]:
        return [layer.get_seq_length() for layer in self.layers]

    def _write(self, layer: NativeLayer, keys: Tensor, values: Tensor) -> None:
        self.values.lengths[layer._index] = 0
        self.append(layer._index, keys, values)

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        start = self.values.lengths[index]
        stop = start + keys.shape[2]
        self.values.reserve(stop)
        self.values.write(index, torch.arange(start, stop, device="cpu"), keys, values)
        self.values.lengths[index] = stop


class NativeStaticLayer(_Readable, StaticLayer):
    """One block's part of a ``FixedKeyValues`` store, as a layer of transformers' ``StaticCache``.

    All layers share the store's number of positions, which the last of them moves.
    """

    def __init__(self, store: FixedKeyValues, index: int) -> None:
        self.store, self.index = store, index
        self.given = {}
        super().__init__(store.limit)
        self.cumulative_length = store.length
        self.dtype, self.device = torch.float32, torch.device("cpu")
        _, self.batch_size, self.num_heads = store.shape
        self.k_head_dim = self.v_head_dim = store.head_dim
        self.is_initialized = True

    @property
    def _is_last(self) -> bool:
        return self.index == self.store.shape[0] - 1

    def _read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.store.read(self.index, self.store.limit)
        return keys.clone(), values.clone()

    def _set(self, name: str, value: Tensor | None) -> None:
        if value is None:  # as the class does before there are any
            return
        if value.shape != (shape := self._handed_out()[name].shape):
            raise ValueError(
                f"{name} {tuple(value.shape)} for a static cache of {tuple(shape)}: a cache that "
                "changes its size must be dynamic"
            )
        self._assign(name, value)

    @property
    def keys(self) -> Tensor:
        return self._handed_out()["keys"]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set("keys", value)

    @property
    def values(self) -> Tensor:
        return self._handed_out()["values"]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set("values", value)

    def settle(self) -> None:
        """Bring what was edited in place into the store."""
        if self.edited():
            keys, values = self.given.values()
            position = torch.arange(self.store.limit, device="cpu")
            self.store.write(self.index, position, keys, values)
        self.given = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        store, tokens = self.store, key_states.shape[2]
        if len(key_states) != self.batch_size:
            raise ValueError(f"{len(key_states)} sequences in a cache for {self.batch_size}")
        if not torch.compiler.is_compiling():  # a graph cannot ask
            store.reserve(store.past + tokens)
        if self.given:
            self.settle()
        position = torch.arange(tokens, device="cpu") + store.length
        store.write(self.index, position, key_states, value_states)
        if self._is_last:
            store.length.add_(tokens)
        keys, values = store.read(self.index, store.limit)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions."""
        if tokens_to_remove > 0:
            raise RuntimeError(f"crop({tokens_to_remove}): a static cache takes a negative number")
        if self._is_last:
            self.store.length.add_(tokens_to_remove)

    def reset(self) -> None:
        self.given = {}
        store = self.store
        for tensor in (store.keys[self.index], store.values[self.index]):
            tensor.zero_()
        if store.scales is not None:
            store.scales[:, self.index].zero_()
        store.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.settle()
        self.store.reorder(self.index, beam_idx)


def adopt(cache: Any, decoder: NativeDecoder, batch: int, kind: KeyValueType) -> KeyValues:
    """The store behind ``cache``, whose layers are replaced on first sight."""
    if isinstance(cache, StaticCache):
        return _adopt_static(cache, decoder, batch, kind)
    layers: list[Any] = cache.layers
    if not layers or not isinstance(layers[0], NativeLayer):
        store = _Store(decoder.store(batch, kind))
        for new, old in zip(store.layers, list(layers), strict=False):
            if getattr(old, "is_initialized", False) and old.get_seq_length():
                new.given = {"keys": old.keys, "values": old.values}
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
            store.write(index, torch.arange(past, device="cpu"), keys, values)
        store.fill(past)
        cache.layers = [NativeStaticLayer(store, index) for index in range(len(old))]
    layers = cast(list[NativeStaticLayer], cache.layers)
    for layer in layers:
        if layer.given:
            layer.settle()
    return layers[0].store


def was_read(cache: Any) -> bool:
    """Whether somebody may have edited the keys or values of a cache of the library's since the
    last call."""
    return any(layer.given for layer in cache.layers)


def capacity(cache: Any) -> int | None:
    """How many positions a static cache has room for; None: any number."""
    first: Any = cache.layers[0] if type(cache) is StaticCache else None
    return int(first.max_cache_len) if first is not None else None


# ------------------------------------------------------------------------ which caches are taken


def cache_problem(cache: Any, decoder: NativeDecoder, batch: int, tokens: int) -> str | None:
    """Why the library cannot append so many tokens of so many sequences to ``cache``, or None."""
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return f"a {type(cache).__name__}"
    layers, blocks = cache.layers, len(decoder.blocks)
    static = type(cache) is StaticCache
    if len(layers) not in ((blocks,) if static else (0, blocks)):
        return f"a cache of {len(layers)} layers"
    if layers and type(layers[0]) in (NativeLayer, NativeStaticLayer):
        own = layers[0].store if static else layers[0]._store.values
        if (own.shape[2], own.head_dim) != (decoder.kv_heads, decoder.head_dim):
            return "the cache of a model with other heads"
        if not static:
            return None if layers == layers[0]._store.layers else "cache layers of several caches"
    kinds = (StaticLayer, NativeStaticLayer) if static else (DynamicLayer,)
    for layer, block in zip(layers, decoder.blocks, strict=False):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            if layer.sliding_window != block.window:
                return f"a cache for windows of {layer.sliding_window}, not {block.window}"
            continue  # the library keeps all positions and looks at some
        if type(layer) not in kinds:
            return f"cache layers of type {type(layer).__name__}"
    return _static_problem(cache, batch, tokens) if static else None


def _static_problem(cache: Any, batch: int, tokens: int) -> str | None:
    first = cache.layers[0]
    if not (
        isinstance(getattr(first, "cumulative_length", None), Tensor) and hasattr(first, "crop")
    ):
        return "static caches of this transformers version do not know their length, or cannot crop"
    if first.is_initialized and first.batch_size != batch:
        return f"a static cache for {first.batch_size} sequences, not {batch}"
    positions = int(first.get_seq_length()) + tokens
    if positions > first.max_cache_len:
        return f"{positions} positions in a static cache of {first.max_cache_len}"
    return None
