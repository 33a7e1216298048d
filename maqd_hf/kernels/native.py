"""The compiled CPU library: loading it, repacking a layer's words for it, calling it.

The library is plain C (``csrc``) built by the package's own build and called through ctypes. Where
it is missing, or for what it does not cover (group sizes that are no multiple of its chunk,
float64, gradients), the caller uses the torch reference.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..functional import grid_center
from ..packing import codes_per_word, unpack_codes

_ROWS = 16  # rows of a block, as in maqd.h
_PARALLEL = 1 << 17  # multiplications below which a second thread costs more than it brings
PATH_VARIABLE = "MAQD_KERNEL"
LIBRARY_VARIABLE = "MAQD_LIBRARY"  # another build of the library, as `.ci/sanitize` makes one


class WeightStruct(ctypes.Structure):
    """``maqd_weight`` of maqd.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "offset", "constant", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "chunks")),
        ("bits", ctypes.c_int32),
        ("zero", ctypes.c_float),
    ]


class _Input(ctypes.Structure):
    """``maqd_input`` of maqd.h."""

    _fields_ = [(n, ctypes.c_void_p) for n in ("codes", "step", "sums", "values", "value_sums")]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if the package was installed without a compiler."""
    given = os.environ.get(LIBRARY_VARIABLE)
    found = [Path(given)] if given else sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    p, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.maqd_path_name.restype = ctypes.c_char_p
    lib.maqd_repack.argtypes = [p, i64, i64, i32, i32, i32, p, i32]
    lib.maqd_linear.argtypes = [p, p, i64, i32, p, p, i32, i32]
    lib.maqd_embedding.argtypes = [p, i64, i32, i32, p, p, p, i64, p]
    for function in (lib.maqd_repack, lib.maqd_linear, lib.maqd_embedding):
        function.restype = None
    lib.maqd_decode.argtypes = [p, p, i32, i32]
    return lib


@lru_cache(maxsize=1)
def paths() -> dict[str, int]:
    """Instruction sets the library was built for and this machine runs, slowest first."""
    lib = library()
    if lib is None:
        return {}
    return {
        lib.maqd_path_name(i).decode(): i for i in range(lib.maqd_paths()) if lib.maqd_supported(i)
    }


def chosen_path() -> str | None:
    """The path that runs: the best one, or what the environment variable MAQD_KERNEL names.

    ``MAQD_KERNEL=reference`` switches the library off. ``ValueError`` for an unknown path.
    """
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted == "reference":
        return None
    if wanted is not None and wanted not in paths():
        raise ValueError(
            f"{PATH_VARIABLE}={wanted!r}: this machine and build run {['reference', *paths()]}"
        )
    return wanted or (list(paths())[-1] if paths() else None)


def path_number() -> int:
    """The chosen path as the library counts; only where there is one."""
    path = chosen_path()
    assert path is not None
    return paths()[path]


def storage_bits(levels: int) -> int:
    """Bits a code takes in the kernel's layout: 2, 4 or 8."""
    return 2 if levels <= 4 else 4 if levels <= 16 else 8


def fits(columns: int, groups: int, levels: int) -> bool:
    """Whether the layout covers this shape: groups must consist of whole chunks."""
    return groups == 1 or (columns // groups) % (32 // storage_bits(levels)) == 0


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    return None if tensor is None else int(tensor.data_ptr())


class _Arena:
    """Memory for codes, in large pieces on huge pages: layers that are made one after the other lie
    so, and reading on from one to the next neither misses the page table nor stops the prefetcher.

    A piece is freed with the last of the layers in it.
    """

    piece = 1 << 25
    _huge = 1 << 21

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def zeros(self, count: int) -> Tensor:
        """``count`` bytes, aligned to a cache line; zero."""
        count = -(-count // 64) * 64
        if count > len(self._rest):
            size = max(count, self.piece)
            memory = torch.empty(size + self._huge, dtype=torch.uint8)
            skip = -memory.data_ptr() % self._huge
            self._rest = memory[skip : skip + size]
            _advise_huge(self._rest)
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken.zero_()


def _advise_huge(memory: Tensor) -> None:
    """Ask for huge pages where the system has them (Linux: MADV_HUGEPAGE is 14)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "madvise"):
        libc.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(len(memory)), 14)


_arena = _Arena()


class NativeWeight:
    """One layer's weight in the kernel's layout, and its product with inputs.

    Args:
        words, levels, scale, offset, bias: as in ``reference.packed_linear``, on the CPU.
        columns: input width.
        activation_levels: M of the inputs this weight will meet, or None for float ones.
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
    ) -> None:
        lib = library()
        assert lib is not None
        self._lib, self.activation_levels = lib, activation_levels
        self.rows, self.columns, self.groups = words.shape[0], columns, scale.shape[1]
        bits = storage_bits(levels)
        inputs = 32 // bits
        chunks = -(-columns // inputs)
        blocks = -(-self.rows // _ROWS)
        self.stride = chunks * inputs
        self.codes = _arena.zeros(blocks * chunks * 64)
        words = words.contiguous()
        lib.maqd_repack(
            pointer(words),
            self.rows,
            columns,
            levels,
            codes_per_word(levels),
            bits,
            pointer(self.codes),
            self._threads(1),
        )

        def padded(values: Tensor | None) -> Tensor:
            out = torch.zeros(blocks * _ROWS)
            if values is not None:
                out[: self.rows] = values.detach().float().flatten()
            return out

        self.scale = torch.zeros(self.groups, blocks * _ROWS)
        self.scale[:, : self.rows] = scale.detach().float().t()
        self.offset, self.bias = padded(offset), padded(bias)
        self.constant = padded(self._constant(words, levels, scale, offset))
        tensors = (self.codes, self.scale, self.offset, self.constant, self.bias)
        self.struct = WeightStruct(
            *(pointer(tensor) for tensor in tensors),
            self.rows,
            columns,
            self.groups,
            chunks,
            bits,
            grid_center(levels),
        )

    def _constant(
        self, words: Tensor, levels: int, scale: Tensor, offset: Tensor | None
    ) -> Tensor | None:
        """What half a code more in every input adds: only even activation levels need it."""
        if self.activation_levels is None or self.activation_levels % 2:
            return None
        units = torch.empty(self.rows, self.groups)
        for start in range(0, self.rows, 4096):
            codes = unpack_codes(words[start : start + 4096], levels, self.columns).float()
            sums = codes.unflatten(1, (self.groups, -1)).sum(-1)
            units[start : start + 4096] = sums - grid_center(levels) * (self.columns // self.groups)
        total = (units * scale.float()).sum(1)
        if offset is not None:
            total = total + offset.float().flatten() * self.columns
        return total / 2

    def _threads(self, tokens: int) -> int:
        parallel = tokens * self.rows * self.columns >= _PARALLEL
        return torch.get_num_threads() if parallel else 1

    def __call__(self, x: Tensor, step: Tensor | None) -> Tensor:
        """``x`` (..., columns) times the weight -> (..., rows), in ``x``'s dtype.

        ``step`` is the activation step, (1,) or one per token (..., 1), 0 where a token shall have
        its own; None for float activations.
        """
        out = torch.empty(*x.shape[:-1], self.rows)
        self.run(x, step, out)
        return out.to(x.dtype)

    def run(self, x: Tensor, step: Tensor | None, out: Tensor) -> dict[str, Tensor]:
        """The product into ``out`` (float32, contiguous); returns what the inputs became: ``codes``
        (tokens, stride) less half the levels, ``step`` (tokens,), ``sums`` (tokens, groups + 1); or
        ``values`` and ``value_sums`` of these shapes."""
        flat = x.detach().reshape(-1, self.columns).float().contiguous()
        tokens = flat.shape[0]
        if step is None:
            inputs = {
                "values": torch.empty(tokens, self.stride),
                "value_sums": torch.empty(tokens, self.groups + 1),
            }
        else:
            inputs = {
                "codes": torch.empty(tokens, self.stride, dtype=torch.int8),
                "step": step.detach().float().expand(*x.shape[:-1], 1).reshape(tokens).clone(),
                "sums": torch.empty(tokens, self.groups + 1, dtype=torch.int32),
            }
        struct = _Input(**{name: pointer(tensor) for name, tensor in inputs.items()})
        self._lib.maqd_linear(
            ctypes.byref(self.struct),
            pointer(flat),
            tokens,
            self.activation_levels or 0,
            ctypes.byref(struct),
            pointer(out),
            path_number(),
            self._threads(tokens),
        )
        return inputs


def embedding(
    ids: Tensor, words: Tensor, levels: int, columns: int, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """As ``reference.packed_embedding``; ``IndexError`` for an id outside the table."""
    lib = library()
    assert lib is not None
    flat = ids.reshape(-1).long().contiguous()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(words):
        raise IndexError(
            f"ids {int(flat.min())}..{int(flat.max())}: the table has {len(words)} rows"
        )
    out = torch.empty(*ids.shape, columns)
    lib.maqd_embedding(
        pointer(words.contiguous()),
        columns,
        levels,
        codes_per_word(levels),
        pointer(scale.contiguous()),
        pointer(None if offset is None else offset.contiguous()),
        pointer(flat),
        len(flat),
        pointer(out),
    )
    return out
