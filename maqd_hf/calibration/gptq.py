"""Start values of the weights: searched grid, error compensation, least-squares scales."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..functional import dequantize, grid_center, quantize
from ..nn import MaQDLinear
from ..search import search_step
from .blocks import (
    Batch,
    Batches,
    Call,
    Segment,
    as_batches,
    counted_tokens,
    evaluating,
    find_segments,
    float_activations,
    float_weights,
    rows_of,
    run_model,
    shared_inputs,
    watching,
)

logger = logging.getLogger(__name__)

_MARGIN = 0.01  # of a step: how far latents stay from the thresholds of their cell
_BISECTIONS = 60


# ------------------------------------------------------------------------------- one matrix


@dataclass
class InputMoments:
    """What a layer's inputs on the calibration data boil down to.

    ``second`` (in, in): mean of x x^T over the counted tokens; ``cross`` (in, in): mean of
    (x_float - x) x^T, where x_float is the input in the float model, or None.
    """

    second: Tensor
    cross: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        total = self.tokens + len(x)
        if total == 0:
            return
        self.second.mul_(self.tokens / total).addmm_(x.t(), x, alpha=1 / total)
        if x_float is not None and self.cross is not None:
            self.cross.mul_(self.tokens / total).addmm_((x_float - x).t(), x, alpha=1 / total)
        self.tokens = total


def damped(second: Tensor, damp: float) -> Tensor:
    """``second`` + damp * mean diagonal on the diagonal, float64 and positive definite.

    Raises ``ValueError`` on NaN. Where rounding leaves it indefinite the damping grows tenfold
    until it is not.
    """
    if not bool(second.isfinite().all()):
        raise ValueError("the inputs hold NaN or infinity")
    wide = second.double()
    mean = float(wide.diagonal().mean())
    identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * (mean or 1.0)
    while True:
        result = wide + damp * identity
        if int(torch.linalg.cholesky_ex(result).info) == 0:
            return result
        damp = max(10 * damp, 1e-6)
        logger.warning("the inputs' second moment is rank-deficient: damping raised to %g", damp)


def compensation_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse: how errors of a column spread to later ones."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


@dataclass
class Grid:
    """``value = centre + step * (code - (M-1)/2)``; ``step`` (out, groups), ``centre`` (out, 1)."""

    step: Tensor
    centre: Tensor
    levels: int

    def column_step(self, columns: int) -> Tensor:
        """Step of every weight, (out, columns)."""
        return self.step.repeat_interleave(columns // self.step.shape[1], dim=1)

    def codes(self, weight: Tensor) -> Tensor:
        return quantize(weight - self.centre, self.levels, self.column_step(weight.shape[1]))

    def values(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.levels, self.column_step(codes.shape[1])) + self.centre


def compensate(
    weight: Tensor, grid: Grid, hessian: Tensor, factor: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Round column by column, moving each column's error to the columns not yet rounded.

    Returns codes and the values that were rounded, both (out, in). GPTQ, arXiv:2210.17323.
    """
    columns = len(order)
    w = weight.t()[order].contiguous()
    step = grid.column_step(columns).t()[order].contiguous()
    centre = grid.centre.t()
    codes = torch.empty_like(w)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = w[start:stop], torch.empty_like(w[start:stop])
        for i in range(stop - start):
            j = start + i
            code = quantize(block[i] - centre[0], grid.levels, step[j])
            value = dequantize(code, grid.levels, step[j]) + centre[0]
            errors[i] = (block[i] - value) / factor[j, j]
            codes[j] = code
            block[i + 1 :].addr_(factor[j, j + 1 : stop], errors[i], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.argsort(order)
    return codes[back].t().contiguous(), w[back].t().contiguous()


def descend(
    weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """One sweep of coordinate descent over the columns: each takes its best code given the rest.

    Returns codes and the values that were rounded. The error cannot grow. arXiv:2309.01885.
    """
    columns = len(hessian)
    h = hessian.float()
    step, centre = grid.column_step(columns).t().contiguous(), grid.centre.t()
    codes = codes.t().contiguous()
    value = (grid.values(codes.t())).t().contiguous()
    gradient = h @ (weight.t() - value)
    rounded = torch.empty_like(value)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        changes = torch.empty_like(value[start:stop])
        for i, j in enumerate(range(start, stop)):
            wanted = value[j] + gradient[j] / h[j, j]
            code = quantize(wanted - centre[0], grid.levels, step[j])
            new = dequantize(code, grid.levels, step[j]) + centre[0]
            changes[i] = new - value[j]
            codes[j], value[j], rounded[j] = code, new, wanted
            gradient[start:stop].addr_(h[start:stop, j], changes[i], alpha=-1)
        if stop < columns:
            gradient[stop:].addmm_(h[stop:, start:stop], changes, alpha=-1)
        if start:
            gradient[:start].addmm_(h[:start, start:stop], changes, alpha=-1)
    return codes.t().contiguous(), rounded.t().contiguous()


def output_error(weight: Tensor, quantized: Tensor, second: Tensor) -> Tensor:
    """Mean squared error of every output (out,), ``second`` being the inputs' second moment."""
    gap = (weight - quantized).to(second.dtype)
    return ((gap @ second) * gap).sum(-1)


def refit(
    weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, offset: bool
) -> tuple[Tensor, Tensor]:
    """Scales (out, groups) and offset (out, 1) of least output error for fixed codes.

    A row in which a scale would turn negative keeps the grid's.
    """
    out_features, groups = grid.step.shape
    wide = hessian.dtype
    units = (codes - grid_center(grid.levels)).to(wide)
    width = units.shape[1] // groups
    basis = units.view(out_features, groups, width)
    ones = torch.ones(1, units.shape[1], dtype=wide, device=units.device)
    target = weight.to(wide) if offset else (weight - grid.centre).to(wide)
    terms = groups + int(offset)
    gram = torch.empty(out_features, terms, terms, dtype=wide, device=units.device)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        spread = units[:, part] @ hessian[part]
        gram[:, g, :groups] = (spread.view_as(basis) * basis).sum(-1)
        if offset:
            gram[:, g, groups] = gram[:, groups, g] = spread.sum(-1)
    pull = target @ hessian
    right = (pull.view_as(basis) * basis).sum(-1)
    if offset:
        gram[:, groups, groups] = (ones @ hessian @ ones.t()).squeeze()
        right = torch.cat([right, pull.sum(-1, keepdim=True)], dim=1)
    start = torch.cat([grid.step, grid.centre], dim=1)[:, :terms].to(wide)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    fit = torch.linalg.solve(gram, (right + ridge[:, None] * start).unsqueeze(-1)).squeeze(-1)
    good = ((fit[:, :groups] > 0) & fit[:, :groups].isfinite()).all(dim=1, keepdim=True)
    fit = torch.where(good, fit, start).to(grid.step.dtype)
    return fit[:, :groups], fit[:, groups:] if offset else grid.centre


# ---------------------------------------------------------------------------- codes -> latent


def latent_for_codes(codes: Tensor, wanted: Tensor, grid: Grid) -> Tensor:
    """Latent (out, in), near ``wanted``, whose codes on ``grid`` are ``codes``.

    A layer standardises its latent, so the latent's row mean must be the grid's centre. Every
    weight may move inside its cell (the outermost cells are open): all of a row move by the same
    amount, clipped to their cells, found by bisection. Rows without a solution come as close as
    they can; ``reproduces`` tells which.
    """
    step = grid.column_step(codes.shape[1]).double()
    centred = (codes - grid_center(grid.levels)).double()
    half = 0.5 - _MARGIN
    infinite = torch.full_like(step, float("inf"))
    low = torch.where(codes == 0, -infinite, (centred - half) * step)
    high = torch.where(codes == grid.levels - 1, infinite, (centred + half) * step)
    start = wanted.double() - grid.centre.double()
    reach = (start.abs().amax(1, keepdim=True) + grid.levels * step.amax(1, keepdim=True)) * 2
    reach = reach * codes.shape[1]
    below, above = -reach, reach
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        too_high = (start + middle).clamp(low, high).mean(1, keepdim=True) > 0
        below, above = torch.where(too_high, below, middle), torch.where(too_high, middle, above)
    latent = (start + (below + above) / 2).clamp(low, high)
    return (latent + grid.centre.double()).to(wanted.dtype)


@torch.no_grad()
def set_codes(layer: MaQDLinear, codes: Tensor, wanted: Tensor, grid: Grid) -> int:
    """Give ``layer`` this grid and a latent near ``wanted`` with these codes.

    Returns how many rows have no such latent; these have the codes of a latent near it.
    """
    layer.weight.copy_(latent_for_codes(codes, wanted, grid))
    layer.set_grid(grid.step, grid.centre if layer.weight_offset is not None else None)
    return int((layer.weight_codes() != codes).any(dim=1).sum())


# ---------------------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class GPTQOptions:
    damp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    sweeps: int = 0
    refit: bool = True
    asymmetric: float = 0.0
    skip_first: bool = True
    weighted: bool = True


@dataclass(frozen=True)
class LayerResult:
    """Relative output error on the calibration inputs, rounded to nearest and in the end."""

    name: str
    rounding_error: float
    error: float
    unreachable_rows: int


@torch.no_grad()
def quantize_layer(
    layer: MaQDLinear,
    name: str,
    moments: InputMoments,
    hessian: Tensor,
    factor: Tensor,
    order: Tensor,
    options: GPTQOptions,
) -> LayerResult:
    levels = layer.spec.weight_levels
    assert levels is not None and layer.weight_step is not None
    weight = layer.weight.detach().float().clone()
    second = moments.second
    target = weight
    if moments.cross is not None and options.asymmetric:
        pull = weight.double() @ moments.cross.double()
        moved = torch.cholesky_solve(pull.t(), torch.linalg.cholesky(hessian)).t()
        target = weight + options.asymmetric * moved.float()
    centre = target.mean(dim=1, keepdim=True)
    if layer.weight_offset is None:
        centre = torch.zeros_like(centre)
    shape = layer.weight_step.shape
    importance = second.diagonal().clamp(min=1e-12).view(shape[1], -1) if options.weighted else None
    grouped = (target - centre).view(*shape, -1)
    grid = Grid(search_step(grouped, levels, importance), centre, levels)
    nearest = grid.codes(target)
    wide = second.double()
    energy = float(output_error(target, torch.zeros_like(target), wide).sum()) or 1.0
    before = output_error(target, grid.values(nearest), wide)
    codes, wanted = compensate(target, grid, hessian, factor, order, options.block_size)
    for _ in range(options.sweeps):
        codes, wanted = descend(target, grid, codes, hessian, options.block_size)
    worse = output_error(target, grid.values(codes), wide) > before
    codes = torch.where(worse.unsqueeze(1), nearest, codes)
    wanted = torch.where(worse.unsqueeze(1), target, wanted)
    lost = set_codes(layer, codes, wanted, grid)
    if options.refit:
        scale, offset = refit(
            target, layer.weight_codes(), grid, hessian, layer.weight_offset is not None
        )
        layer.weight_log_scale.copy_(scale.log())
        if layer.weight_offset is not None:
            layer.weight_offset.copy_(offset)
    after = output_error(target, layer.quantized_weight(), wide)
    return LayerResult(name, float(before.sum()) / energy, float(after.sum()) / energy, lost)


# ---------------------------------------------------------------------------------- the model


@dataclass
class GPTQReport:
    layers: list[LayerResult] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def gptq(
    model: nn.Module,
    data: Batches,
    options: GPTQOptions = GPTQOptions(),
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> GPTQReport:
    batches = as_batches(data, model, batch_size)
    names = {m: n for n, m in model.named_modules() if isinstance(m, MaQDLinear)}
    report = GPTQReport()
    with evaluating(model), float_activations(model):
        segments = find_segments(model, batches[0])
        total = sum(len(s.calls) for s in segments)
        with tqdm(total=total, desc="gptq", unit="block", disable=not progress) as bar:
            for segment in segments:
                segment.capture(batches)
                _Walk(segment, batches, options, names, report).run(bar)
    return report


class _Walk:
    def __init__(self, segment, batches, options, names, report):
        self.segment, self.options, self.names, self.report = segment, options, names, report
        self.counted = [counted_tokens(b, options.skip_first) for b in batches]
        self.done = set()
        self.hidden_float = list(segment.hidden) if options.asymmetric else []

    def run(self, bar):
        s = self.segment
        for call in s.calls:
            groups = shared_inputs(s, call)
            floats = self._float_inputs(call, groups) if self.options.asymmetric else None
            for index, group in enumerate(groups):
                group = [
                    l for l in group if l.spec.weight_levels is not None and l not in self.done
                ]
                if not group:
                    continue
                n = group[0].in_features
                z = lambda: torch.zeros(n, n, device=group[0].weight.device)
                moments = InputMoments(z(), z() if floats else None)
                for i, counted in enumerate(self.counted):
                    x = s.run_until(call, i, group[0])
                    moments.add(rows_of(x, counted), floats[index][i] if floats else None)
                self._quantize(group, moments)
                self.done.update(group)
            s.hidden = [s.run(call, i, h) for i, h in enumerate(s.hidden)]
            bar.update()

    def _float_inputs(self, call, groups):
        s = self.segment
        kept = [[] for _ in groups]
        first = {g[0]: k for k, g in enumerate(groups)}
        for i, counted in enumerate(self.counted):

            def see(layer, args, kwargs):
                kept[first[layer]].append(rows_of(args[0], counted))

            with float_weights(call.block), watching(first, see):
                self.hidden_float[i] = s.run(call, i, self.hidden_float[i])
        return kept

    def _quantize(self, group, moments):
        hessian = damped(moments.second, self.options.damp)
        n = len(hessian)
        order = torch.arange(n)
        if self.options.act_order:
            order = hessian.diagonal().argsort(descending=True)
        factor = compensation_factor(hessian[order][:, order])
        for layer in group:
            self.report.layers.append(
                quantize_layer(
                    layer, self.names[layer], moments, hessian, factor, order, self.options
                )
            )
