"""The rounding of one weight matrix: codes of little output error, their scales, their latent.

Everything here minimizes ``E |W x - Q x|^2`` over the calibration inputs ``x``, which enter it by
their second moment ``E x x^T`` alone. Not in arXiv:2403.14999.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import dequantize, grid_center, quantize
from ..kernels.columns import compensate_columns, descend_columns
from ..nn import MaQDLinear

logger = logging.getLogger(__name__)

_MARGIN = 0.01  # a share of a step: latents stay so far from the thresholds of their cell
_MAX_ITERATIONS = 60  # iterations of the search for a latent
# The cost of a drift of a row's mean, as a share of the mean diagonal: behind a LayerNorm, whose
# outputs sum to 0, a drift changes nothing, but a latent could not follow it.
_MEAN_WEIGHT = 0.1
_STRIP = 192  # columns of a second moment that are summed up at a time
_RIDGE = 1e-4  # keeps scales in place that the inputs say little about


class InputMoments:
    """The moments of a layer's inputs, summed up batch by batch.

    ``second`` (in, in) is the mean of x x^T. ``drift`` (in, in) is the mean of (x_float - x) x^T,
    where x_float is the layer's input in the float model; None until such inputs are added.
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.second = torch.zeros(features, features, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        """Take in inputs (tokens, in), float32."""
        total = self.tokens + len(x)
        if total == self.tokens:
            return
        old, new = self.tokens / total, 1 / total
        if x_float is not None and self.drift is None:
            self.drift = torch.zeros_like(self.second)
        with torch.autocast(x.device.type, enabled=False):
            self.second.mul_(old)
            for start in range(0, x.shape[1], _STRIP):  # symmetric: a strip, then its mirror image
                strip, beyond = slice(start, start + _STRIP), slice(start + _STRIP, None)
                self.second[strip, start:].addmm_(x[:, strip].t(), x[:, start:], alpha=new)
                self.second[beyond, strip] = self.second[strip, beyond].t()
            if self.drift is not None:
                self.drift.mul_(old)
                if x_float is not None and x_float.shape == x.shape:  # experts get other tokens
                    self.drift.addmm_((x_float - x).t(), x, alpha=new)
        self.tokens = total


@dataclass(frozen=True)
class Hessian:
    """The damped second moment, and how the error of a column spreads to later ones.

    ``matrix`` (in, in); ``order`` (in,): the columns in the order they are rounded; ``factor``
    (in, in): upper U with U^T U = inverse of the reordered matrix.
    """

    matrix: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, second: Tensor, damp: float, act_order: bool, shrink: float = 0.0) -> Hessian:
        """The Hessian of ``second``; ``act_order`` puts columns with large inputs first.

        The diagonal grows by ``shrink`` times itself and by ``damp`` times its mean, and the latter
        grows tenfold until Cholesky's method succeeds. Row means get a small cost.

        Raises:
            ValueError: ``second`` holds NaN or infinity.
        """
        if not bool(second.isfinite().all()):
            raise ValueError(
                "its calibration inputs hold NaN or infinity: the model or the data is broken"
            )
        diagonal = second.diagonal()
        order = torch.arange(len(second), device=second.device)
        if act_order:
            order = diagonal.argsort(descending=True)
        mean = float(diagonal.mean()) or 1.0
        while True:
            matrix = second.clone()
            matrix.diagonal().mul_(1 + shrink).add_(damp * mean)
            matrix.add_(_MEAN_WEIGHT * mean / len(matrix))
            # the lower factor of the reversed matrix, reversed, is the upper R with R R^T = matrix
            lower, failed = torch.linalg.cholesky_ex(matrix[order][:, order].flip(0, 1))
            if not int(failed):
                break
            damp = max(10 * damp, 1e-6)
            logger.warning("the inputs' second moment is rank-deficient: damping %g", damp)
        identity = torch.eye(len(second), dtype=second.dtype, device=second.device)
        factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        return cls(matrix, order, factor)

    def solve(self, rows: Tensor) -> Tensor:
        """``rows`` (out, in) times the inverse of the matrix."""
        solved = torch.empty_like(rows)
        solved[:, self.order] = rows[:, self.order] @ self.factor.t() @ self.factor
        return solved


@dataclass
class Grid:
    """The grid of a weight: ``value = center + step * (code - (M-1)/2)``.

    ``step`` is (out, groups), ``center`` (out, 1).
    """

    step: Tensor
    center: Tensor
    levels: int

    def column_step(self, columns: int) -> Tensor:
        """The step of every weight, (out, columns)."""
        return self.step.repeat_interleave(columns // self.step.shape[1], dim=1)

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of ``weight``, (out, in)."""
        return quantize(weight - self.center, self.levels, self.column_step(weight.shape[1]))

    def values(self, codes: Tensor) -> Tensor:
        """The weights that ``codes`` stand for, (out, in)."""
        return dequantize(codes, self.levels, self.column_step(codes.shape[1])) + self.center


def compensate(
    weight: Tensor, grid: Grid, hessian: Hessian, block_size: int
) -> tuple[Tensor, Tensor]:
    """Round column by column and move each column's error to the columns not yet rounded.

    Returns codes and the values that were rounded, both (out, in). This is GPTQ (arXiv:2210.17323).
    """
    order, factor = hessian.order, hessian.factor
    w = weight.t()[order].contiguous()
    step = grid.column_step(len(order)).t()[order].contiguous()
    center = grid.center.flatten()
    codes = torch.empty_like(w)
    for start in range(0, len(order), block_size):
        block, rest = slice(start, start + block_size), slice(start + block_size, None)
        codes[block], errors = compensate_columns(
            w[block], factor[block, block], (step[block], center, grid.levels)
        )
        w[rest].addmm_(factor[block, rest].t(), errors, alpha=-1)
    back = torch.argsort(order)
    return codes[back].t().contiguous(), w[back].t().contiguous()


def descend(
    weight: Tensor, grid: Grid, codes: Tensor, hessian: Hessian, block_size: int, sweeps: int = 1
) -> tuple[Tensor, Tensor]:
    """Coordinate descent over the columns: each takes its best code given the rest.

    Returns codes and the values that were rounded, both (out, in). The error cannot grow. As in
    QuantEase (arXiv:2309.01885).
    """
    h = hessian.matrix
    step = grid.column_step(len(h)).t().contiguous()
    center = grid.center.flatten()
    value = grid.values(codes).t().contiguous()
    gradient = h @ (weight.t() - value)
    codes, rounded = codes.t().contiguous(), torch.empty_like(value)
    for start in [*range(0, len(h), block_size)] * sweeps:
        block = slice(start, start + block_size)
        codes[block], rounded[block], moved = descend_columns(
            value[block], gradient[block], h[block, block], (step[block], center, grid.levels)
        )
        for others in (slice(start), slice(start + block_size, None)):
            gradient[others].addmm_(h[others, block], moved, alpha=-1)
    return codes.t().contiguous(), rounded.t().contiguous()


def output_error(weight: Tensor, quantized: Tensor, second: Tensor) -> Tensor:
    """The mean squared error of every output (out,) for inputs of second moment ``second``."""
    gap = (weight - quantized).to(second.dtype)
    return ((gap @ second) * gap).sum(-1)


def fit_scales(
    weight: Tensor, codes: Tensor, grid: Grid, second: Tensor, offset: bool
) -> tuple[Tensor, Tensor]:
    """The scales (out, groups) and offset (out, 1) of least output error for these codes.

    The error cannot grow: a row in which a scale would turn negative keeps the grid's.
    ``offset=False`` leaves the offset at the grid's center.
    """
    groups = grid.step.shape[1]
    basis = (codes - grid_center(grid.levels)).view(*grid.step.shape, -1)
    gram, right = _normal_equations(weight - grid.center, basis, second)
    terms = groups + int(offset)
    gram, right = gram[:, :terms, :terms].double(), right[:, :terms].double()
    start = torch.cat([grid.step, torch.zeros_like(grid.center)], dim=1)[:, :terms].double()
    # relative to what inputs without correlation would give: the true ones may see nothing of a row
    ridge = _RIDGE * basis.square().sum(-1).mean(1) * second.diagonal().mean()
    ridge = ridge.double().clamp(min=1e-30).unsqueeze(1)
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    fit = torch.linalg.solve(gram, (right + ridge * start).unsqueeze(-1)).squeeze(-1)
    good = fit.isfinite().all(1, keepdim=True) & (fit[:, :groups] > 0).all(1, keepdim=True)
    fit = torch.where(good, fit, start).to(grid.step.dtype)
    return fit[:, :groups], grid.center + fit[:, groups:] if offset else grid.center


def _normal_equations(weight: Tensor, basis: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the equations of a row's least error: (out, n, n) and (out, n).

    ``basis`` (out, groups, width) are the codes around zero. The n = groups + 1 unknowns are a
    scale for each group and the offset.
    """
    out_features, groups, width = basis.shape
    units = basis.flatten(1)
    gram = torch.empty(out_features, groups + 1, groups + 1, device=units.device)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        spread = units[:, part] @ second[part]
        gram[:, g, :groups] = (spread.view_as(basis) * basis).sum(-1)
        gram[:, g, groups] = gram[:, groups, g] = spread.sum(-1)
    gram[:, groups, groups] = second.sum()
    pull = weight @ second
    right = torch.cat([(pull.view_as(basis) * basis).sum(-1), pull.sum(-1, keepdim=True)], dim=1)
    return gram, right


# ---------------------------------------------------------------------------- codes -> latent


def latent_for_codes(codes: Tensor, wanted: Tensor, grid: Grid) -> Tensor:
    """The latent (out, in), near ``wanted``, whose codes on ``grid`` are ``codes``.

    A layer standardizes its latent, so the latent's row mean must be the grid's center. Every
    weight may move inside its cell (the outermost cells are open): all of a row move by the same
    amount, clipped to their cells. Rows without a solution come as close as they can; ``set_codes``
    counts them.
    """
    step = grid.column_step(codes.shape[1]).double()
    centered = (codes - grid_center(grid.levels)).double()
    half = 0.5 - _MARGIN
    infinite = torch.full_like(step, float("inf"))
    low = torch.where(codes == 0, -infinite, (centered - half) * step)
    high = torch.where(codes == grid.levels - 1, infinite, (centered + half) * step)
    start = wanted.double() - grid.center.double()
    shift = torch.zeros_like(grid.center, dtype=torch.float64)
    above = (start.abs() + step * grid.levels).amax(1, keepdim=True) * 2 * codes.shape[1]
    below = -above
    close = 1e-5 * _MARGIN * step.amin(1, keepdim=True)
    for _ in range(_MAX_ITERATIONS):  # Newton's steps, halving where they leave the bracket
        moved = start + shift
        mean = moved.clamp(low, high).mean(1, keepdim=True)
        if bool((mean.abs() <= close).all()):
            break
        below, above = torch.where(mean < 0, shift, below), torch.where(mean > 0, shift, above)
        slope = ((moved > low) & (moved < high)).double().mean(1, keepdim=True)
        newton = shift - mean / slope
        inside = (newton > below) & (newton < above)
        shift = torch.where(inside, newton, (below + above) / 2)
    latent = (start + shift).clamp(low, high)
    return (latent + grid.center.double()).to(wanted.dtype)


@torch.no_grad()
def set_codes(layer: MaQDLinear, codes: Tensor, wanted: Tensor, grid: Grid) -> int:
    """Give ``layer`` this grid and a latent near ``wanted`` with these codes.

    Returns how many rows have no such latent; these have the codes of a latent near it.
    """
    layer.weight.copy_(latent_for_codes(codes, wanted, grid))
    layer.set_grid(grid.step, grid.center if layer.weight_offset is not None else None)
    return int((layer.weight_codes() != codes).any(dim=1).sum())
