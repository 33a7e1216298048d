"""Packed layers on an NVIDIA GPU: the layout, the block sizes, the calls of ``gpu_kernels``.

Layout in one sentence: byte ``j`` of a row holds, from bit ``b * p`` on, the code of input
``(j // 32) * 32 * P + 32 * p + j % 32``, where b = 2, 4 or 8 bits store a code and P = 8 / b.

Weights are repacked to it once, on the device. The file's words would not do: 20, 13 or 11 codes a
word (M = 3, 5, 7) want a division each and end anywhere in a tile, while these bytes are loaded
once, contiguously, and one shift and mask turns the tile into 32 consecutive inputs of every row,
the depth of one int8 tensor-core instruction. Bytes and not int32 words, since a row is filled up
to 32 * P inputs only. The price is a second copy of the weights, of 2, 4 or 8 bits a code.

With c' = code - M // 2 (weights), q' likewise (activations), h = 1/2 for even M, else 0:

    y = step * (sum_g s_g sum (c' + h_w) q'  +  offset * sum q'  +  constant) + bias

``constant`` holds what h of the activations adds. For even M up to 128 the tensor cores get
2 c' + 1 instead, with half the scale, which makes h_w vanish. Float activations take the place of
q' with a step of 1, and the codes less their center become float: exact in bfloat16 too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..functional import grid_center, scale_dtype
from ..packing import unpack_codes
from .reference import half_a_code

RUN = 32  # consecutive inputs that bytes hold at one bit position
_CODES = 1 << 22  # codes that are unpacked at a time while repacking


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one launch: tokens, rows, bytes of a row, warps, stages of prefetching."""

    tokens: int
    rows: int
    bytes: int
    warps: int
    stages: int


TILES = {
    16: Tiles(16, 16, 128, 4, 4),  # few tokens: many programs, each with much to load ahead
    64: Tiles(64, 64, 32, 4, 4),
    None: Tiles(128, 64, 32, 8, 3),
}
FLOAT32_TILES = {16: Tiles(16, 16, 64, 4, 4), None: Tiles(32, 32, 32, 4, 3)}
"""Block sizes up to this many tokens, and for more; float32 is multiplied without tensor cores and
takes more registers. A table instead of tuning at run time: a first call costs no search, and equal
inputs add up in equal order. All of them fit sm_80 and sm_90 (no registers are spilled, at most 80
KiB of shared memory); ``scripts/bench/gpu.py --tiles`` times others."""


def tiles_for(tokens: int, float32: bool) -> Tiles:
    """The block sizes for so many tokens; ``float32``: of activations that are not quantized."""
    table = FLOAT32_TILES if float32 else TILES
    return next(tiles for most, tiles in table.items() if most is None or tokens <= most)


def storage_bits(levels: int) -> int:
    """Bits a code takes in the layout: 2, 4 or 8."""
    return 2 if levels <= 4 else 4 if levels <= 16 else 8


def stride(columns: int, levels: int) -> int:
    """Bytes of a row."""
    return -(-columns // (RUN * 8 // storage_bits(levels))) * RUN


def fits(columns: int, groups: int) -> bool:
    """Whether the kernel covers this shape: groups must consist of whole runs, and the int32 sum of
    a row must hold ``columns`` products of -128 by -128."""
    return columns < 1 << 17 and (groups == 1 or (columns // groups) % RUN == 0)


@lru_cache
def missing(device: torch.device) -> str | None:
    """Why packed layers on ``device`` use the torch reference, or None if Triton serves them."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "the kernels were written for CUDA; this is a build for ROCm"
    if find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """Imported when the first weight needs them: Triton is optional and no quick import."""
    return import_module(".gpu_kernels", __package__)


def repack(words: Tensor, levels: int, columns: int) -> Tensor:
    """Dense words (rows, words) of ``packing`` to this file's layout: (rows, ``stride``) uint8."""
    bits = storage_bits(levels)
    planes, width = 8 // bits, stride(columns, levels)
    out = torch.zeros(len(words), width, dtype=torch.uint8, device=words.device)
    block = max(1, _CODES // columns)
    for start in range(0, len(words), block):
        codes = unpack_codes(words[start : start + block], levels, columns)
        padded = torch.nn.functional.pad(codes, (0, width * planes - columns))
        runs = padded.view(len(codes), -1, planes, RUN)
        for plane in range(planes):
            out[start : start + block].view(len(codes), -1, RUN).bitwise_or_(
                runs[:, :, plane] << (bits * plane)
            )
    return out


class GpuWeight:
    """One layer's weight in the GPU's layout, and its product with inputs.

    Args and call as for ``NativeWeight``; the tensors are on the GPU. A token with a NaN, or with
    an infinity and a step of its own, gets a row of NaN, as from the torch reference.
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
        activation_clip_ratio: float = 1.0,
        group_steps: bool = False,
    ) -> None:
        self.rows, self.columns, self.groups = words.shape[0], columns, scale.shape[1]
        self.levels, self.activation_levels = levels, activation_levels
        self.activation_clip_ratio = activation_clip_ratio
        self.group_steps = group_steps and self.groups > 1
        self.codes = repack(words, levels, columns)
        scales = scale.detach().to(scale_dtype(self.groups)).t().contiguous()
        zeros = torch.zeros(self.rows, device=scale.device)
        self.offset = None if offset is None else offset.detach().float().flatten()
        self.bias = zeros if bias is None else bias.detach().float()
        self.constant = zeros
        if activation_levels is not None and activation_levels % 2 == 0:
            self.constant = half_a_code(words, levels, columns, scale, offset)
        self.times, self.plus, self.half = 1, -(levels // 2), levels % 2 == 0
        if self.activation_levels is not None and self.half and levels <= 128:
            self.times, self.plus, self.half = 2, 1 - levels, False
            scales = scales / 2
        # their 16 bits as an integer: Triton's interpreter knows no bfloat16
        self.scale = scales if self.groups == 1 else scales.view(torch.int16)

    def __call__(self, x: Tensor, step: Tensor | None, tiles: Tiles | None = None) -> Tensor:
        """``x`` (..., columns) times the weight -> (..., rows), in ``x``'s dtype.

        ``step``: as for ``NativeWeight``; None with activation levels: every token has its own.
        ``tiles``: other block sizes than ``TILES`` has.
        """
        with torch.cuda.device_of(x):
            flat = x.detach().reshape(-1, self.columns).contiguous()
            out = x.new_empty(len(flat), self.rows)
            floats = self.activation_levels is None
            tiles = tiles or tiles_for(len(flat), floats and x.dtype == torch.float32)
            if floats:
                self._multiply(flat, None, None, out, tiles)
            else:
                if step is not None and step.numel() > 1:
                    step = step.expand(*x.shape[:-1], 1)
                self._multiply(*self.quantize(flat, step), out, tiles)
            return out.view(*x.shape[:-1], self.rows)

    def quantize(self, x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (tokens, ...) less half the levels, steps (tokens,) and the codes' sums (tokens,)
        of ``x`` (tokens, columns).

        With ``group_steps`` the steps are (tokens, groups), and the sums are in units of them.
        """
        tokens = len(x)
        width = self.columns // self.groups if self.group_steps else self.columns
        x = x.view(-1, width)  # a row for every step
        # the rows are filled up to where every one of them is aligned; groups are already
        codes = x.new_empty(len(x), -(-width // RUN) * RUN, dtype=torch.int8)
        used, sums = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.int)
        given = None if step is None else step.detach().reshape(-1).contiguous()
        block = min(4096, 1 << (width - 1).bit_length())
        _kernels().quantize_tokens[(len(x),)](
            x,
            given,
            codes,
            used,
            sums,
            width,
            width,
            codes.shape[1],
            0 if given is None or len(given) == 1 else 1,
            LEVELS=self.activation_levels,
            CLIP_RATIO=self.activation_clip_ratio,
            BLOCK=block,
            num_warps=4 if block <= 1024 else 8,
        )
        if not self.group_steps:
            return codes, used, sums
        used = used.view(tokens, self.groups)
        return codes.view(tokens, self.columns), used, (used * sums.view_as(used)).sum(1)

    def constants(self, integer: bool, tiles: Tiles) -> dict[str, int | float | bool]:
        """What the product of codes (or floats) by this weight is compiled for."""
        bits = storage_bits(self.levels)
        inputs = RUN * 8 // bits  # of the RUN bytes that make up a chunk
        group = 0 if self.groups == 1 else self.columns // self.groups
        whole = group % (inputs * tiles.bytes // RUN) == 0  # no group ends within a tile
        return {
            "BITS": bits,
            "TIMES": self.times,
            "PLUS": self.plus if integer else -grid_center(self.levels),
            "HALF": integer and self.half,
            "GROUP": group,
            "FLUSH": math.gcd(group, inputs) // RUN if group else 1,
            "INTEGER": integer,
            "GROUP_STEPS": integer and self.group_steps,
            "HAS_OFFSET": self.offset is not None,
            "BLOCK_M": tiles.tokens,
            "BLOCK_N": tiles.rows,
            "BYTES": tiles.bytes if whole else RUN,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def _multiply(
        self, x: Tensor, step: Tensor | None, sums: Tensor | None, out: Tensor, tiles: Tiles
    ) -> None:
        grid = (-(-len(x) // tiles.tokens), -(-self.rows // tiles.rows))
        _kernels().multiply[grid](
            x,
            self.codes,
            self.scale,
            self.offset,
            self.constant,
            self.bias,
            step,
            sums,
            out,
            len(x),
            self.rows,
            self.columns,
            self.groups,
            x.shape[1],
            self.codes.shape[1],
            **self.constants(step is not None, tiles),
        )
