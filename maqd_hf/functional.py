"""The equations of the method: grid, scaled round-clip, surrogates, standardization, statistics.

Everything here is our reading of arXiv:2403.14999 ("Magic for the Age of Quantized DNNs"), which
publishes no code; where we go beyond it the docstring says "not in the paper" and why.

One grid serves weights and activations. With M levels and a step ``s`` the representable values are

    value = (code - (M - 1) / 2) * s,        code in 0 .. M-1,

evenly spaced and symmetric about zero: odd M contains zero, even M straddles it. ``_codes_`` is the
only place that turns numbers into codes. Layers in training and packed layers both call it, which
is what makes them agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

MIN_LEVELS, MAX_LEVELS = 2, 256

# ---------------------------------------------------------------------------------------- grid


def check_levels(levels: int, what: str = "levels") -> int:
    """Return ``levels`` if it is an int in 2..256, else raise ``ValueError``."""
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise ValueError(f"{what}={levels!r} must be an int, the number of levels (16 = 4 bit)")
    if not MIN_LEVELS <= levels <= MAX_LEVELS:
        raise ValueError(
            f"{what}={levels} is outside {MIN_LEVELS}..{MAX_LEVELS}: it counts levels, not bits "
            "(2 bit = 4 levels, ternary = 3, 4 bit = 16, 8 bit = 255 or 256)"
        )
    return levels


def grid_center(levels: int) -> float:
    """The code of value zero, (M - 1) / 2: whole for odd M, half-way between codes for even M."""
    return (levels - 1) / 2


def quantize(x: Tensor, levels: int, step: Tensor | float) -> Tensor:
    """Codes of ``x`` on the grid, as floats in 0..M-1, the same shape as ``x``.

    Ties round to the even code (IEEE). ``step`` broadcasts against ``x``.

    >>> quantize(torch.tensor([-9.0, -0.6, 0.2, 9.0]), levels=3, step=1.0)
    tensor([0., 0., 1., 2.])
    """
    return _codes_(x / step, levels)


def _codes_(u: Tensor, levels: int) -> Tensor:
    """Codes of ``u`` = x / step, written into ``u``: for a whole weight a new tensor costs most."""
    return u.add_(grid_center(levels)).round_().clamp_(0, levels - 1)


def dequantize(codes: Tensor, levels: int, step: Tensor | float) -> Tensor:
    """Values of integer or float ``codes``: ``(code - (M-1)/2) * step``, the shape of ``codes``.

    >>> dequantize(torch.tensor([0.0, 1.0, 2.0, 3.0]), levels=4, step=2.0)
    tensor([-3., -1.,  1.,  3.])
    """
    return (codes - grid_center(levels)).mul_(step)


@cache
def gaussian_step(levels: int) -> float:
    """The step of least mean squared error for N(0,1) input, from the integral (not a table).

    Not in the paper: it starts rows trained from scratch, which standardization keeps close to
    N(0,1). Pretrained rows have outliers that it would clip, so they start from
    ``nn.step_search`` instead.

    >>> round(gaussian_step(2) / 2, 2), round(gaussian_step(16) * 7.5, 2)
    (0.8, 2.51)
    """
    check_levels(levels)
    x = torch.linspace(-8, 8, 32_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(step: float) -> float:
        gap = x - dequantize(quantize(x, levels, step), levels, step)
        return float((gap.square() * density).sum())

    low, high = 1e-3, 4.0  # golden-section search: the error has one minimum in the step
    shrink = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2


# ---------------------------------------------------------------------------------- surrogates

Surrogate = Callable[[Tensor, int], Tensor]
"""A derivative put in place of the staircase's: (u = x / step, levels) -> d value / d x, of u's
shape."""


def _to_threshold(u: Tensor, levels: int) -> Tensor:
    """Distance, in steps, from ``u`` to the nearest of the M-1 thresholds between codes."""
    last = (levels - 2) / 2  # thresholds lie at -last, -last + 1, ..., last
    nearest = ((u + last).round_().clamp_(0, levels - 2)).sub_(last)
    return nearest.sub_(u).abs_()


def _clip(u: Tensor, levels: int) -> Tensor:
    return u.abs().le_(levels / 2)


def _triangle(u: Tensor, levels: int) -> Tensor:
    return (1 - _to_threshold(u, levels)).clamp_(min=0)


def _sigmoid(u: Tensor, levels: int) -> Tensor:
    s = torch.sigmoid(4 * _to_threshold(u, levels))
    return 4 * s * (1 - s)


def _arctan(u: Tensor, levels: int) -> Tensor:
    return 1 / (1 + (math.pi * _to_threshold(u, levels)).square())


def _tanh(u: Tensor, levels: int) -> Tensor:
    return (1 - torch.tanh(_to_threshold(u, levels)).square()) / 2


SURROGATES: dict[str, Surrogate] = {
    "clip": _clip,
    "triangle": _triangle,
    "sigmoid": _sigmoid,
    "arctan": _arctan,
    "tanh": _tanh,
}
"""The surrogate gradients by name. ``clip`` is the straight-through estimator, zero outside the
range. The others are the classic kernels for one threshold, each of area 1; for M > 2 levels we
apply them to the distance from the nearest threshold (not in the paper: it keeps the cost
independent of M). ``clip`` is the default: perplexity 41.9 against 43.5 of the next best (notebook:
"Surrogate gradients on SmolLM2")."""


def get_surrogate(name: str) -> Surrogate:
    """Look a surrogate up by name; ``ValueError`` lists the names there are."""
    if name not in SURROGATES:
        raise ValueError(f"surrogate={name!r} is unknown; choose one of {sorted(SURROGATES)}")
    return SURROGATES[name]


class _ScaledRoundClip(torch.autograd.Function):
    """The scaled round-clip; it saves only the input and the step, backward computes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, levels: int, surrogate: str) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.levels, ctx.surrogate = levels, surrogate
        return dequantize(quantize(x, levels, step), levels, step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        u = x / step
        slope = SURROGATES[ctx.surrogate](u, ctx.levels)
        grad_x = grad * slope if ctx.needs_input_grad[0] else None
        grad_step = None
        if ctx.needs_input_grad[1]:
            # d/ds [s f(x/s)] = f(u) - u f'(u), with f' replaced by the surrogate
            slope.mul_(u)
            unit = _codes_(u, ctx.levels).sub_(grid_center(ctx.levels))
            grad_step = unit.sub_(slope).mul_(grad).sum_to_size(step.shape)
        return grad_x, grad_step, None, None


def scaled_round_clip(
    x: Tensor, levels: int, step: Tensor | float, surrogate: str = "clip"
) -> Tensor:
    """The scaled round-clip function: ``x`` rounded to the nearest of M levels, differentiable.

    Args:
        x: any float tensor.
        levels: M, 2..256.
        step: distance between levels, > 0, broadcastable to ``x``; may require grad.
        surrogate: a key of ``SURROGATES``.

    Our reading of arXiv:2403.14999. The gradient of ``step`` is that of ``step * f(x / step)``,
    which for ``clip`` is the one of LSQ (arXiv:1902.08153).

    >>> scaled_round_clip(torch.tensor([-1.4, 0.3, 0.9]), levels=4, step=1.0)
    tensor([-1.5000,  0.5000,  0.5000])
    """
    check_levels(levels)
    get_surrogate(surrogate)
    return _ScaledRoundClip.apply(x, torch.as_tensor(step).to(x), levels, surrogate)


def token_step(x: Tensor, levels: int, clip_ratio: float = 1.0) -> Tensor:
    """The step of each token of ``x`` (..., D): ``absmax / ((M-1)/2) * clip_ratio``, (..., 1).

    With ``clip_ratio`` 1 nothing is clipped; with few levels that is not the best step: at 15
    levels perplexity is 46.7 with 0.8 and 54.5 with 1 (notebook: "Clipping a token's grid").

    >>> token_step(torch.tensor([[0.5, -3.0]]), levels=3)
    tensor([[3.]])
    """
    absmax = torch.linalg.vector_norm(x.detach(), math.inf, dim=-1, keepdim=True)
    step = absmax / grid_center(levels) * clip_ratio
    return step.clamp_(min=torch.finfo(x.dtype).tiny)


class _OwnGrid(torch.autograd.Function):
    """Every token on the grid of its own step; the whole gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, clip_ratio: float) -> Tensor:
        wide = widen(x)
        step = token_step(wide, levels, clip_ratio)
        return dequantize(quantize(wide, levels, step), levels, step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def round_tokens(x: Tensor, levels: int, clip_ratio: float = 1.0) -> Tensor:
    """Every token of ``x`` (..., D) on the grid of its own ``token_step``, in ``x``'s dtype.

    The whole gradient passes, so that nothing needs to be kept for it. Where nothing is clipped
    that is the gradient of ``scaled_round_clip`` with surrogate ``clip`` and the same step as a
    constant, at a third of the cost. Where values are clipped, the grid still grows with the token:
    a token twice as large gives twice as much, and a gradient without the clipped part would
    deny it.

    >>> round_tokens(torch.tensor([[0.1, -1.5, 0.6]]), levels=4)
    tensor([[ 0.5000, -1.5000,  0.5000]])
    >>> round_tokens(torch.tensor([[0.1, -1.5, 0.6]]), levels=4, clip_ratio=0.5)
    tensor([[ 0.2500, -0.7500,  0.7500]])
    """
    check_levels(levels)
    return _OwnGrid.apply(x, levels, clip_ratio)


# ------------------------------------------------------------------------------------- weights


def center_rows(weight: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """The rows of ``weight`` (out, in) less their means, and their standard deviations (out, 1).

    ``eps`` is added to the variance: the deviation of a constant row is ``sqrt(eps)``, not zero.
    """
    centered = weight - weight.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centered, dim=1, keepdim=True)  # 20 times as fast as var()
    return centered, (norm.square() / weight.shape[1] + eps).sqrt()


def standardize_weight(weight: Tensor) -> Tensor:
    """The rows of ``weight`` (out, in), one an output channel, at mean 0 and variance 1.

    A constant row has nothing but its mean and becomes zeros, not NaN.
    Our reading of arXiv:2403.14999.
    """
    centered, std = center_rows(weight)
    return centered / std


def scale_dtype(groups: int) -> torch.dtype:
    """The dtype of a weight's stored scales: float32 for one a row, bfloat16 for several groups.

    At groups of 64 bfloat16 takes 0.25 bits a weight. It has float32's range, so that no scale is
    too small for it, and becomes float32 by one shift. Its few digits cost nothing: perplexity is
    32.290 with it and 32.305 with float32 (notebook: "What the scales of groups are stored in").
    """
    return torch.float32 if groups == 1 else torch.bfloat16


def stored_scale(scale: Tensor) -> Tensor:
    """``scale`` (out, groups) as it will be stored, in its own dtype; the gradient passes through.

    Training multiplies with this, so that nothing is rounded when a layer is packed.
    """
    if scale.shape[1] == 1:
        return scale
    rounded = scale.detach().to(scale_dtype(scale.shape[1])).to(scale.dtype)
    return scale + (rounded - scale.detach())  # exact: numbers this close subtract exactly


def _grouped(weight: Tensor, table: Tensor) -> Tensor:
    """``weight`` (out, in) viewed as (out, groups, in / groups), for a ``table`` (out, groups)."""
    return weight.unflatten(1, (table.shape[1], -1))


@torch.no_grad()
def weight_codes(weight: Tensor, step: Tensor, levels: int) -> Tensor:
    """The codes (out, in), floats in 0..M-1, of ``weight`` once its rows are standardized.

    ``step`` (out, groups) is in units of the standardized row.
    """
    centered, std = center_rows(weight)
    u = _grouped(centered.div_(std), step).div_(step.unsqueeze(-1))
    return _codes_(u, levels).flatten(1)


def weight_values(codes: Tensor, scale: Tensor, offset: Tensor | None, levels: int) -> Tensor:
    """The float weight (out, in) that ``codes`` stand for: ``scale * (code - (M-1)/2) + offset``.

    ``scale`` (out, groups) is what one code is worth in units of the weight; ``offset`` is (out, 1)
    or None.
    """
    weight = dequantize(_grouped(codes, scale), levels, scale.unsqueeze(-1)).flatten(1)
    return weight if offset is None else weight.add_(offset)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Standardize, round-clip, rescale.

    It saves the latent, which is alive anyway, and backward computes the rest: at 100 M weights
    every saved intermediate would cost 400 MB.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, scale: Tensor, offset: Tensor | None, levels: int
    ) -> Tensor:
        ctx.save_for_backward(weight, step, scale)
        ctx.levels = levels
        return weight_values(weight_codes(weight, step, levels), scale, offset, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, scale = ctx.saved_tensors
        levels: int = ctx.levels
        hat, std = center_rows(weight)
        hat.div_(std)
        u = _grouped(hat, step) / step.unsqueeze(-1)
        grouped = _grouped(grad, step)
        grad_weight = None
        if ctx.needs_input_grad[0]:
            slope = _clip(u, levels).mul_((scale / step).unsqueeze(-1))
            grad_hat = slope.mul_(grouped).flatten(1)
            along = torch.einsum("oi,oi->o", grad_hat, hat).div_(weight.shape[1]).unsqueeze(1)
            grad_hat.sub_(grad_hat.mean(dim=1, keepdim=True)).addcmul_(hat, along, value=-1)
            grad_weight = grad_hat.div_(std)
        unit = _codes_(u, levels).sub_(grid_center(levels))
        grad_scale = unit.mul_(grouped).sum(dim=-1)
        grad_offset = grad.sum(dim=1, keepdim=True) if ctx.needs_input_grad[3] else None
        return grad_weight, None, grad_scale, grad_offset, None


def fake_quantize_weight(
    weight: Tensor, step: Tensor, scale: Tensor, offset: Tensor | None, levels: int
) -> Tensor:
    """The weight a quantized layer multiplies with, differentiable in weight, scale and offset.

    ``W = scale * round_clip(standardize(weight) / step) + offset``, where ``round_clip`` is the
    unit-step staircase. ``step`` (out, groups) divides the standardized rows and is fixed by the
    calibration; ``scale`` (out, groups) is what one code is worth and is learned, its gradient is
    exact. The gradient of ``weight`` is straight-through inside the range and passes through the
    standardization, so latents are scale-invariant (no weight decay on them).
    """
    return _FakeQuantizeWeight.apply(weight, step, scale, offset, levels)


# ---------------------------------------------------------------------- layer-batch normalization


def token_log_ms(x: Tensor, eps: float) -> Tensor:
    """The log mean square of every token, ``log(mean_d x^2 + eps)``: (..., D) -> (...).

    The result is at least float32.
    """
    return (widen(x).square().mean(dim=-1) + eps).log()


def pooled_log_ms(token: Tensor, valid: Tensor | None = None, *, geometric: bool = False) -> Tensor:
    """Each sample's log mean square, pooled over its tokens' ``token`` (B, ...) -> (B, 1, ...).

    Our reading of arXiv:2403.14999: the layer axes of a CNN sample are channel, height and width,
    so for a transformer the statistics pool over tokens *and* features. ``valid`` (B, ...) marks
    the tokens that count (padding does not). In a sample where none counts all do, so that what is
    divided by the statistic stays finite. ``geometric`` averages in the log domain (not in the
    paper: a single massive token then moves the statistic by its log only).
    """
    axes = tuple(range(1, token.dim()))
    if not axes:
        return token
    pooled = token if geometric else token.exp()
    if valid is None:
        pooled = pooled.mean(dim=axes, keepdim=True)
    else:
        valid = valid | ~valid.any(dim=axes, keepdim=True)
        count = valid.sum(dim=axes, keepdim=True)
        pooled = torch.where(valid, pooled, 0).sum(dim=axes, keepdim=True) / count
    return pooled if geometric else pooled.clamp(min=torch.finfo(pooled.dtype).tiny).log()


def hadamard(x: Tensor, size: int) -> Tensor:
    """Every ``size`` neighbors along the last axis times the normalized Hadamard matrix.

    ``x`` is (..., D), D a multiple of ``size``, which is a power of two. The matrix is orthogonal,
    symmetric and its own inverse, so ``hadamard(x) @ hadamard(W).T`` is ``x @ W.T``. Not in the
    paper: it spreads a large value over ``size`` of them, so that a coarse grid fits all. QuaRot
    (arXiv:2404.00456) rotates the residual stream by it; here every layer rotates its own input, so
    that norms keep their gamma. At 4 levels perplexity is 87.7 with it and 140.9 without (notebook:
    "What rotating the inputs is worth").

    Sums and differences are taken in this order, in float32 at least; the compiled transform
    (``kernels.hadamard``) is the same to the last bit.

    >>> hadamard(torch.tensor([4.0, 0.0, 0.0, 0.0]), 4)
    tensor([2., 2., 2., 2.])
    """
    if size < 1 or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"size={size}: a power of two that divides the width {x.shape[-1]}")
    y, half = widen(x) * size**-0.5, 1
    while half < size:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return y.to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it is that: statistics and grids are never narrower."""
    return x if x.dtype == torch.float64 else x.float()


def normalize(x: Tensor, log_ms: Tensor) -> Tensor:
    """``x`` (..., D) over its root mean square, in ``x``'s dtype.

    ``log_ms`` is the log mean square, broadcastable to the token axes (...).
    """
    return (x * torch.exp(-0.5 * log_ms).unsqueeze(-1)).to(x.dtype)
