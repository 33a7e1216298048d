"""A layer's weight in the compiled library's layout, and what the library makes of inputs.

For what the library does not cover (groups that no storage fits, float64, gradients) the torch
reference serves.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import grid_center, scale_dtype
from ..packing import codes_per_word, words_per_row
from .abi import TableStruct, WeightStruct
from .loader import FLOATS, arena, call, isa_number, loaded, pointer, release
from .reference import half_a_code

_LARGEST_INPUT = 128  # codes of inputs are signed bytes
_ROWS = 16  # rows of a block, as in internal.h
# Multiplications below which a second thread costs more than it brings: 19.2 ms a token with this
# bound, 21.5 with half of it (notebook: "Products below a million multiplications stay on one
# thread").
_PARALLEL = 1 << 20
_PIECE = 1 << 20  # words that are repacked, and then released, at a time


@dataclass(frozen=True)
class Storage:
    """How the kernel keeps codes: see the layout in internal.h.

    ``levels``: the largest M that fits. ``inputs``: columns of a unit; a group must consist of
    whole units. ``planes``: of 64 bytes a unit has.
    """

    bits: int
    levels: int
    inputs: int
    planes: int = 1

    def units(self, columns: int) -> int:
        """Units of a row."""
        return -(-columns // self.inputs)

    def covers(self, levels: int, columns: int, groups: int) -> bool:
        """Whether M levels and groups of this width fit."""
        return levels <= self.levels and (groups == 1 or columns // groups % self.inputs == 0)


STORAGES = {
    "1.6": Storage(5, 3, 20),  # five base-3 digits a byte
    "2": Storage(2, 4, 16),
    "3": Storage(3, 8, 32, 3),
    "4": Storage(4, 16, 8),
    "8": Storage(8, 256, 4),
}
_TRIT_COLUMNS = 1 << 15  # beyond them a sum of trits might not fit its accumulator
# Trits save a fifth of the bytes for twice the products, which pays where no cache holds the model:
# 0.82 of the time of 2 bits a token at 1 B parameters (notebook: "Five ternary digits a byte, for
# matrices no cache holds").
# So large a matrix belongs to such a model.
_TRITS_FROM = 1 << 22  # weights of a matrix


def storage_for(levels: int, rows: int, columns: int, groups: int) -> Storage | None:
    """The narrowest storage that covers M levels and these groups, or None; trits only for
    matrices of models that no cache holds."""
    trits = groups == 1 and columns <= _TRIT_COLUMNS and rows * columns >= _TRITS_FROM
    for name, storage in STORAGES.items():
        if storage.covers(levels, columns, groups) and (trits or name != "1.6"):
            return storage
    return None


def fits(columns: int, groups: int, levels: int) -> bool:
    """Whether the layout covers this shape: groups must consist of whole units."""
    if columns // groups * (levels - 1) * _LARGEST_INPUT >= 1 << 31:
        return False  # a sum might leave its 32 bits
    if groups == 1:  # asked at every product, and no other question then
        return levels <= STORAGES["8"].levels
    return storage_for(levels, 1, columns, groups) is not None


class NativeWeight:
    """One layer's weight in the kernel's layout, and its product with inputs.

    ``words`` are read once, piece by piece, and released (``loader.release``): of a mapped file no
    more than a piece is in memory beside the codes.

    Args:
        words, levels, scale, offset, bias: as in ``reference.packed_linear``, on the CPU.
        columns: input width.
        activation_levels: M of the inputs this weight will meet, or None for float ones.
        storage: name in ``STORAGES``; default: the narrowest that fits.
        activation_clip_ratio: share of its absmax that the grid of a token, or group, with a step
            of its own covers.
        group_steps: every group of a token's inputs has a step of its own; takes odd
            ``activation_levels``.
        rotation: neighboring inputs that the library rotates first (``functional.hadamard``).

    Raises:
        ValueError: tensors whose shapes do not belong together, no storage that fits, or a rotation
            that is no power of two or does not divide the columns.
    """

    def __init__(
        self,
        words: Tensor,
        levels: int,
        columns: int,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        activation_levels: int | None,
        storage: str | None = None,
        activation_clip_ratio: float = 1.0,
        group_steps: bool = False,
        rotation: int = 1,
    ) -> None:
        _check(words, levels, columns, scale, offset, bias)
        self.rows, self.columns, self.groups = words.shape[0], columns, scale.shape[1]
        self.activation_levels = activation_levels
        self.group_steps = group_steps and activation_levels is not None
        even = activation_levels is not None and activation_levels % 2 == 0
        if even and group_steps:
            raise ValueError(f"activation_levels={activation_levels}: steps of groups want it odd")
        if rotation < 1 or rotation & (rotation - 1) or columns % rotation:
            raise ValueError(f"rotation={rotation}: want a power of two that divides {columns}")
        kept_as = _storage(storage, levels, self.rows, columns, self.groups)
        halves = (scale, offset) if even else None
        self.codes, constant = _repack(words, levels, columns, kept_as, halves)
        self.scale = _scale_blocks(scale)
        self.offset, self.constant, self.bias = map(_padded, (offset, constant, bias))
        tensors = (self.codes, self.scale, self.offset, self.constant, self.bias)
        self.struct = WeightStruct(
            *map(pointer, tensors),
            self.rows,
            columns,
            self.groups,
            kept_as.units(columns),
            kept_as.bits,
            grid_center(levels),
            activation_clip_ratio,
            self.group_steps,
            rotation,
        )
        self._address = ctypes.addressof(self.struct)
        self._multiply = loaded().maqd_linear

    def __call__(self, x: Tensor, step: Tensor | None) -> Tensor:
        """``x`` (..., columns) times the weight -> (..., rows), in ``x``'s dtype.

        ``step`` is the activation step, (1,) or one per token (..., 1), 0 where a token shall have
        its own; None for float activations, or where every token shall have its own.

        Raises:
            ValueError: ``x`` is not that wide, or not on the CPU.
            MemoryError: no scratch memory.
        """
        if x.shape[-1] != self.columns or not x.is_cpu:
            raise ValueError(f"x {tuple(x.shape)} on {x.device}: want (..., {self.columns}), cpu")
        tokens = x.numel() // self.columns
        plain = x.dtype == torch.float32 and x.is_contiguous()
        flat = x if plain else x.detach().float().contiguous()
        out = flat.new_empty(*x.shape[:-1], self.rows)  # whatever torch's default dtype is
        every = 0
        if step is not None:
            every = int(step.numel() > 1)
            step = step.detach().float()
            if every:
                step = step.expand(*x.shape[:-1], 1).contiguous()
        failed = self._multiply(
            self._address,
            flat.data_ptr(),
            tokens,
            self.activation_levels or 0,
            None if step is None else step.data_ptr(),
            every,
            out.data_ptr(),
            isa_number(),
            torch.get_num_threads() if tokens * self.rows * self.columns >= _PARALLEL else 1,
        )
        if failed:
            raise MemoryError(f"no scratch memory for {tokens} tokens of {self.columns} inputs")
        return out if plain else out.to(x.dtype)


def _storage(name: str | None, levels: int, rows: int, columns: int, groups: int) -> Storage:
    """The storage called ``name``, or the narrowest; ``ValueError`` if it does not fit."""
    found = STORAGES[name] if name else storage_for(levels, rows, columns, groups)
    if found is None or not found.covers(levels, columns, groups):
        raise ValueError(
            f"{levels} levels, {groups} groups of {columns // groups} inputs: no storage of "
            f"{name or 'any kind'} fits; use groups of a multiple of 32"
        )
    return found


def _repack(
    words: Tensor,
    levels: int,
    columns: int,
    storage: Storage,
    halves: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Codes in the library's layout and, given ``halves`` = (scale, offset), ``half_a_code`` of
    them. Reads the words once, piece by piece, and releases each."""
    rows, size = len(words), storage.units(columns) * storage.planes * 64
    codes = arena.zeros(-(-rows // _ROWS) * size)
    found = []
    count = max(1, _PIECE // words.shape[1] // _ROWS) * _ROWS
    for start in range(0, rows, count):
        piece = slice(start, start + count)
        part = words[piece].contiguous()
        threads = torch.get_num_threads() if len(part) * columns >= _PARALLEL else 1
        shape = (len(part), columns, levels, codes_per_word(levels), storage.bits)
        call("maqd_repack", part, *shape, codes[start // _ROWS * size :], threads)
        if halves is not None:
            scale, offset = (None if t is None else t[piece] for t in halves)
            assert scale is not None
            found.append(half_a_code(part, levels, columns, scale, offset))
        release(words[piece])
    return codes, torch.cat(found) if found else None


def _padded(values: Tensor | None) -> Tensor | None:
    """One number a row, float32, zeros up to whole blocks of rows."""
    if values is None:
        return None
    flat = values.detach().float().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ROWS)).contiguous()


def _scale_blocks(scale: Tensor) -> Tensor:
    """``scale`` (rows, groups) as (row blocks, groups, 16), zeros beyond the rows."""
    rows, groups = scale.shape
    scales = torch.nn.functional.pad(
        scale.detach().to(scale_dtype(groups)), (0, 0, 0, -rows % _ROWS)
    )
    return scales.unflatten(0, (-1, _ROWS)).transpose(1, 2).contiguous()


def _check(
    words: Tensor,
    levels: int,
    columns: int,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
) -> None:
    """``ValueError`` unless the shapes belong together: the library trusts them."""
    rows, groups = len(words), scale.shape[-1]
    wanted = {
        "words": (words, (rows, words_per_row(columns, levels))),
        "scale": (scale, (rows, groups)),
        "offset": (offset, (rows, 1)),
        "bias": (bias, (rows,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.device.type != "cpu"):
            raise ValueError(f"{name} {tuple(tensor.shape)} on {tensor.device}: want {shape}, cpu")
    if words.dtype != torch.int32 or not rows or not groups or columns % groups:
        raise ValueError(
            f"{rows} rows, {columns} columns in {groups} groups, words of {words.dtype}: want at "
            "least a row, groups that divide the columns, int32"
        )


class Table:
    """A packed embedding as the library reads it; see ``reference.packed_embedding``."""

    def __init__(
        self,
        words: Tensor,
        levels: int,
        columns: int,
        scale: Tensor,
        offset: Tensor | None,
        output_scale: float = 1.0,
    ) -> None:
        _check(words, levels, columns, scale, offset, None)
        self.rows, self.columns = len(words), columns
        offset = None if offset is None else offset.detach().float().contiguous()
        self._kept = (words.detach().contiguous(), scale.detach().float().contiguous(), offset)
        self.struct = TableStruct(
            *(pointer(tensor) for tensor in self._kept),
            columns,
            levels,
            codes_per_word(levels),
            output_scale,
        )

    def check(self, ids: Tensor) -> Tensor:
        """``ids`` as the library reads them; ``IndexError`` for an id outside the table."""
        ids = ids.long().contiguous()
        if ids.numel() == 1:
            least = most = int(ids)
        elif ids.numel():
            least, most = (int(bound) for bound in ids.aminmax())
        else:
            return ids
        if least < 0 or most >= self.rows:
            raise IndexError(f"ids {least}..{most}: the table has {self.rows} rows")
        return ids

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` (...) -> (..., columns), float32."""
        flat = self.check(ids)
        out = torch.empty(*ids.shape, self.columns, **FLOATS)
        call("maqd_embedding", self.struct, flat, flat.numel(), out)
        return out
