"""Laws of the packed products: the torch reference against plain matrices."""

from __future__ import annotations

import pytest
import torch

from maqd_hf import kernels
from maqd_hf.kernels import reference as torch_reference
from maqd_hf.packing import pack_codes


def packed_matrix(
    levels: int, rows: int, columns: int, groups: int, offset: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Words, scale, offset, and the float matrix they mean, one entry at a time."""
    codes = torch.randint(0, levels, (rows, columns))
    scale = torch.rand(rows, groups) + 0.5
    shift = torch.randn(rows, 1) if offset else None
    matrix = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            matrix[i, j] = (codes[i, j] - (levels - 1) / 2) * scale[i, j * groups // columns]
            if shift is not None:
                matrix[i, j] += shift[i, 0]
    return pack_codes(codes, levels), scale, shift, matrix


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (5, 21, 1), (7, 24, 3)])
@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16, 255, 256])
def test_unpack_linear_and_embedding_equal_the_plain_matrix(
    levels: int, rows: int, columns: int, groups: int, offset: bool
) -> None:
    words, scale, shift, matrix = packed_matrix(levels, rows, columns, groups, offset)
    assert torch.equal(kernels.unpack_weight(words, levels, columns, scale, shift), matrix)
    bias = torch.randn(rows)
    for lead in [(), (1,), (2, 3), (0,)]:
        x = torch.randn(*lead, columns)
        expected = torch.nn.functional.linear(x, matrix, bias)
        assert torch.equal(kernels.packed_linear(x, words, levels, scale, shift, bias), expected)
        ids = torch.randint(0, rows, lead)
        got = kernels.packed_embedding(ids, words, levels, columns, scale, shift)
        assert torch.equal(got, matrix[ids])


@pytest.mark.parametrize("block", [1, 24, 50, 10_000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_blocks_of_rows_change_the_result_by_rounding_at_most(
    with_bias: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of fewer rows may add up in another order: 1e-5."""
    words, scale, shift, matrix = packed_matrix(5, 7, 24, 2, True)
    bias = torch.randn(7) if with_bias else None
    x = torch.randn(2, 3, 24)
    monkeypatch.setattr(torch_reference, "_BLOCK", block)
    got = kernels.packed_linear(x, words, 5, scale, shift, bias)
    expected = torch.nn.functional.linear(x, matrix, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_block_of_weights_is_float_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, scale, _, _ = packed_matrix(16, 10, 24, 1, False)
    sizes: list[int] = []
    unpack = torch_reference.unpack_weight

    def counting(*args: object) -> torch.Tensor:
        weight = unpack(*args)  # type: ignore[arg-type]
        sizes.append(weight.numel())
        return weight

    monkeypatch.setattr(torch_reference, "_BLOCK", 72)
    monkeypatch.setattr(torch_reference, "unpack_weight", counting)
    torch_reference.packed_linear(torch.randn(1, 24), words, 16, scale)
    assert sizes == [72, 72, 72, 24]
    sizes.clear()
    torch_reference.packed_embedding(torch.tensor([3, 3]), words, 16, 24, scale, None)
    assert sizes == [48]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_follows_the_input_dtype(dtype: torch.dtype) -> None:
    words, scale, shift, matrix = packed_matrix(16, 5, 24, 1, True)
    x, bias = torch.randn(3, 24).to(dtype), torch.randn(5)
    got = kernels.packed_linear(x, words, 16, scale, shift, bias)
    assert got.dtype == dtype
    assert torch.equal(got, torch.nn.functional.linear(x, matrix.to(dtype), bias.to(dtype)))


def test_info_says_what_runs_and_why() -> None:
    assert {"linear", "embedding", "why"} <= set(kernels.info())
    assert all(kernels.info().values())
