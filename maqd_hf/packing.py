"""Codes to int32 words and back: mixed radix, floor(32 / log2 M) codes a word.

The layout in one sentence: word ``j`` of a row holds codes ``j*c .. j*c+c-1`` (c = codes a word) as
the digits of an unsigned base-M number, first code least significant; the last word of a row is
filled with zero digits; words are stored as int32 with the bits of the unsigned number.

For M a power of two that divides the word this is plain bit packing. For the others it wastes less
than a bit field would: M=3 takes 20 codes a word, 1.6 bits a weight (the limit is log2 3 = 1.585).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import check_levels


def codes_per_word(levels: int) -> int:
    """How many base-``levels`` digits fit 32 bits.

    >>> [codes_per_word(m) for m in (2, 3, 4, 5, 7, 8, 16, 255, 256)]
    [32, 20, 16, 13, 11, 10, 8, 4, 4]
    """
    check_levels(levels)
    count = 1
    while levels ** (count + 1) <= 2**32:
        count += 1
    return count


def words_per_row(columns: int, levels: int) -> int:
    """Words that hold one row of ``columns`` codes (the last one padded)."""
    return -(-columns // codes_per_word(levels))


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    """Pack integer codes (..., columns), each in 0..levels-1, to int32 words (..., words).

    Raises ``ValueError`` when a code is out of range or (in a float tensor) no whole number: it
    would corrupt its neighbors.

    >>> pack_codes(torch.tensor([[1, 2, 3, 0, 1]]), levels=4).tolist()
    [[313]]
    """
    digits = codes_per_word(levels)
    if codes.is_floating_point() and not torch.equal(codes, codes.round()):
        raise ValueError(
            "codes hold NaN or fractions, allowed are whole numbers "
            f"0..{levels - 1}: quantize before packing"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= levels):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}, allowed are 0..{levels - 1}"
        )
    columns = codes.shape[-1]
    padded = torch.nn.functional.pad(
        codes.to(torch.int64), (0, words_per_row(columns, levels) * digits - columns)
    ).unflatten(-1, (-1, digits))
    words = padded[..., digits - 1].clone()
    for position in range(digits - 2, -1, -1):
        words.mul_(levels).add_(padded[..., position])
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_codes(words: Tensor, levels: int, columns: int) -> Tensor:
    """Codes (..., columns) as uint8 from int32 ``words`` (..., words): inverse of ``pack_codes``.

    Raises ``ValueError`` when the number of words does not fit ``columns``.
    """
    digits = codes_per_word(levels)
    expected = words_per_row(columns, levels)
    if words.shape[-1] != expected:
        raise ValueError(
            f"{words.shape[-1]} words a row, but {columns} codes of {levels} levels take "
            f"{expected}: the tensor was packed for another width or number of levels"
        )
    power_of_two = levels & (levels - 1) == 0
    out = torch.empty(*words.shape, digits, dtype=torch.uint8, device=words.device)
    # An unsigned word does not fit int32 arithmetic for odd radices; bit fields need no widening.
    rest = words if power_of_two else words.to(torch.int64) & 0xFFFFFFFF
    bits = levels.bit_length() - 1
    for position in range(digits):
        if power_of_two:
            out[..., position] = (rest >> (bits * position)) & (levels - 1)
        else:
            high = rest // levels
            out[..., position] = rest - high * levels
            rest = high
    return out.flatten(-2)[..., :columns]
