"""Packed matrix products: the one place that decides which implementation runs.

``packed_linear`` and ``packed_embedding`` are what the packed layers call. ``info`` says what runs
and why. The torch reference is always there and is the oracle for every other path.
"""

from __future__ import annotations

from .reference import packed_embedding, packed_linear, unpack_weight

__all__ = ["info", "packed_embedding", "packed_linear", "unpack_weight"]


def info() -> dict[str, str]:
    """Which implementation serves packed layers on this machine, and why.

    >>> info()["linear"]
    'torch reference'
    """
    return {
        "linear": "torch reference",
        "embedding": "torch reference",
        "why": "no native kernel is part of this version: weights are unpacked row block by row "
        "block at every call, so memory stays packed and speed is that of unpacking",
    }
