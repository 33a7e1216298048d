"""The training of one transformer block towards wanted outputs: loss, learning rates, optimizer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import MaQDLinear
from ..blocks import Batch, Call, Segment, counted_tokens

# Learning rates by levels, as shares of a row's standard deviation, for 50 to 100 optimizer steps.
# 0.01 was measured at 4 and 16 levels (notebook: "Block-wise reconstruction, its settings"); the
# rate for finer grids is a guess, by which a change of Adam's stays below the grid's step.
_LEARNING_RATES = {16: 0.01, 256: 0.001}
_HELD_OUT = 8  # one batch in so many is held out


@dataclass(frozen=True)
class BlockSettings:
    """The arguments of ``reconstruct_blocks`` that say how a block is trained."""

    learning_rate: float | None
    scale_learning_rate: float
    epochs: int
    gradient_clip: float
    correction: float
    relative_tokens: bool
    skip_first: bool
    autocast: bool
    seed: int

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: at least 1")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction={self.correction}: a share, 0 (local) to 1 (float)")
        rates = (self.learning_rate or 0.0, self.scale_learning_rate)
        if min(rates) < 0 or not self.gradient_clip > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate}, scale_learning_rate="
                f"{self.scale_learning_rate} must be >= 0, gradient_clip={self.gradient_clip} > 0"
            )


class BlockTraining:
    """One block with its inputs, its targets, and the weight of each token's squared error."""

    def __init__(
        self,
        segment: Segment,
        call: Call,
        targets: list[Tensor],
        batches: list[Batch],
        settings: BlockSettings,
    ) -> None:
        self.segment, self.call, self.targets, self.settings = segment, call, targets, settings
        self.module = call.block
        self.weights = [
            token_weights(target, batch, settings)
            for target, batch in zip(targets, batches, strict=True)
        ]
        self.sizes = [
            float((w * t.float().square().sum(-1)).sum(dtype=torch.float64))
            for w, t in zip(self.weights, targets, strict=True)
        ]
        count = len(targets)
        held = -(-count // _HELD_OUT) if count > 1 else 0
        self.training = range(count - held)
        self.held_out = range(count - held, count) if held else self.training

    def gap(self, index: int) -> Tensor:
        """The squared error of batch ``index``, a weighted sum over its tokens, ()."""
        y = self.segment.run(self.call, index, self.segment.hidden[index])
        square = (y.float() - self.targets[index].float()).square().sum(-1)
        return (self.weights[index] * square).sum()

    def error(self) -> float:
        """The squared error on the held-out batches, relative to the target's square."""
        total = sum(float(self.gap(index)) for index in self.held_out)
        return total / (sum(self.sizes[index] for index in self.held_out) or 1.0)

    def train(
        self, parameters: dict[str, nn.Parameter], error: float, order: random.Random
    ) -> None:
        """Train ``parameters`` with AdamW, one batch an optimizer step, in a random ``order``.

        ``error`` is the relative error before training, which is the unit of the loss: relative to
        the output alone, gradients of a good start would vanish beside Adam's eps.
        """
        settings = self.settings
        indices, steps = list(self.training), settings.epochs * len(self.training)
        size = sum(self.sizes[index] for index in indices) / len(indices) * error or 1.0
        values = list(parameters.values())
        groups = parameter_groups(self.module, parameters, settings)
        with unit_rows(self.module, {id(p) for p in values}):
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-12)
            decay = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
            )
            for _ in range(settings.epochs):
                order.shuffle(indices)
                for index in indices:
                    with torch.enable_grad():
                        loss = self.gap(index) / size
                        grads = torch.autograd.grad(loss, values, allow_unused=True)
                    for parameter, grad in zip(values, grads, strict=True):
                        parameter.grad = grad
                    nn.utils.clip_grad_norm_(values, settings.gradient_clip)
                    optimizer.step()
                    decay.step()
            optimizer.zero_grad()


def token_weights(target: Tensor, batch: Batch, settings: BlockSettings) -> Tensor:
    """The weight of each token's squared error, (batch, tokens) float32."""
    weights = torch.ones(target.shape[:-1], device=target.device)
    counted = counted_tokens(batch, settings.skip_first)
    if counted is not None and counted.shape == weights.shape:
        weights = counted.float()
    if settings.relative_tokens:
        weights = weights / target.float().square().sum(-1).clamp(min=1e-12)
    return weights


def parameter_groups(
    block: nn.Module, parameters: dict[str, nn.Parameter], settings: BlockSettings
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one for each parameter; rates as in ``reconstruct_blocks``."""
    groups = []
    for name, parameter in parameters.items():
        prefix, _, own = name.rpartition(".")
        owner = block.get_submodule(prefix)
        rate = settings.scale_learning_rate
        if own not in ("weight_log_scale", "log_step"):
            levels = owner.spec.weight_levels if isinstance(owner, MaQDLinear) else None
            given = settings.learning_rate
            rate = _default_rate(levels) if given is None else given
            if not _is_latent(owner, parameter):
                weight = getattr(owner, "weight", None)
                size = weight if isinstance(weight, Tensor) else parameter
                rate *= float(size.detach().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": rate})
    return groups


def _default_rate(levels: int | None) -> float:
    """The rate of the next known number of levels; float layers get the rate of the largest."""
    known = [count for count in _LEARNING_RATES if levels is not None and count >= levels]
    return _LEARNING_RATES[min(known, default=max(_LEARNING_RATES))]


def _is_latent(module: nn.Module, parameter: Tensor) -> bool:
    """Whether ``parameter`` is the weight that a quantized layer standardizes."""
    return (
        isinstance(module, MaQDLinear)
        and module.weight_step is not None
        and parameter is module.weight
    )


@contextmanager
def unit_rows(block: nn.Module, trained: set[int]) -> Iterator[None]:
    """For a while, latent rows have mean 0 and standard deviation 1, which changes no output."""
    latents = [
        m.weight
        for m in block.modules()
        if isinstance(m, MaQDLinear) and _is_latent(m, m.weight) and id(m.weight) in trained
    ]
    means = [w.mean(1, keepdim=True) for w in latents]
    sizes = [(w.var(1, keepdim=True, correction=0) + 1e-12).sqrt() for w in latents]
    for latent, mean, size in zip(latents, means, sizes, strict=True):
        latent.sub_(mean).div_(size)
    try:
        yield
    finally:
        for latent, mean, size in zip(latents, means, sizes, strict=True):
            latent.mul_(size).add_(mean)
