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
from .loader import FLOATS, arena, library, path_number, pointer, release
from .reference import half_a_code

_ROWS = 16  # rows of a block, as in maqd.h
# Multiplications below which a second thread costs more than it brings. Measured: waking it takes
# some 2 us, and 10 and more where idle threads sleep (OMP_WAIT_POLICY=passive): there a token of
# SmolLM2-135M's own forward took 21.5 ms with half of this, 19.2 with this and 18.7 with twice.
_PARALLEL = 1 << 20
_PIECE = 1 << 20  # words that are repacked, and then released, at a time


class WeightStruct(ctypes.Structure):
    """``maqd_weight`` of maqd.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "offset", "constant", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "units")),
        *((name, ctypes.c_int32) for name in ("bits", "wide")),
        *((name, ctypes.c_float) for name in ("zero", "clip_ratio")),
        *((name, ctypes.c_int32) for name in ("group_steps", "rotation")),
    ]


class _Input(ctypes.Structure):
    """``maqd_input`` of maqd.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "step", "group_step", "sums", "values")),
        ("tile", ctypes.c_int64),
        ("run", ctypes.c_int64),
    ]


class TableStruct(ctypes.Structure):
    """``maqd_table`` of maqd.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "scale", "offset")),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("levels", "digits")),
        ("output_scale", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Storage:
    """How the kernel keeps codes: see the layout in maqd.h.

    ``levels``: the largest M that fits. ``inputs``: columns of a unit; a group must consist of
    whole units. ``planes``: of 64 bytes a unit has.
    """

    bits: int
    levels: int
    inputs: int
    planes: int = 1

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
# Trits save a fifth of the bytes for twice the products. Measured, to 2 bit: matrices one at a time
# on 2 threads 0.83 to 1.04 of the time where weights come from memory, 1.16 to 1.43 where they stay
# in the caches; a token of a ternary Llama of 1 B parameters 0.82 on 2 threads, 1.06 on one. Such a
# large matrix belongs to a model that no cache holds.
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
        rotation: neighbouring inputs that the library rotates first (``functional.hadamard``).

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
        lib = library()
        assert lib is not None
        self._lib, self.activation_levels = lib, activation_levels
        _check(words, levels, columns, scale, offset, bias)
        self.rows, self.columns, self.groups = words.shape[0], columns, scale.shape[1]
        chosen = (
            STORAGES[storage] if storage else storage_for(levels, self.rows, columns, self.groups)
        )
        if chosen is None or not chosen.covers(levels, columns, self.groups):
            raise ValueError(
                f"{levels} levels, {self.groups} groups of {columns // self.groups} inputs: no "
                f"storage of {storage or 'any kind'} fits; use groups of a multiple of 32"
            )
        even = activation_levels is not None and activation_levels % 2 == 0
        if even and group_steps:
            raise ValueError(f"activation_levels={activation_levels}: steps of groups want it odd")
        if rotation < 1 or rotation & (rotation - 1) or columns % rotation:
            raise ValueError(f"rotation={rotation}: want a power of two that divides {columns}")
        units = -(-columns // chosen.inputs)
        blocks = -(-self.rows // _ROWS)
        self.stride = units * chosen.inputs
        self.codes = arena.zeros(blocks * units * chosen.planes * 64)
        self.group_steps = group_steps and activation_levels is not None
        halves = []
        step = max(1, _PIECE // words.shape[1] // _ROWS) * _ROWS
        for start in range(0, self.rows, step):
            piece = slice(start, start + step)
            part = words[piece].contiguous()
            lib.maqd_repack(
                pointer(part),
                len(part),
                columns,
                levels,
                codes_per_word(levels),
                chosen.bits,
                pointer(self.codes[start // _ROWS * units * chosen.planes * 64 :]),
                torch.get_num_threads() if len(part) * columns >= _PARALLEL else 1,
            )
            if even:
                offsets = None if offset is None else offset[piece]
                halves.append(half_a_code(part, levels, columns, scale[piece], offsets))
            release(words[piece])

        def padded(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            out = torch.zeros(blocks * _ROWS, **FLOATS)
            out[: self.rows] = values.detach().float().flatten()
            return out

        options = {**FLOATS, "dtype": scale_dtype(self.groups)}
        scales = torch.zeros(blocks * _ROWS, self.groups, **options)
        scales[: self.rows] = scale.detach()
        self.scale = scales.unflatten(0, (blocks, _ROWS)).transpose(1, 2).contiguous()
        self.offset, self.bias = padded(offset), padded(bias)
        self.constant = padded(torch.cat(halves) if even else None)
        tensors = (self.codes, self.scale, self.offset, self.constant, self.bias)
        self.struct = WeightStruct(
            *(pointer(tensor) for tensor in tensors),
            self.rows,
            columns,
            self.groups,
            units,
            chosen.bits,
            levels > 128,
            grid_center(levels),
            activation_clip_ratio,
            self.group_steps,
            rotation,
        )
        self._address = ctypes.addressof(self.struct)

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
        failed = self._lib.maqd_linear(
            self._address,
            flat.data_ptr(),
            tokens,
            self.activation_levels or 0,
            None if step is None else step.data_ptr(),
            every,
            out.data_ptr(),
            path_number(),
            torch.get_num_threads() if tokens * self.rows * self.columns >= _PARALLEL else 1,
        )
        if failed:
            raise MemoryError(f"no scratch memory for {tokens} tokens of {self.columns} inputs")
        return out if plain else out.to(x.dtype)

    def take(self, x: Tensor, step: Tensor) -> dict[str, Tensor]:
        """What the kernel makes of ``x`` (tokens, columns) with ``step`` (tokens,): ``codes``
        (tokens, stride) less half the levels, ``step``, ``sums`` (tokens, groups + 1), and with
        ``group_steps`` these (tokens, groups)."""
        tokens = len(x)
        if x.shape != (tokens, self.columns) or step.shape != (tokens,):
            raise ValueError(
                f"x {tuple(x.shape)} and step {tuple(step.shape)}: want (tokens, {self.columns}) "
                "and (tokens,)"
            )
        if self.activation_levels is None:
            raise ValueError("this weight meets float activations: nothing is quantised")
        taken = {
            "codes": torch.empty(tokens, self.stride, dtype=torch.int8, device="cpu"),
            "step": step.detach().float().clone(),
            "sums": torch.empty(tokens, self.groups + 1, **FLOATS),
        }
        if self.group_steps:
            taken["group_step"] = torch.empty(tokens, self.groups, **FLOATS)
        names = ("codes", "step", "group_step", "sums")
        struct = _Input(*(pointer(taken.get(name)) for name in names), None, 1, 4)
        x = x.detach().float().contiguous()
        rotated = torch.empty(self.columns, **FLOATS)
        self._lib.maqd_take_inputs(
            self._address,
            pointer(x),
            tokens,
            self.activation_levels or 0,
            ctypes.byref(struct),
            pointer(rotated),
            path_number(),
        )
        return taken


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
        lib = library()
        assert lib is not None
        flat = self.check(ids)
        out = torch.empty(*ids.shape, self.columns, **FLOATS)
        lib.maqd_embedding(ctypes.byref(self.struct), pointer(flat), flat.numel(), pointer(out))
        return out
