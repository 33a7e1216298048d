"""The compiled library's structures and entries in ctypes: what ``csrc/maqd.h`` says in C.

Both are spelled twice, since nothing generates one from the other. ``mismatch`` compares the sizes
of the structures with those the library was built with; ``declare`` says what entries take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

_POINTER, _FLOAT = ctypes.c_void_p, ctypes.c_float
_I64, _I32 = ctypes.c_int64, ctypes.c_int32


def _fields(kind: Any, names: str) -> Iterable[tuple[str, Any]]:
    return ((name, kind) for name in names.split())


class WeightStruct(ctypes.Structure):
    """``maqd_weight``."""

    _fields_ = [
        *_fields(_POINTER, "codes scale offset constant bias"),
        *_fields(_I64, "rows columns groups units"),
        ("bits", _I32),
        *_fields(_FLOAT, "zero clip_ratio"),
        *_fields(_I32, "group_steps rotation"),
    ]


class TableStruct(ctypes.Structure):
    """``maqd_table``."""

    _fields_ = [
        *_fields(_POINTER, "words scale offset"),
        ("columns", _I64),
        *_fields(_I32, "levels digits"),
        ("output_scale", _FLOAT),
    ]


class NormStruct(ctypes.Structure):
    """``maqd_norm``."""

    _fields_ = [
        *_fields(_POINTER, "weight bias"),
        ("features", _I64),
        *_fields(_FLOAT, "eps constant first_factor"),
        *_fields(_I32, "token own_first centered"),
    ]


class LinearStruct(ctypes.Structure):
    """``maqd_linear_plan``."""

    _fields_ = [
        ("weight", ctypes.POINTER(WeightStruct)),
        ("step", _FLOAT),
        *_fields(_I32, "levels own_first"),
    ]


class BlockStruct(ctypes.Structure):
    """``maqd_block_plan``."""

    _fields_ = [
        *_fields(NormStruct, "input_norm post_norm query_norm key_norm"),
        *_fields(LinearStruct, "q k v o gate up down"),
        *_fields(_I64, "window rope"),
    ]


class DecoderStruct(ctypes.Structure):
    """``maqd_decoder``."""

    _fields_ = [
        *_fields(_I64, "blocks hidden heads kv_heads head_dim intermediate"),
        *_fields(_FLOAT, "attention_scale rope_scale"),
        ("frequencies", _POINTER),
        ("block", ctypes.POINTER(BlockStruct)),
        ("norm", NormStruct),
        ("table", ctypes.POINTER(TableStruct)),
        ("head", LinearStruct),
        *_fields(_I32, "floats group_steps activation"),
    ]


class CallStruct(ctypes.Structure):
    """``maqd_call``."""

    _fields_ = [
        *_fields(_I64, "batch tokens past capacity value_stride"),
        *_fields(_POINTER, "hidden ids logits positions first mask keys values"),
        *_fields(_POINTER, "key_scales value_scales"),
    ]


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    WeightStruct,
    TableStruct,
    NormStruct,
    LinearStruct,
    BlockStruct,
    DecoderStruct,
    CallStruct,
)
"""In the order of ``maqd_struct_size``."""

_p, _f, _l, _i, _s = _POINTER, _FLOAT, _I64, _I32, ctypes.c_char_p
ENTRIES: dict[str, tuple[Any, list[Any]]] = {
    "maqd_struct_size": (_l, [_i]),
    "maqd_isas": (_i, []),
    "maqd_isa_name": (_s, [_i]),
    "maqd_supported": (_i, [_i]),
    "maqd_asked_isa": (_s, []),
    "maqd_repack": (None, [_p, _l, _l, _i, _i, _i, _p, _i]),
    "maqd_linear": (_i, [_p, _p, _l, _i, _p, _l, _p, _i, _i]),
    "maqd_decode": (_i, [_p, _p, _i, _i]),
    "maqd_embedding": (None, [_p, _p, _l, _p]),
    "maqd_normalize": (None, [_p, _p, _p, _l, _p, _i, _i]),
    "maqd_hadamard": (None, [_p, _p, _l, _l, _l, _i, _i]),
    "maqd_compensate": (None, [_p] * 6 + [_l, _l, _l, _i]),
    "maqd_descend": (None, [_p] * 8 + [_l, _l, _l, _i]),
    "maqd_fake_quantize": (None, [_p] * 5 + [_l, _l, _l, _i, _i, _i]),
    "maqd_fake_quantize_backward": (None, [_p] * 7 + [_l, _l, _l, _i, _i, _i]),
    "maqd_round_tokens": (None, [_p, _p, _l, _l, _f, _i, _i, _i, _i]),
    "maqd_divergence": (None, [_p, _p, _p, _l, _l, _f, _f, _i]),
}
"""What every entry returns, and what it takes."""


def mismatch(lib: ctypes.CDLL) -> str | None:
    """Why ``lib`` and this package do not belong together, or None: an entry is missing, or a
    structure has another size there."""
    missing = [name for name in ENTRIES if not hasattr(lib, name)]
    if missing:
        return f"it lacks {', '.join(missing)}"
    size = lib.maqd_struct_size
    size.restype = _I64
    theirs: list[int] = []
    while found := size(len(theirs)):
        theirs.append(found)
    ours = [ctypes.sizeof(struct) for struct in STRUCTS]
    if theirs != ours:
        names = ", ".join(struct.__name__ for struct in STRUCTS)
        return f"its structures ({names}) take {theirs} bytes, those of this package {ours}"
    return None


def declare(lib: ctypes.CDLL) -> None:
    """Say what the entries of ``lib`` take and return."""
    for name, (restype, argtypes) in ENTRIES.items():
        entry = getattr(lib, name)
        entry.restype, entry.argtypes = restype, argtypes
