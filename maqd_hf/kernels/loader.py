"""The compiled CPU library: finding it, choosing its path, memory for it.

The library is plain C (``csrc``) built by the package's own build and called through ctypes on data
pointers. Where it is missing the torch reference serves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

PATH_VARIABLE = "MAQD_KERNEL"
LIBRARY_VARIABLE = "MAQD_LIBRARY"  # another build of the library, as `.ci/sanitize` makes one
# Of tensors the library reads and writes, whatever torch's own defaults are.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if the package was installed without a compiler."""
    given = os.environ.get(LIBRARY_VARIABLE)
    found = [Path(given)] if given else sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    p, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.maqd_path_name.restype = lib.maqd_asked_path.restype = ctypes.c_char_p
    lib.maqd_repack.argtypes = [p, i64, i64, i32, i32, i32, p, i32]
    lib.maqd_linear.argtypes = [p, p, i64, i32, p, i64, p, i32, i32]
    lib.maqd_take_inputs.argtypes = [p, p, i64, i32, p, p, i32]
    lib.maqd_embedding.argtypes = [p, p, i64, p]
    lib.maqd_normalize.argtypes = [p, p, p, i64, p, i32, i32]
    for name in ("repack", "take_inputs", "embedding", "normalize"):
        getattr(lib, f"maqd_{name}").restype = None
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
    lib = library()
    if lib is None:
        wanted = os.environ.get(PATH_VARIABLE)
    else:
        asked = lib.maqd_asked_path()
        wanted = None if asked is None else asked.decode()
    if wanted is None:
        return next(reversed(paths()), None)
    if wanted == "reference":
        return None
    if wanted not in paths():
        raise ValueError(
            f"{PATH_VARIABLE}={wanted!r}: this machine and build run {['reference', *paths()]}"
        )
    return wanted


def path_number() -> int:
    """The chosen path as the library counts; only where there is one."""
    path = chosen_path()
    assert path is not None
    return paths()[path]


def reads(*tensors: Tensor) -> bool:
    """Whether a library is chosen and these are plain CPU tensors that nobody traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or chosen_path() is None:
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors)


# Elements that a pass reads once, below which waking a second thread costs more than it brings.
_PARALLEL = 1 << 18


def threads_for(elements: int) -> int:
    """Threads for one pass over so many elements."""
    return torch.get_num_threads() if elements >= _PARALLEL else 1


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    return None if tensor is None else int(tensor.data_ptr())


def run(name: str, tensors: Sequence[Tensor | None], *numbers: Any) -> None:
    """Call an entry that returns nothing: data of contiguous ``tensors``, then ctypes numbers."""
    function = getattr(library(), name)
    function.restype = None
    function(*(ctypes.c_void_p(pointer(t)) for t in tensors), *numbers)


class _Arena:
    """Memory for codes, in large pieces on huge pages: layers that are made one after the other lie
    so, and reading on from one to the next neither misses the page table nor stops the prefetcher.

    A piece is freed with the last of the layers in it.
    """

    piece = 1 << 25
    _huge = 1 << 21

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._lock = Lock()

    def zeros(self, count: int) -> Tensor:
        """``count`` bytes, aligned to a cache line; zero."""
        count = -(-count // 64) * 64
        with self._lock:
            if count > len(self._rest):
                size = max(count, self.piece)
                memory = torch.empty(size + self._huge, dtype=torch.uint8, device="cpu")
                skip = -memory.data_ptr() % self._huge
                self._rest = memory[skip : skip + size]
                _advise(self._rest, 14)  # Linux: MADV_HUGEPAGE
            taken, self._rest = self._rest[:count], self._rest[count:]
        return taken.zero_()


def _advise(memory: Tensor, advice: int, align: int = mmap.PAGESIZE) -> None:
    """madvise(2) on the whole pages of ``memory``, where the system has it."""
    libc = ctypes.CDLL(None)
    start = -(-memory.data_ptr() // align) * align
    size = memory.data_ptr() + memory.nbytes - start
    if hasattr(libc, "madvise") and size > 0:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size // align * align), advice)


def release(tensor: Tensor) -> None:
    """Say that ``tensor`` is not needed soon. Nothing is lost: what came from a file is read from
    there again when it is touched (Linux: MADV_PAGEOUT is 21; elsewhere nothing happens)."""
    if tensor.device.type == "cpu":
        _advise(tensor, 21)


arena = _Arena()
