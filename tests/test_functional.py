"""Laws of the grid, the round-clip, the surrogates, standardization and the weight's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maqd_hf import functional as F
from tests.support import reference

ALL_LEVELS = range(F.MIN_LEVELS, F.MAX_LEVELS + 1)
SOME_LEVELS = [2, 3, 4, 5, 16, 255, 256]


def random_steps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=dtype) + 0.3


# ------------------------------------------------------------------------------------------ grid


@pytest.mark.parametrize("levels", [0, 1, 257, -4, 4.0, True, "4", None])
def test_levels_outside_2_to_256_are_refused_by_value(levels: object) -> None:
    with pytest.raises(ValueError, match=f"weight_levels={levels!r}.*levels"):
        F.check_levels(levels, "weight_levels")  # type: ignore[arg-type]


def test_every_grid_has_exactly_its_levels_symmetric_about_zero() -> None:
    for levels in ALL_LEVELS:
        x = torch.linspace(-levels, levels, 40 * levels + 1)
        values = F.scaled_round_clip(x, levels, 1.0).unique()
        assert values.tolist() == reference.level_values(levels)
        assert torch.equal(values, -values.flip(0))


@pytest.mark.parametrize("step", [0.037, 1.0, 250.0])
@pytest.mark.parametrize("levels", SOME_LEVELS)
def test_round_clip_is_the_nearest_level_and_the_sum_of_heavisides(
    levels: int, step: float
) -> None:
    x = torch.randn(300, dtype=torch.float64) * step * levels / 3
    codes = F.quantize(x, levels, step)
    assert codes.tolist() == [reference.nearest_code(v / step, levels) for v in x.tolist()]
    torch.testing.assert_close(
        F.scaled_round_clip(x, levels, step), reference.round_clip(x, levels, step)
    )


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_round_clip_is_idempotent_monotone_and_exact_in_range(levels: int) -> None:
    step = 0.1 + torch.rand(()).item()
    x = (torch.rand(2000) * 2.4 - 1.2).mul_(step * levels / 2).sort().values
    y = F.scaled_round_clip(x, levels, step)
    assert torch.equal(F.scaled_round_clip(y, levels, step), y)
    assert bool((y.diff() >= 0).all())
    top = torch.tensor(F.grid_center(levels)) * torch.tensor(step)
    assert y[-1] == top and y[0] == -top
    inside = x.abs() <= step * levels / 2
    assert float((y - x)[inside].abs().max()) <= step / 2 * (1 + 1e-4)


def test_dequantize_inverts_quantize_on_every_code() -> None:
    for levels in ALL_LEVELS:
        codes = torch.arange(levels)
        values = F.dequantize(codes, levels, 0.37)
        assert torch.equal(F.quantize(values, levels, 0.37), codes.float())
    assert codes.tolist() == list(range(256))  # the argument is not written to


def test_quantize_leaves_its_argument_alone() -> None:
    x = torch.randn(8)
    before = x.clone()
    F.quantize(x, 4, 1.0)
    F.dequantize(x, 4, 2.0)
    assert torch.equal(x, before)


def test_gaussian_step_matches_the_known_uniform_quantizers_of_a_gaussian() -> None:
    half_ranges = {2: 0.80, 3: 1.22, 4: 1.49, 8: 2.05, 16: 2.51}
    for levels, half_range in half_ranges.items():
        assert F.gaussian_step(levels) * (levels - 1) / 2 == pytest.approx(half_range, abs=0.012)
    sample = torch.randn(200_000, dtype=torch.float64)
    for levels, error in {2: 0.363, 4: 0.119, 16: 0.0115}.items():
        gap = F.scaled_round_clip(sample, levels, F.gaussian_step(levels)) - sample
        assert float(gap.square().mean()) == pytest.approx(error, rel=0.05)


def test_token_step_clips_nothing_and_survives_a_zero_token() -> None:
    x = torch.randn(3, 5, 16)
    x[1, 2] = 0
    for levels in SOME_LEVELS:
        step = F.token_step(x, levels)
        assert step.shape == (3, 5, 1)
        y = F.scaled_round_clip(x, levels, step)
        assert float(y[1, 2].abs().max()) < 1e-30
        torch.testing.assert_close(y.abs().amax(-1), x.abs().amax(-1))


@pytest.mark.parametrize("levels", SOME_LEVELS)
@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_a_clipped_token_reaches_that_share_of_its_absmax(levels: int, ratio: float) -> None:
    x = torch.randn(3, 5, 64)
    y = F.round_tokens(x, levels, ratio)
    torch.testing.assert_close(y.abs().amax(-1), ratio * x.abs().amax(-1))
    assert torch.equal(F.round_tokens(4 * x, levels, ratio), 4 * y)
    step = F.token_step(x, levels, ratio)
    assert torch.equal(y, F.scaled_round_clip(x, levels, step))
    inside = x.abs() <= step * levels / 2
    assert float((y - x)[inside].abs().max()) <= float(step.max()) / 2 * (1 + 1e-6)


def test_few_levels_lose_less_of_a_gaussian_when_its_ends_are_clipped() -> None:
    x = torch.randn(50, 512)
    errors = {
        (m, r): float((F.round_tokens(x, m, r) - x).norm()) for m in (15, 255) for r in (1, 0.8)
    }
    assert errors[15, 0.8] < 0.9 * errors[15, 1]
    assert errors[255, 0.8] > errors[255, 1]


def test_all_of_the_gradient_of_a_clipped_token_passes() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(F.round_tokens(x, 7, 0.5).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


# ------------------------------------------------------------------------------------ surrogates


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("name", sorted(F.SURROGATES))
def test_surrogate_and_step_gradients_equal_the_loops(name: str, levels: int) -> None:
    x = torch.randn(4, 30, dtype=torch.float64) * levels / 2
    x.requires_grad_()
    step = random_steps(4, 1).requires_grad_()
    incoming = torch.randn(4, 30, dtype=torch.float64)
    y = F.scaled_round_clip(x, levels, step, name)
    grad_x, grad_step = torch.autograd.grad(y, (x, step), incoming)

    slopes = torch.empty_like(grad_x)
    steps = torch.zeros_like(grad_step)
    for i in range(4):
        s = step[i].item()
        for j in range(30):
            slopes[i, j] = reference.surrogate(name, x[i, j].item() / s, levels)
            steps[i] += incoming[i, j] * reference.step_gradient(name, x[i, j].item(), s, levels)
    torch.testing.assert_close(grad_x, incoming * slopes, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_step, steps, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["triangle", "sigmoid", "arctan", "tanh"])
def test_a_single_threshold_surrogate_has_area_one(name: str) -> None:
    u = torch.linspace(-4000, 4000, 8_000_01, dtype=torch.float64)
    area = float(torch.trapezoid(F.SURROGATES[name](u, 2), u))
    assert area == pytest.approx(1.0, abs=2e-4)


def test_surrogates_need_no_step_gradient_and_skip_it() -> None:
    x = torch.randn(5, requires_grad=True)
    F.scaled_round_clip(x, 4, 1.0).sum().backward()
    assert torch.equal(x.grad, (x.abs() <= 2).float())


def test_unknown_surrogate_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"surrogate='spline'.*'arctan'.*'triangle'"):
        F.scaled_round_clip(torch.zeros(1), 4, 1.0, "spline")


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("width", [1, 2, 33, 1000])
def test_standardized_rows_have_mean_zero_and_variance_one(width: int) -> None:
    weight = torch.randn(7, width) * torch.logspace(-1, 3, 7).unsqueeze(1) + 0.5
    hat = F.standardize_weight(weight.double())
    torch.testing.assert_close(hat, reference.standardize(weight.double()), rtol=1e-9, atol=1e-9)
    if width > 1:
        ones = torch.ones(7, dtype=torch.float64)
        torch.testing.assert_close(hat.mean(1), 0 * ones)
        torch.testing.assert_close(hat.var(1, correction=0), ones, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e4])
def test_a_constant_row_is_no_nan_and_neither_is_its_gradient(value: float) -> None:
    weight = torch.full((2, 8), value, requires_grad=True)
    assert float(F.standardize_weight(weight).detach().abs().max()) < 1e-2 * max(1, abs(value))
    step, scale = torch.ones(2, 1), torch.ones(2, 1)
    out = F.fake_quantize_weight(weight, step, scale, None, 3)
    out.square().sum().backward()
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_weight_backward_equals_autograd_of_the_composed_formula(
    levels: int, with_offset: bool, groups: int
) -> None:
    weight = torch.randn(5, 12, dtype=torch.float64) * 0.02 + 0.01
    step, scale = random_steps(5, groups), random_steps(5, groups)
    offset = torch.randn(5, 1, dtype=torch.float64) if with_offset else None
    incoming = torch.randn(5, 12, dtype=torch.float64)
    results = []
    for function in (F.fake_quantize_weight, reference.fake_quantized_weight):
        leaves = [t.clone().requires_grad_() for t in (weight, scale, offset) if t is not None]
        out = function(leaves[0], step, leaves[1], leaves[2] if with_offset else None, levels)
        results.append([out, *torch.autograd.grad(out, leaves, incoming)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert float(results[0][1].abs().max()) > 1e-3  # not trivially equal zeros


def test_gradients_of_scale_and_offset_are_exact() -> None:
    """In scale and offset the weight is smooth, so finite differences apply."""
    weight, step = torch.randn(3, 8, dtype=torch.float64), random_steps(3, 2)
    scale = random_steps(3, 2).requires_grad_()
    offset = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, o: F.fake_quantize_weight(weight, step, s, o, 4), (scale, offset)
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_latents_are_invariant_to_scale_and_shift(groups: int) -> None:
    weight = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    step, scale = random_steps(6, groups), random_steps(6, groups)
    incoming = torch.randn(6, 32, dtype=torch.float64)
    out = F.fake_quantize_weight(weight, step, scale, None, 4)
    (grad,) = torch.autograd.grad(out, weight, incoming)
    moved = F.fake_quantize_weight(weight.detach() * 3 + 0.7, step, scale, None, 4)
    torch.testing.assert_close(out.detach(), moved)
    zeros = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(grad.sum(1), zeros, atol=1e-10, rtol=0)
    centered = weight.detach() - weight.detach().mean(1, keepdim=True)
    torch.testing.assert_close((grad * centered).sum(1), zeros, atol=1e-9, rtol=0)
    assert float(grad.norm(dim=1).min()) > 1e-2


@pytest.mark.parametrize("levels", SOME_LEVELS)
def test_a_quantized_row_takes_at_most_m_values_symmetric(levels: int) -> None:
    weight = torch.randn(4, 3000)
    step, scale = (
        torch.full((4, 1), F.gaussian_step(levels)),
        random_steps(4, 1, dtype=weight.dtype),
    )
    rows = F.fake_quantize_weight(weight, step, scale, None, levels)
    for row in rows:
        values = row.unique()
        assert len(values) <= levels
        if levels <= 16:  # with more, 3000 draws need not meet both ends of the grid
            assert torch.equal(values, -values.flip(0))


def test_weight_path_does_not_write_to_its_inputs() -> None:
    weight, step, scale = torch.randn(3, 8), torch.ones(3, 1), torch.ones(3, 1)
    before = weight.clone()
    leaf = weight.requires_grad_()
    incoming = torch.randn(3, 8)
    kept = incoming.clone()
    F.fake_quantize_weight(leaf, step, scale, torch.ones(3, 1), 4).backward(incoming)
    assert torch.equal(leaf.detach(), before) and torch.equal(incoming, kept)
    assert torch.equal(scale, torch.ones(3, 1))


# --------------------------------------------------------------------------- pooled statistics


@pytest.mark.parametrize("geometric", [False, True])
def test_pooled_statistic_counts_valid_tokens_of_its_own_sample_only(geometric: bool) -> None:
    x = torch.randn(3, 6, 4, dtype=torch.float64) * torch.tensor([1.0, 5, 20]).view(3, 1, 1)
    valid = torch.rand(3, 6) > 0.4
    valid[:, 0] = True
    valid[2] = False  # none counts: all do
    token = F.token_log_ms(x, 1e-6)
    pooled = F.pooled_log_ms(token, valid, geometric=geometric)
    assert pooled.shape == (3, 1)
    for b in range(3):
        counted = [token[b, t] for t in range(6) if valid[b, t] or not valid[b].any()]
        torch.testing.assert_close(
            pooled[b, 0], reference.sample_log_ms(counted, geometric).double()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_normalize_divides_by_the_root_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4).to(dtype)
    y = F.normalize(x, torch.full((2, 3), math.log(4.0)))
    assert y.dtype == dtype
    torch.testing.assert_close(y, x / 2)
