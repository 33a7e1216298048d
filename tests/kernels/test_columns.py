"""maqd_hf.kernels.columns: the compiled column loops against the same loops in torch."""

import pytest
import torch

from maqd_hf.calibration.compensation import Grid, Hessian, compensate, descend, output_error
from maqd_hf.functional import dequantize, quantize
from maqd_hf.kernels import columns, loader
from maqd_hf.nn.step_search import search_step

pytestmark = pytest.mark.usefixtures("best")


def problem(inputs=64, rows=33, levels=8, groups=1, act_order=True, seed=0):
    """A weight, a grid for it and a Hessian of correlated inputs."""
    torch.manual_seed(seed)
    x = torch.randn(8 * inputs, inputs) @ (torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs))
    weight = torch.randn(rows, inputs)
    center = weight.mean(1, keepdim=True)
    step = search_step((weight - center).view(rows, groups, -1), levels)
    hessian = Hessian.of(x.t() @ x / len(x), 0.01, act_order)
    return weight, Grid(step, center, levels), hessian


def both(monkeypatch, function, *args):
    """(compiled, torch) results of one call."""
    got = function(*args)
    with monkeypatch.context() as patch:
        patch.setenv(loader.KERNEL_VARIABLE, "reference")
        return got, function(*args)


def same_or_no_worse(got, expected, weight, grid, hessian):
    """A near-tie may round the other way, but the output error must not grow by it."""
    assert float((got == expected).float().mean()) > 0.99
    errors = [output_error(weight, grid.values(c), hessian.matrix).sum() for c in (got, expected)]
    assert float(errors[0]) <= float(errors[1]) * (1 + 1e-3)


SHAPES = [(64, 33, 4), (67, 5, 1), (1, 1, 1), (130, 129, 2), (16, 200, 16)]


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 15, 16, 255, 256])
@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_equals_torch(monkeypatch, levels, act_order):
    for inputs, rows, groups in SHAPES:
        weight, grid, hessian = problem(inputs, rows, levels, groups, act_order)
        got, expected = both(monkeypatch, compensate, weight, grid, hessian, 32)
        same_or_no_worse(got[0], expected[0], weight, grid, hessian)
        kept = (got[0] == expected[0]).all(1)  # a row goes its own way after a near-tie
        torch.testing.assert_close(got[1][kept], expected[1][kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 15, 16, 255, 256])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_descent_equals_torch(monkeypatch, levels, sweeps):
    for inputs, rows, groups in SHAPES:
        weight, grid, hessian = problem(inputs, rows, levels, groups)
        start = grid.codes(weight)
        args = (weight, grid, start, hessian, 32, sweeps)
        got, expected = both(monkeypatch, descend, *args)
        same_or_no_worse(got[0], expected[0], weight, grid, hessian)
        assert torch.equal(grid.codes(got[1]), got[0])


@pytest.mark.parametrize("levels", [2, 3, 16, 255])
@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_no_sweep_increases_the_error_of_a_row(monkeypatch, levels, kernel):
    if kernel == "reference":
        monkeypatch.setenv(loader.KERNEL_VARIABLE, kernel)
    weight, grid, hessian = problem(levels=levels, groups=4)
    codes = grid.codes(weight)
    errors = [output_error(weight, grid.values(codes), hessian.matrix)]
    for _ in range(5):
        codes, _ = descend(weight, grid, codes, hessian, 16)
        errors.append(output_error(weight, grid.values(codes), hessian.matrix))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-5)).all())
    assert float(errors[-1].sum()) < 0.8 * float(errors[0].sum())
    together, _ = descend(weight, grid, grid.codes(weight), hessian, 16, sweeps=5)
    same_or_no_worse(together, codes, weight, grid, hessian)


@pytest.mark.parametrize("levels", [2, 3, 16, 17, 256])
def test_ties_and_the_ends_of_the_grid_round_as_quantize_does(levels):
    x = torch.arange(-2 * levels, 2 * levels + 1).float() / 2  # every threshold and far beyond
    w, step = x.repeat(3, 1), torch.tensor([[0.5], [1.0], [2.0]]).expand(3, len(x)).contiguous()
    codes, _ = columns.compensate_columns(
        w.clone(), torch.eye(3), (step, torch.zeros(len(x)), levels)
    )
    assert torch.equal(codes, quantize(w, levels, step))


def test_rows_do_not_know_of_each_other():
    weight, grid, hessian = problem(64, 150, 16, 2)
    whole, _ = compensate(weight, grid, hessian, 32)
    for rows in (slice(0, 1), slice(63, 66), slice(149, 150)):
        part = Grid(grid.step[rows], grid.center[rows], grid.levels)
        alone, _ = compensate(weight[rows], part, hessian, 32)
        assert float((alone == whole[rows]).float().mean()) > 0.98  # BLAS sums in another order


def test_threads_do_not_matter():
    weight, grid, hessian = problem(96, 300, 4, 3)
    step = grid.column_step(96).t().contiguous()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        w = weight.t().contiguous()
        settings = (step, grid.center.flatten(), 4)
        results.append((*columns.compensate_columns(w, hessian.factor, settings), w))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_what_the_library_does_not_cover_and_when_it_is_switched_off(monkeypatch):
    """float64 and strided tensors run in torch; the environment variable forces it."""
    used = []
    monkeypatch.setattr(columns, "dequantize", lambda *a: used.append(1) or dequantize(*a))
    weight, grid, hessian = problem(32, 7)
    step, center = grid.column_step(32).t().contiguous(), grid.center.flatten()
    w = weight.t().contiguous()
    expected, _ = columns.compensate_columns(w.clone(), hessian.factor, (step, center, 8))
    assert not used
    wide = columns.compensate_columns(
        w.double(), hessian.factor.double(), (step.double(), center.double(), 8)
    )
    assert len(used) == 32 and wide[0].dtype == torch.float64
    strided = torch.zeros(32, 14)[:, ::2].copy_(w)
    codes, _ = columns.compensate_columns(strided, hessian.factor, (step, center, 8))
    assert len(used) == 64 and torch.equal(codes, expected)
    monkeypatch.setenv(loader.KERNEL_VARIABLE, "reference")
    columns.compensate_columns(w, hessian.factor, (step, center, 8))
    assert len(used) == 96
