"""Laws of the packed layout, against Python's big integers."""

from __future__ import annotations

import pytest
import torch

from maqd_hf.packing import (
    codes_per_word,
    pack_codes,
    unpack_codes,
    words_per_row,
)
from tests.support import reference

ALL_LEVELS = range(2, 257)


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_every_code_round_trips_at_every_kind_of_width(levels: int) -> None:
    digits = codes_per_word(levels)
    for columns in {1, digits - 1, digits, digits + 1, 2 * digits + 1, 37, max(levels, 2)}:
        if columns < 1:
            continue
        rows = -(-levels // columns) + 1
        codes = torch.arange(rows * columns).remainder(levels).view(rows, columns)
        words = pack_codes(codes, levels)
        assert words.dtype == torch.int32 and words.shape == (rows, words_per_row(columns, levels))
        assert words.tolist() == [reference.packed_row(row, levels) for row in codes.tolist()]
        back = unpack_codes(words, levels, columns)
        assert back.dtype == torch.uint8
        assert torch.equal(back.long(), codes)


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_a_word_holds_as_many_codes_as_fit_and_the_largest_word_is_all_top_codes(
    levels: int,
) -> None:
    digits = codes_per_word(levels)
    assert levels**digits <= 2**32 < levels ** (digits + 1)
    top = torch.full((1, digits), levels - 1)
    word = int(pack_codes(top, levels)) & 0xFFFFFFFF
    assert word == levels ** codes_per_word(levels) - 1
    assert torch.equal(unpack_codes(pack_codes(top, levels), levels, digits).long(), top)


@pytest.mark.parametrize("levels", [2, 3, 16, 255, 256])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3, 11), (7,), (1, 1), (2, 0, 4)])
def test_other_shapes_round_trip(shape: tuple[int, ...], levels: int) -> None:
    codes = torch.randint(0, levels, shape)
    words = pack_codes(codes, levels)
    assert words.shape == (*shape[:-1], words_per_row(shape[-1], levels))
    back = unpack_codes(words, levels, shape[-1])
    assert back.shape == shape and torch.equal(back.long(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32, torch.int64])
def test_codes_of_any_dtype_pack_alike(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 100, (3, 10))
    assert torch.equal(pack_codes(codes.to(dtype), 100), pack_codes(codes, 100))


@pytest.mark.parametrize("levels", [2, 3, 16, 255, 256])
@pytest.mark.parametrize("offence", [-1, None])
def test_codes_out_of_range_are_refused_by_value(levels: int, offence: int | None) -> None:
    codes = torch.zeros(2, 9, dtype=torch.int64)
    codes[1, 4] = levels if offence is None else offence
    with pytest.raises(ValueError, match=rf"codes span .*{codes[1, 4]}.*0\.\.{levels - 1}"):
        pack_codes(codes, levels)


@pytest.mark.parametrize("wrong", [float("nan"), 0.5])
def test_codes_that_are_no_whole_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="whole"):
        pack_codes(torch.tensor([[0.0, wrong]]), 4)


def test_words_of_another_width_or_radix_are_refused() -> None:
    words = pack_codes(torch.zeros(2, 100, dtype=torch.int64), 16)
    with pytest.raises(ValueError, match=r"13 words a row, but 105 codes of 16 levels take 14"):
        unpack_codes(words, 16, 105)
    with pytest.raises(ValueError, match="another width or number of levels"):
        unpack_codes(words, 4, 100)


def test_ternary_takes_1_6_bits_a_weight() -> None:
    assert 32 * words_per_row(1000, 3) / 1000 == 1.6
