"""What the compiled library makes of a layer's inputs, which only its products see otherwise."""

import ctypes

import torch
from torch import Tensor

from maqd_hf.kernels import NativeWeight, loader
from maqd_hf.kernels.native import STORAGES


class InputStruct(ctypes.Structure):
    """``maqd_input`` of internal.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "step", "group_step", "sums", "values")),
        *((name, ctypes.c_int64) for name in ("tile", "run")),
    ]


def take(weight: NativeWeight, x: Tensor, step: Tensor) -> dict[str, Tensor]:
    """What products see instead of ``x`` (tokens, columns), given ``step`` (tokens,).

    These are ``codes`` (tokens, padded columns) less half the levels, ``step``, ``sums`` (tokens,
    groups + 1) and, with ``group_steps``, the ``group_step`` (tokens, groups).
    """
    inputs = {storage.bits: storage.inputs for storage in STORAGES.values()}
    tokens, stride = len(x), weight.struct.units * inputs[weight.struct.bits]
    assert x.shape == (tokens, weight.columns) and step.shape == (tokens,)
    assert weight.activation_levels is not None
    taken = {
        "codes": torch.empty(tokens, stride, dtype=torch.int8),
        "step": step.detach().float().clone(),
        "sums": torch.empty(tokens, weight.groups + 1),
    }
    if weight.group_steps:
        taken["group_step"] = torch.empty(tokens, weight.groups)
    names = ("codes", "step", "group_step", "sums")
    struct = InputStruct(*(loader.pointer(taken.get(name)) for name in names), None, 1, 4)
    x, rotated = x.detach().float().contiguous(), torch.empty(weight.columns)
    entry = loader.loaded().maqd_take_inputs
    entry.restype = None
    entry(
        ctypes.byref(weight.struct),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(tokens),
        ctypes.c_int32(weight.activation_levels),
        ctypes.byref(struct),
        ctypes.c_void_p(rotated.data_ptr()),
        ctypes.c_int32(loader.isa_number()),
    )
    return taken
