"""Keys and values of all blocks of a decoder, in the layout of ``csrc/internal.h``.

Floats, or bytes with one scale per position and head: ``x = code * absmax / 127``. Bytes take a
quarter of the memory and of the bandwidth, which counts from some thousand positions on.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .loader import FLOATS

_BLOCK = 16  # positions that keys are stored by

KeyValueType = Literal["float32", "int8"]
"""What a stored key or value is."""


class KeyValues:
    """Keys and values of all blocks, with room to grow.

    ``keys`` (blocks, batch, kv_heads, capacity / 16, head_dim, 16) lets one query meet 16 keys per
    multiplication; ``values`` (blocks, batch, kv_heads, capacity, head_dim rounded up to 16);
    ``scales`` (2, blocks, batch, kv_heads, capacity) of both, or None for floats. ``lengths``:
    positions filled, one number a block.

    >>> store = KeyValues(1, 1, 1, 4, "int8")
    >>> store.reserve(1)
    >>> store.write(0, torch.arange(1), torch.tensor([[[[0.0, 1.0, -2.0, 0.5]]]]),
    ...             torch.ones(1, 1, 1, 4))
    >>> store.read(0, 1)[0]
    tensor([[[[ 0.0000,  1.0079, -2.0000,  0.5039]]]])
    """

    def __init__(
        self, blocks: int, batch: int, kv_heads: int, head_dim: int, kind: KeyValueType = "float32"
    ) -> None:
        if kind not in ("float32", "int8"):
            raise ValueError(f"keys and values of {kind!r}: must be 'float32' or 'int8'")
        self.head_dim, self.capacity = head_dim, 0
        self.lengths = [0] * blocks
        width = -(-head_dim // _BLOCK) * _BLOCK
        dtype = torch.int8 if kind == "int8" else torch.float32
        shape = (blocks, batch, kv_heads)
        options = {**FLOATS, "dtype": dtype}
        self.keys = torch.empty(*shape, 0, head_dim, _BLOCK, **options)
        self.values = torch.empty(*shape, 0, width, **options)
        self.scales = torch.empty(2, *shape, 0, **FLOATS) if kind == "int8" else None

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, batch, kv_heads)."""
        return tuple(self.keys.shape[:3])

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def past(self) -> int:
        """Positions filled in every block; ``ValueError`` where blocks hold different numbers."""
        if any(length != self.lengths[0] for length in self.lengths):
            raise ValueError(f"blocks hold different numbers of positions: {self.lengths}")
        return self.lengths[0]

    def fill(self, positions: int) -> None:
        """So many positions are filled in every block now."""
        self.lengths = [positions] * len(self.lengths)

    def reserve(self, positions: int) -> None:
        """Make room for this many positions; doubles, so that growing stays cheap."""
        if positions <= self.capacity:
            return
        blocks = -(-max(positions, 2 * self.capacity, 32) // _BLOCK)
        keys = self.keys.new_empty(*self.shape, blocks, *self.keys.shape[4:])
        values = self.values.new_zeros(*self.shape, blocks * _BLOCK, self.values.shape[4])
        keys[:, :, :, : self.keys.shape[3]] = self.keys
        values[:, :, :, : self.capacity] = self.values
        if self.scales is not None:
            scales = self.scales.new_zeros(2, *self.shape, blocks * _BLOCK)
            scales[..., : self.capacity] = self.scales
            self.scales = scales
        self.keys, self.values, self.capacity = keys, values, blocks * _BLOCK

    def read(self, block: int, length: int) -> tuple[Tensor, Tensor]:
        """The first (keys, values) of a block, each (batch, kv_heads, length, head_dim), float."""
        keys = self.keys[block].transpose(-1, -2).flatten(2, 3)[:, :, :length]
        values = self.values[block, :, :, :length, : self.head_dim]
        if self.scales is None:
            return keys, values
        scales = self.scales[:, block, :, :, :length].unsqueeze(-1)
        return keys * scales[0], values * scales[1]

    def write(self, block: int, position: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values (batch, kv_heads, positions, head_dim) at ``position`` (positions,),
        where there is room."""
        keys, values = keys.detach().float(), values.detach().float()
        if self.scales is not None:
            scales = [x.abs().amax(-1, keepdim=True) / 127 for x in (keys, values)]
            keys, values = (
                (x / scale.clamp(min=1e-37)).round().to(torch.int8)
                for x, scale in zip((keys, values), scales, strict=True)
            )
            for kept, scale in zip(self.scales, scales, strict=True):
                kept[block, :, :, position] = scale.squeeze(-1)
        # indices around a slice: the indexed dimension comes first
        self.keys[block, :, :, position // _BLOCK, :, position % _BLOCK] = keys.permute(2, 0, 1, 3)
        self.values[block, :, :, position, : self.head_dim] = values

    def reorder(self, block: int, index: Tensor) -> None:
        """Sequence i of the batch becomes sequence ``index[i]``."""
        self.keys[block] = self.keys[block].index_select(0, index)
        self.values[block] = self.values[block].index_select(0, index)
        if self.scales is not None:
            self.scales[:, block] = self.scales[:, block].index_select(1, index)


class FixedKeyValues(KeyValues):
    """Keys and values that stay where they are, for graphs: their number is a tensor, () int64,
    and they do not grow beyond ``limit``."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        scales: Tensor | None,
        length: Tensor,
        limit: int,
    ) -> None:
        self.keys, self.values, self.scales = keys, values, scales
        self.length, self.limit = length, limit
        self.head_dim, self.capacity = keys.shape[4], values.shape[3]

    @classmethod
    def empty(cls, like: KeyValues, limit: int) -> FixedKeyValues:
        """For ``limit`` positions; ``like``: an empty store, taken over."""
        like.reserve(limit)
        length = torch.zeros((), dtype=torch.int64, device="cpu")
        return cls(like.keys.zero_(), like.values, like.scales, length, limit)

    @property
    def past(self) -> int:
        return int(self.length)

    def fill(self, positions: int) -> None:
        self.length.fill_(positions)

    def reserve(self, positions: int) -> None:
        if positions > self.limit:
            raise ValueError(f"{positions} positions: this static cache holds {self.limit}")
