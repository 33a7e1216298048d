"""The compiled CPU library: finding it, choosing its instruction set ("isa"), memory for it.

The library is plain C (``csrc``) built by the package's own build and called through ctypes on data
pointers. Where it is missing the torch reference serves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from . import abi

KERNEL_VARIABLE = "MAQD_KERNEL"
LIBRARY_VARIABLE = "MAQD_LIBRARY"  # another build of the library, as `.ci/sanitize` makes one
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Options of tensors the library reads and writes, whatever torch's own defaults are."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library; None if the package was installed without a compiler, or if the one
    that is there was built from other sources (a warning says so).

    Raises:
        RuntimeError: the environment variable MAQD_LIBRARY names one from other sources.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    found = [Path(given)] if given else sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    problem = abi.mismatch(lib)
    if problem is None:
        abi.declare(lib)
        return lib
    message = f"{found[0]} was built from other sources than this package: {problem}"
    if given:
        raise RuntimeError(f"{message}; build it anew or unset {LIBRARY_VARIABLE}")
    warnings.warn(
        f"{message}. Packed layers run on the slow torch reference until the package is installed "
        "again (in a checkout: python setup.py build_ext --inplace --force)",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


@lru_cache(maxsize=1)
def isas() -> dict[str, int]:
    """The number of every instruction set that the library was built for and this machine runs,
    slowest first."""
    lib = library()
    if lib is None:
        return {}
    return {
        lib.maqd_isa_name(i).decode(): i for i in range(lib.maqd_isas()) if lib.maqd_supported(i)
    }


def chosen_isa() -> str | None:
    """The instruction set that runs: the best one, or what the environment variable MAQD_KERNEL
    names; None: the torch reference does.

    ``MAQD_KERNEL=reference`` switches the library off. ``ValueError`` for an unknown name.
    """
    lib = library()
    if lib is None:
        wanted = os.environ.get(KERNEL_VARIABLE)
    else:
        asked = lib.maqd_asked_isa()
        wanted = None if asked is None else asked.decode()
    if wanted is None:
        return next(reversed(isas()), None)
    if wanted == "reference":
        return None
    if wanted not in isas():
        raise ValueError(
            f"{KERNEL_VARIABLE}={wanted!r}: this machine and build run {['reference', *isas()]}"
        )
    return wanted


def isa_number() -> int:
    """The chosen instruction set as the library counts; ``RuntimeError`` where there is none."""
    isa = chosen_isa()
    if isa is None:
        raise RuntimeError(f"the compiled library is missing, or {KERNEL_VARIABLE} switches it off")
    return isas()[isa]


# Elements that a pass reads once, below which waking a second thread costs more than it brings.
_PARALLEL = 1 << 18


def threads_for(elements: int) -> int:
    """Threads for one pass over so many elements."""
    return torch.get_num_threads() if elements >= _PARALLEL else 1


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    return None if tensor is None else int(tensor.data_ptr())


def loaded() -> ctypes.CDLL:
    """The compiled library; ``RuntimeError`` where there is none (ask ``serving`` first)."""
    lib = library()
    if lib is None:
        raise RuntimeError("this package was installed without its compiled library")
    return lib


def call(name: str, *arguments: Any) -> Any:
    """Call an entry of ``abi.ENTRIES``: a contiguous tensor gives the address of its data, a
    structure its own."""
    return getattr(loaded(), name)(*map(_passed, arguments))


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


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
