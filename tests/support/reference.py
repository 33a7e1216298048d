"""The method again, slowly: paper-shaped formulas in plain loops, the oracle of the law tests.

Nothing here calls ``maqd_hf``. Where the package fuses, chunks or saves memory, this file loops.
Our reading of arXiv:2403.14999.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------ grid


def level_values(levels: int) -> list[float]:
    """The M values of the grid with step 1, smallest first."""
    return [code - (levels - 1) / 2 for code in range(levels)]


def thresholds(levels: int) -> list[float]:
    """The M - 1 points half-way between neighboring levels."""
    values = level_values(levels)
    return [(low + high) / 2 for low, high in pairwise(values)]


def nearest_code(u: float, levels: int) -> int:
    """Argmin of the distance to the M levels (ties: the lower one)."""
    distances = [abs(u - value) for value in level_values(levels)]
    return distances.index(min(distances))


def heaviside_sum(u: float, levels: int) -> float:
    """The round-clip as the paper draws it: the lowest level plus one step per threshold passed."""
    return level_values(levels)[0] + sum(1.0 for point in thresholds(levels) if u > point)


def round_clip(x: Tensor, levels: int, step: Tensor | float) -> Tensor:
    """``step * f(x / step)``, element by element."""
    steps = torch.as_tensor(step, dtype=x.dtype).expand_as(x).flatten().tolist()
    values = [
        s * heaviside_sum(v / s, levels) for v, s in zip(x.flatten().tolist(), steps, strict=True)
    ]
    return torch.tensor(values, dtype=x.dtype).view_as(x)


# ------------------------------------------------------------------------------------ surrogates


def _kernel(name: str, distance: float) -> float:
    """The surrogate of one Heaviside at ``distance`` from its threshold; area 1."""
    if name == "triangle":
        return max(0.0, 1 - abs(distance))
    if name == "sigmoid":  # derivative of sigmoid(4 d)
        return 4 * math.exp(-4 * abs(distance)) / (1 + math.exp(-4 * abs(distance))) ** 2
    if name == "arctan":  # derivative of arctan(pi d) / pi
        return 1 / (1 + (math.pi * distance) ** 2)
    if name == "tanh":  # derivative of tanh(d) / 2
        return 0.5 / math.cosh(distance) ** 2
    raise KeyError(name)


def surrogate(name: str, u: float, levels: int) -> float:
    """d f / d u put in place of the staircase's: the kernel of the nearest threshold."""
    if name == "clip":
        return 1.0 if -levels / 2 <= u <= levels / 2 else 0.0
    return max(_kernel(name, u - point) for point in thresholds(levels))


def step_gradient(name: str, x: float, step: float, levels: int) -> float:
    """d/ds of ``s f(x / s)`` with f' replaced by the surrogate: ``f(u) - u f'(u)``."""
    u = x / step
    return heaviside_sum(u, levels) - u * surrogate(name, u, levels)


# --------------------------------------------------------------------------------------- weights


def standardize(weight: Tensor, eps: float = 1e-12) -> Tensor:
    """Row by row: less the mean, by the root of the mean square (+ eps)."""
    rows = []
    for row in weight:
        centered = row - sum(row) / len(row)
        rows.append(centered / (sum(centered * centered) / len(row) + eps) ** 0.5)
    return torch.stack(rows)


def fake_quantized_weight(
    weight: Tensor, step: Tensor, scale: Tensor, offset: Tensor | None, levels: int
) -> Tensor:
    """Composed autograd, no custom Function: straight-through by the detach trick, per group."""
    hat = standardize(weight)
    width = weight.shape[1] // step.shape[1]
    rows = []
    for i, row in enumerate(hat):
        parts = []
        for j, group in enumerate(row.split(width)):
            u = group / step[i, j]
            inside = u.clamp(-levels / 2, levels / 2)  # gradient 1 inside the range, 0 outside
            parts.append(
                scale[i, j] * (inside + (round_clip(u.detach(), levels, 1.0) - inside).detach())
            )
        rows.append(torch.cat(parts) + (0 if offset is None else offset[i]))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------- packing


def packed_row(codes: list[int], levels: int) -> list[int]:
    """Words (signed 32 bit) of one row, with Python's integers."""
    digits = 0
    while levels ** (digits + 1) <= 2**32:
        digits += 1
    words = []
    for start in range(0, len(codes), digits):
        word = sum(code * levels**place for place, code in enumerate(codes[start : start + digits]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


# ------------------------------------------------------------------- layer-batch normalization


def layer_batch_norm(
    x: Tensor,
    *,
    eps: float,
    gate: float = 1.0,
    centered: bool = False,
    geometric: bool = False,
    valid: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Training forward of (samples, tokens, features), one sample and one token at a time.

    ``valid``: padding is False and does not count. ``first``: tokens that keep their own statistic
    and do not count either. A sample none of whose tokens counts is pooled over all of them.
    """
    samples = []
    for b, sample in enumerate(x):
        tokens = [token - token.mean() if centered else token for token in sample]
        own = [((token * token).sum() / len(token) + eps).log() for token in tokens]
        counted = [
            t
            for t in range(len(tokens))
            if (valid is None or bool(valid[b, t])) and (first is None or not bool(first[b, t]))
        ] or list(range(len(tokens)))
        pooled = sample_log_ms([own[t] for t in counted], geometric)
        out = []
        for t, token in enumerate(tokens):
            mixed = (1 - gate) * own[t] + gate * pooled
            if first is not None and bool(first[b, t]):
                mixed = own[t]
            out.append(token / (mixed / 2).exp())
        samples.append(torch.stack(out))
    return torch.stack(samples)


def sample_log_ms(token_log_ms: list[Tensor], geometric: bool) -> Tensor:
    """Log of the sample's statistic: arithmetic or geometric mean of its tokens' mean squares."""
    if geometric:
        return sum(token_log_ms, torch.zeros(())) / len(token_log_ms)
    return (sum((log.exp() for log in token_log_ms), torch.zeros(())) / len(token_log_ms)).log()
