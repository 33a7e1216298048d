"""The GPU's two kernels, in Triton: activation codes of a token, and the packed product.

``gpu.py`` imports this file when the first weight goes to a GPU, makes the layout and chooses the
block sizes; the layout is described there. With ``TRITON_INTERPRET=1`` the same source runs on CPU
tensors, which is how it is tested where there is no GPU.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

RUN = tl.constexpr(32)  # consecutive inputs that bytes hold at one bit position, as in gpu.py
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def quantize_tokens(
    x,  # (tokens, columns)
    step,  # (tokens,) or, with a stride of 0, (1,); 0, or None for all, asks for the token's own
    codes,  # out (tokens, codes_stride) int8: code - LEVELS // 2
    used_step,  # out (tokens,); NaN for a token that has no codes, as the reference makes its row
    sums,  # out (tokens,) int32: of the codes
    columns,
    x_stride,
    codes_stride,
    step_stride,
    LEVELS: tl.constexpr,
    CLIP_RATIO: tl.constexpr,  # of its absmax, what the grid of a token's own step covers
    BLOCK: tl.constexpr,
):
    """One program a token. Equal codes bit for bit: the division is IEEE's, ties go to even."""
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    codes += token * codes_stride
    center: tl.constexpr = (LEVELS - 1) / 2
    own = 0.0
    if step is not None:
        own = tl.load(step + token * step_stride).to(tl.float32)
    if own == 0:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            k = start + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.abs(tl.load(x + k, k < columns, 0.0).to(tl.float32)))
        own = tl.maximum(tl.div_rn(tl.max(most, 0), center) * CLIP_RATIO, _TINY)
    total = tl.zeros([BLOCK], tl.int32)
    missing = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        live = k < columns
        unit = tl.div_rn(tl.load(x + k, live, 0.0).to(tl.float32), own) + center
        missing |= (unit != unit).to(tl.int32)
        # within 0 .. 255 before it is rounded: the trick with _ROUND is exact there
        unit = tl.minimum(tl.maximum(tl.where(unit == unit, unit, 0.0), 0.0), LEVELS - 1.0)
        code = ((unit + _ROUND) - _ROUND).to(tl.int32) - LEVELS // 2
        tl.store(codes + k, code.to(tl.int8), live)
        total += tl.where(live, code, 0)
    tl.store(sums + token, tl.sum(total, 0))
    tl.store(used_step + token, tl.where(tl.max(missing, 0) > 0, float("nan"), own))


@triton.jit
def multiply(
    x,  # (tokens, x_stride): codes from quantize_tokens, or float activations
    weight,  # (rows, weight_stride) bytes
    scale,  # (groups, rows): the bits of bfloat16, or float32 if GROUP is 0
    offset,  # (rows,), read if HAS_OFFSET
    constant,  # (rows,), read if INTEGER: what even activation levels add
    bias,  # (rows,)
    step,  # (tokens,), or (tokens, groups) if GROUP_STEPS; read if INTEGER
    sums,  # (tokens,), read if INTEGER; if GROUP_STEPS in units of the steps
    y,  # out (tokens, rows)
    tokens,
    rows,
    columns,
    groups,
    x_stride,
    weight_stride,
    BITS: tl.constexpr,  # of a code: 2, 4 or 8
    TIMES: tl.constexpr,  # the factor of dot products is code * TIMES + PLUS: int8, or float
    PLUS: tl.constexpr,
    HALF: tl.constexpr,  # ... and 1/2 more, which int8 does not hold
    GROUP: tl.constexpr,  # inputs of a group; 0: one scale a row
    FLUSH: tl.constexpr,  # runs after which a group may end
    INTEGER: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_N: tl.constexpr,  # rows
    BYTES: tl.constexpr,  # of a row
):
    """``y = x @ W.T + bias`` for one tile: codes are unpacked on the way to the tensor cores, which
    add integers exactly (or floats in float32); scales, offset and bias follow."""
    PLANES: tl.constexpr = 8 // BITS
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    j = tl.arange(0, BYTES)
    some_m, some_n = m < tokens, n < rows
    spread = j // RUN * (RUN * PLANES) + j % RUN  # where byte j's first code stands in the input
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    inner = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    x_parts = tl.zeros([BLOCK_M, BYTES], ACCUMULATOR)  # sums to x: of a group if HALF, else of all
    for start in range(0, weight_stride, BYTES):
        at = weight + n[None, :] * weight_stride + (start + j)[:, None]
        packed = tl.load(at, some_n[None, :] & (start + j < weight_stride)[:, None], 0)
        for plane in tl.static_range(PLANES):
            k = start * PLANES + plane * RUN + spread
            value = tl.load(
                x + m[:, None] * x_stride + k[None, :],
                some_m[:, None] & (k < columns)[None, :],
                0,
            )
            code = packed
            if BITS < 8:
                code = (packed >> (BITS * plane)) & ((1 << BITS) - 1)
            if INTEGER:
                # in int8, where 8-bit codes wrap around to what is meant
                factor = code.to(tl.int8, bitcast=True) * TIMES + PLUS
                inner = tl.dot(value, factor, inner, out_dtype=tl.int32)
                if HALF:
                    x_parts += value.to(tl.int32)
            else:
                factor = (code.to(tl.float32) + PLUS).to(value.dtype)
                inner = tl.dot(value, factor, inner, input_precision="ieee")
                if HAS_OFFSET:
                    x_parts += value.to(tl.float32)
            if GROUP > 0 and (plane + 1) % FLUSH == 0:
                # beyond the columns there is no group, and nothing to multiply it with
                group = tl.minimum((start * PLANES + plane * RUN) // GROUP, groups - 1)
                half = tl.load(scale + group * rows + n, some_n, 0).to(tl.int32)
                worth = (half << 16).to(tl.float32, bitcast=True)
                part = inner.to(tl.float32)
                if HALF:
                    part += 0.5 * tl.sum(x_parts, 1).to(tl.float32)[:, None]
                    x_parts = tl.zeros([BLOCK_M, BYTES], ACCUMULATOR)
                if GROUP_STEPS:
                    part *= tl.load(step + m * groups + group, some_m, 0.0)[:, None]
                total += part * worth[None, :]
                inner = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    if GROUP == 0:
        total = inner.to(tl.float32)
        if HALF:
            total += 0.5 * tl.sum(x_parts, 1).to(tl.float32)[:, None]
        total *= tl.load(scale + n, some_n, 0.0)[None, :]
    if HAS_OFFSET:
        x_sum = tl.load(sums + m, some_m, 0).to(tl.float32) if INTEGER else tl.sum(x_parts, 1)
        total += x_sum[:, None] * tl.load(offset + n, some_n, 0.0)[None, :]
    if INTEGER:
        total += tl.load(constant + n, some_n, 0.0)[None, :]
        if not GROUP_STEPS:
            total *= tl.load(step + m, some_m, 0.0)[:, None]
    total += tl.load(bias + n, some_n, 0.0)[None, :]
    at = y + m[:, None] * rows + n[None, :]
    tl.store(at, total.to(y.dtype.element_ty), some_m[:, None] & some_n[None, :])
