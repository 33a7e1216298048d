"""Start values of the static activation steps, from real inputs.

The step of a layer's input is the one of least squared error. Each token's error is divided by the
token's own size, so that a few loud tokens cannot own the step, and each feature's is weighted by
the size of the weights it meets. Tokens are sampled, so memory does not grow with the data. Not in
the paper: it does not say where the steps start.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..functional import dequantize, grid_center, quantize
from ..nn import ActivationQuantizer, MaQDLinear
from ..nn.modes import evaluating
from .blocks import (
    Batch,
    Batches,
    as_batches,
    counted_tokens,
    float_activations,
    input_rows,
    run_body,
    watching,
)

logger = logging.getLogger(__name__)

_DECADES = 3.0  # how far below the full range a step is looked for
_COARSE = 25  # candidates in that range


def _token_error(rows: Tensor, importance: Tensor, levels: int, step: float) -> float:
    """The mean over tokens of (weighted squared error / weighted squared size)."""
    gap = (dequantize(quantize(rows, levels, step), levels, step) - rows).square_()
    size = rows.square() @ importance
    return float(((gap @ importance) / size.clamp(min=torch.finfo(rows.dtype).tiny)).mean())


def best_step(rows: Tensor, levels: int, importance: Tensor | None = None) -> float:
    """The static step for ``rows`` (tokens, features), in their units.

    It has the least mean over tokens of the weighted squared error relative to the token's weighted
    square; ``importance`` (features,) >= 0 are the weights. Inputs that are all zero get step 1; an
    ``importance`` that is zero everywhere counts as none.

    Raises:
        ValueError: ``rows`` hold NaN or infinity.

    >>> round(best_step(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), levels=4), 2)
    2.0
    """
    full = float(rows.abs().max()) / grid_center(levels) if rows.numel() else 0.0
    if not math.isfinite(full):
        raise ValueError("the inputs hold NaN or infinity: the model or the data is broken")
    if full == 0:
        return 1.0
    if importance is None or not bool(importance.any()):
        importance = torch.ones_like(rows[0])

    def error(log_step: float) -> float:
        return _token_error(rows, importance, levels, math.exp(log_step))

    top = math.log(full)
    width = _DECADES * math.log(10) / (_COARSE - 1)
    best = min((top - i * width for i in range(_COARSE)), key=error)
    while width > 0.01:
        width /= 2
        best = min((best - width, best, best + width), key=error)
    return math.exp(best)


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    data: Batches,
    *,
    batch_size: int | None = None,
    max_tokens: int = 512,
    progress: bool = True,
) -> dict[str, float]:
    """Set the step of every static activation quantizer of a QAT model from real inputs.

    Args:
        model: a model converted by ``quantize_model``; its weights are used as they are
            quantized, so calibrate these first.
        data: token ids (samples, tokens), or batches (ids, or a tokenizer's mappings).
        batch_size: samples in a forward when ``data`` is one tensor; None: as ``gptq``.
        max_tokens: tokens kept per layer, spread evenly over the batches.
        progress: show bars.

    First tokens do not take part where they have a step of their own (``first_token="own"``), nor
    does padding. Returns the step of each layer by name; nothing to do gives an empty dict.

    Raises:
        ValueError: no data, or inputs with NaN or infinity (the message names the layer).
    """
    names = {
        layer: name
        for name, layer in model.named_modules()
        if isinstance(layer, MaQDLinear) and layer.spec.static_activations
    }
    batches = as_batches(data, model, batch_size)
    if not names:
        return {}
    inputs = _observe(model, list(names), batches, max_tokens, progress)
    steps: dict[str, float] = {}
    for layers, rows in tqdm(inputs, desc="activation steps", disable=not progress):
        importance = torch.stack([layer.quantized_weight().square().sum(0) for layer in layers])
        levels = layers[0].spec.input_grid_levels
        try:
            step = best_step(rows, levels, importance.sum(0).float())
        except ValueError as error:
            raise ValueError(f"{names[layers[0]]}: {error}") from error
        for layer in layers:
            quantizer_of(layer).set_step(step)
            steps[names[layer]] = step
    unseen = [name for name in names.values() if name not in steps]
    if unseen:
        logger.warning("no calibration input reached %s: not calibrated", ", ".join(unseen))
    return steps


def quantizer_of(layer: MaQDLinear) -> ActivationQuantizer:
    """The quantizer on the input of ``layer``; ``ValueError`` where the input is float."""
    if not isinstance(layer.activation, ActivationQuantizer):
        raise ValueError("the layer's input is float: it has no activation step")
    return layer.activation


def _observe(
    model: nn.Module,
    layers: list[MaQDLinear],
    batches: list[Batch],
    max_tokens: int,
    progress: bool,
) -> list[tuple[list[MaQDLinear], Tensor]]:
    """Sampled inputs (tokens, features), each with the layers that share it and hence its step."""
    per_batch = -(-max_tokens // len(batches))
    leader: dict[MaQDLinear, MaQDLinear] = {}
    samples: dict[MaQDLinear, list[Tensor]] = {}
    last: tuple[Tensor | None, MaQDLinear | None] = (None, None)
    batch: Batch = {}

    def see(layer: MaQDLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal last
        x = args[0] if args else kwargs["input"]
        first = last[1] if last[0] is x else None
        if layer not in leader:
            leader[layer] = first if first is not None and _same_input(first, layer) else layer
        last = (x, leader[layer])
        if leader[layer] is layer:
            rows = input_rows(layer, x, counted_tokens(batch, layer.spec.first_token == "own"))
            chosen = torch.linspace(0, len(rows) - 1, min(per_batch, len(rows))).long()
            samples.setdefault(layer, []).append(rows[chosen.to(rows.device)])

    with evaluating(model), float_activations(model), watching(layers, see):
        for batch in tqdm(batches, desc="observing activations", disable=not progress):
            run_body(model, batch)
            last = (None, None)
    return [
        ([layer for layer, first in leader.items() if first is key], torch.cat(rows))
        for key, rows in samples.items()
    ]


def _same_input(a: MaQDLinear, b: MaQDLinear) -> bool:
    """Whether one step can serve both layers when they read the same tensor."""
    return (a.spec.activation_levels, a.spec.first_token, a.rotation) == (
        b.spec.activation_levels,
        b.spec.first_token,
        b.rotation,
    )
