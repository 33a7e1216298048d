"""Laws of the step search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maqd_hf.functional import gaussian_step, grid_center, scaled_round_clip
from maqd_hf.nn import step_search as search
from maqd_hf.nn.step_search import search_step


def squared_error(
    rows: Tensor, levels: int, step: Tensor, importance: Tensor | None = None
) -> Tensor:
    gap = (scaled_round_clip(rows, levels, step.unsqueeze(-1)) - rows).square()
    return (gap if importance is None else gap * importance).sum(-1)


def best_of_many(rows: Tensor, levels: int, importance: Tensor | None = None) -> Tensor:
    """The least error over 400 steps up to the full range: slow, dense."""
    full = rows.abs().amax(-1) / grid_center(levels)
    errors = [
        squared_error(rows, levels, full * ratio / 400, importance) for ratio in range(20, 441)
    ]
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("heavy_tail", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 4, 15, 16])
def test_search_comes_within_a_few_percent_of_a_dense_scan(levels: int, heavy_tail: bool) -> None:
    rows = torch.randn(12, 2, 64)
    if heavy_tail:
        rows[..., 0] *= 4
    error = squared_error(rows, levels, search_step(rows, levels)).sum()
    assert float(error) <= 1.05 * float(best_of_many(rows, levels).sum())


def test_importance_moves_the_step_to_the_inputs_that_matter() -> None:
    rows = torch.randn(20, 1, 64)
    rows[..., :4] *= 12
    outliers = torch.full((1, 64), 1e-3)
    outliers[:, :4] = 1.0
    for importance in (outliers, 1 / outliers):
        error = squared_error(rows, 16, search_step(rows, 16, importance), importance).sum()
        assert float(error) <= 1.1 * float(best_of_many(rows, 16, importance).sum())
        plain = squared_error(rows, 16, search_step(rows, 16), importance).sum()
        assert error <= plain
    assert bool((search_step(rows, 16, 1 / outliers) < search_step(rows, 16, outliers)).all())


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 255])
def test_rows_on_a_grid_are_found_exactly_or_nearly(levels: int) -> None:
    codes = torch.randint(0, levels, (8, 1, 400)) - grid_center(levels)
    codes[..., 0], codes[..., 1] = grid_center(levels), -grid_center(levels)
    rows = codes * 0.03
    assert float(squared_error(rows, levels, search_step(rows, levels)).max()) < 1e-9


def test_gaussian_rows_get_the_gaussian_step() -> None:
    rows = torch.randn(1, 1, 100_000)
    assert float(search_step(rows, 4)) == pytest.approx(gaussian_step(4), rel=0.03)


@pytest.mark.parametrize("levels", [2, 3, 16])
def test_zero_groups_stay_zero(levels: int) -> None:
    rows = torch.randn(2, 2, 8)
    rows[1, 0] = 0
    step = search_step(rows, levels)
    assert bool((step > 0).all())
    values = scaled_round_clip(rows, levels, step.unsqueeze(-1))
    assert float(values[1, 0].abs().max()) <= 1e-6


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, importance = torch.randn(7, 3, 16), torch.rand(3, 16)
    whole = search_step(rows, 8, importance)
    monkeypatch.setattr(search, "_CHUNK", 100)
    assert torch.equal(search_step(rows, 8, importance), whole)


def test_rows_are_searched_independently_and_follow_their_scale() -> None:
    rows = torch.randn(5, 2, 32)
    scaled = rows * torch.tensor([1.0, 2, 4, 0.5, 0.25]).view(5, 1, 1)  # powers of two: exact
    factor = torch.tensor([1.0, 2, 4, 0.5, 0.25]).view(5, 1)
    assert torch.equal(search_step(scaled, 7), search_step(rows, 7) * factor)
    assert torch.equal(search_step(rows[2:3], 7), search_step(rows, 7)[2:3])


def test_no_rows_is_no_step() -> None:
    assert search_step(torch.empty(0, 2, 8), 4).shape == (0, 2)
