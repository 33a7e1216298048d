"""One weight matrix: compensated codes, fitted scales, latents that keep their codes."""

import pytest
import torch

from maqd_hf.calibration import (
    compensation,
)
from maqd_hf.calibration.compensation import (
    Grid,
    Hessian,
    InputMoments,
    compensate,
    descend,
    fit_scales,
    latent_for_codes,
    output_error,
    set_codes,
)
from maqd_hf.functional import dequantize, quantize, stored_scale
from maqd_hf.nn import LinearSpec, MaQDLinear
from maqd_hf.nn.step_search import search_step

LEVELS = (2, 3, 4, 8, 15, 16, 255)


def moments_of(x: torch.Tensor) -> InputMoments:
    moments = InputMoments(x.shape[1])
    moments.add(x)
    return moments


def searched_grid(weight: torch.Tensor, levels: int, groups: int) -> Grid:
    center = weight.mean(1, keepdim=True)
    step = search_step((weight - center).view(len(weight), groups, -1), levels)
    return Grid(stored_scale(step), center, levels)


def squared_output_error(layer: MaQDLinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (layer.quantized_weight() - weight).t()).detach().square().sum())


# ------------------------------------------------------------------------------- one matrix


def test_moments_do_not_depend_on_the_batches(inputs):
    whole, parts = moments_of(inputs), InputMoments(64)
    for part in inputs.split(77):
        parts.add(part, part + 1)
    torch.testing.assert_close(parts.second, whole.second)
    torch.testing.assert_close(whole.second, inputs.t() @ inputs / len(inputs))
    torch.testing.assert_close(parts.drift, inputs.mean(0).expand(64, 64), atol=1e-4, rtol=1e-4)


def test_hessian_factor_is_the_inverse_and_nan_raises(inputs):
    hessian = Hessian.of(moments_of(inputs).second, damp=0.01, act_order=True)
    ordered = hessian.matrix[hessian.order][:, hessian.order].double()
    u = hessian.factor.double()
    torch.testing.assert_close(u.t() @ u @ ordered, torch.eye(64).double(), atol=1e-3, rtol=0)
    assert bool((ordered.diagonal().diff() <= 0).all())
    rows = torch.randn(5, 64)
    torch.testing.assert_close(hessian.solve(rows) @ hessian.matrix, rows, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="NaN"):
        Hessian.of(torch.full((4, 4), float("nan")), 0.01, False)


def test_shrinking_divides_every_correlation_by_the_same(inputs, monkeypatch):
    monkeypatch.setattr(compensation, "_MEAN_WEIGHT", 0.0)  # comes after it
    second = moments_of(inputs).second
    plain, shrunk = (Hessian.of(second, 1e-6, False, shrink).matrix for shrink in (0.0, 0.25))
    apart = ~torch.eye(len(second), dtype=torch.bool)
    torch.testing.assert_close(shrunk[apart], plain[apart])
    torch.testing.assert_close(shrunk.diagonal(), 1.25 * plain.diagonal())


def test_a_rank_deficient_moment_is_damped_until_it_works(inputs, caplog):
    second = moments_of(inputs[:10]).second  # rank 10 of 64
    hessian = Hessian.of(second, damp=0.0, act_order=False)
    assert bool(hessian.factor.isfinite().all())
    assert "rank-deficient" in caplog.text


def test_compensation_without_correlation_is_rounding():
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    grid = searched_grid(weight, 8, 2)
    hessian = Hessian(torch.eye(32), torch.arange(32), torch.eye(32))
    codes, rounded = compensate(weight, grid, hessian, block_size=8)
    assert torch.equal(codes, grid.codes(weight))
    torch.testing.assert_close(rounded, weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_does_not_depend_on_the_block_size(inputs, act_order):
    weight = torch.randn(12, 64)
    grid = searched_grid(weight, 16, 2)
    hessian = Hessian.of(moments_of(inputs).second, 0.01, act_order)
    whole, _ = compensate(weight, grid, hessian, 64)
    parts, _ = compensate(weight, grid, hessian, 7)
    assert float((whole == parts).float().mean()) > 0.99  # a tie may round the other way


def test_compensate_equals_optimal_brain_quantization(inputs):
    """Slow reference: after each rounded column, the best real values of all later ones."""
    weight = torch.randn(4, 64).double()
    grid = searched_grid(weight.float(), 8, 1)
    second = moments_of(inputs).second
    hessian = Hessian.of(second, 0.01, act_order=False)
    h, w = hessian.matrix.double(), weight.clone()
    expected = torch.empty_like(w)
    for j in range(64):
        code = quantize(w[:, j : j + 1] - grid.center, 8, grid.step)
        value = dequantize(code, 8, grid.step) + grid.center
        expected[:, j : j + 1] = code
        gap = w[:, j : j + 1] - value
        if j < 63:  # minimize the error over columns j+1.. given the gap in column j
            w[:, j + 1 :] += torch.linalg.solve(
                h[j + 1 :, j + 1 :], h[j + 1 :, j : j + 1] @ gap.T
            ).T
    codes, _ = compensate(weight.float(), grid, hessian, 16)
    assert float((codes == expected).double().mean()) > 0.99


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_stage_lowers_the_output_error(inputs, levels, groups):
    torch.manual_seed(3)
    weight = torch.randn(24, 64)
    second = moments_of(inputs).second
    hessian = Hessian.of(second, 0.01, act_order=True)
    grid = searched_grid(weight, levels, groups)

    def damped_error(codes):
        return output_error(weight, grid.values(codes), hessian.matrix)

    nearest = grid.codes(weight)
    codes, _ = compensate(weight, grid, hessian, 16)
    assert float(damped_error(codes).sum()) < 0.9 * float(damped_error(nearest).sum())
    better, wanted = descend(weight, grid, codes, hessian, 16)
    assert bool((damped_error(better) <= damped_error(codes) * (1 + 1e-4)).all())
    assert torch.equal(grid.codes(wanted), better)
    scale, offset = fit_scales(weight, better, grid, second, offset=True)
    before = output_error(weight, grid.values(better), second)
    after = output_error(weight, Grid(scale, offset, levels).values(better), second)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert bool((scale > 0).all())


def test_fit_scales_recovers_the_scales_that_made_the_weight(inputs):
    torch.manual_seed(4)
    codes = torch.randint(0, 8, (6, 64)).float()
    truth = Grid(torch.rand(6, 4) + 0.5, torch.randn(6, 1), 8)
    start = Grid(torch.ones(6, 4), torch.zeros(6, 1), 8)
    scale, offset = fit_scales(truth.values(codes), codes, start, torch.eye(64), offset=True)
    torch.testing.assert_close(scale, truth.step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(offset, truth.center, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- codes -> latent


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("offset", [True, False])
def test_a_layer_reproduces_its_codes_bit_for_bit(inputs, levels, group_size, offset):
    torch.manual_seed(levels)
    weight = torch.randn(32, 64) * torch.rand(32, 1) + 0.3 * torch.randn(32, 1)
    weight[::5, 7] *= 12  # outliers
    spec = LinearSpec(levels, None, group_size=group_size, weight_offset=offset)
    layer = MaQDLinear(64, 32, False, spec)
    grid = searched_grid(weight, levels, spec.groups(64))
    if not offset:
        grid = Grid(grid.step, torch.zeros(32, 1), levels)
    hessian = Hessian.of(moments_of(inputs).second, 0.01, act_order=True)
    codes, wanted = compensate(weight, grid, hessian, 16)
    lost = set_codes(layer, codes, wanted, grid)
    kept = (layer.weight_codes() == codes).all(1)
    assert lost == int((~kept).sum())
    if offset:  # without an offset, a row far from zero has codes on one side only
        assert lost == 0
        torch.testing.assert_close(layer.quantized_weight(), grid.values(codes))
    torch.testing.assert_close(layer.weight.mean(1, keepdim=True)[kept], grid.center[kept])


def test_the_latent_moves_no_more_than_it_must():
    weight = torch.tensor([[-1.5, -0.4, 0.6, 1.5]])  # mean 0.05: each must move by 0.05
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 4)
    latent = latent_for_codes(grid.codes(weight), weight, grid)
    torch.testing.assert_close(latent, weight - 0.05)


def test_rows_without_a_latent_are_counted():
    layer = MaQDLinear(8, 3, False, LinearSpec(4, None))
    codes = torch.randint(0, 4, (3, 8), generator=torch.Generator().manual_seed(0)).float()
    codes[0], codes[1:, :4] = 3, 3 - codes[1:, 4:]
    grid = Grid(torch.ones(3, 1), torch.zeros(3, 1), 4)
    assert set_codes(layer, codes, grid.values(codes), grid) == 1  # all 3: above the mean?
    assert torch.equal(layer.weight_codes()[1:], codes[1:])
    assert bool(layer.weight.isfinite().all())
