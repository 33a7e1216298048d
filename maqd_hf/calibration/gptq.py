"""Start values of the weights: a searched grid, error compensation (GPTQ), least-squares scales.

The defaults rest on measurements, each under its title in the notebook. Half the correction of
inherited errors takes 4 levels from 105 to 81 of perplexity, all of it only to 94; the order by
input size from 89 to 81 ("GPTQ: one setting changed at a time"). Sweeps help below 16 levels
("GPTQ: correction and sweeps"). At few levels the number of tokens matters more than any setting:
87.7 with 8,192 of them, 73.7 with 32,768 ("What more calibration tokens are worth to GPTQ").
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..nn import MaQDEmbedding, MaQDLinear
from ..nn.modes import evaluating
from ..nn.step_search import search_step
from .blocks import (
    Batch,
    Batches,
    Call,
    Segment,
    as_batches,
    bfloat16_products,
    counted_tokens,
    find_segments,
    float_activations,
    float_weights,
    input_rows,
    run_body,
    watching,
)
from .compensation import (
    Grid,
    Hessian,
    InputMoments,
    compensate,
    descend,
    fit_scales,
    output_error,
    set_codes,
)


@dataclass(frozen=True)
class LayerResult:
    """The squared output errors of one layer on the calibration inputs, relative to the output's.

    ``rounding_error`` is that of codes rounded to nearest on the searched grid, ``error`` that of
    the layer as it is now. ``unreachable_rows`` counts the rows whose latent could not keep the
    compensated codes.
    """

    rounding_error: float
    error: float
    unreachable_rows: int = 0


@dataclass
class GPTQReport:
    """What ``gptq`` did: ``layers`` has the results by layer name.

    ``searched`` are layers outside the blocks, which only got a weighted grid search; ``unseen``
    are layers that no calibration input reached (they stay as they were).
    """

    layers: dict[str, LayerResult] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values; the results of the layers as a count, two means and a sum."""
        results = self.layers.values()
        count = max(len(results), 1)
        return asdict(self) | {
            "layers": len(results),
            "rounding_error": sum(r.rounding_error for r in results) / count,
            "error": sum(r.error for r in results) / count,
            "unreachable_rows": sum(r.unreachable_rows for r in results),
        }

    def __str__(self) -> str:
        found = self.summary()
        lines = [
            f"GPTQ: {found['layers']} layers, mean relative output error "
            f"{found['rounding_error']:.2e} rounded to nearest, {found['error']:.2e} compensated"
        ]
        if found["unreachable_rows"]:
            lines.append(f"  {found['unreachable_rows']} row(s) could not keep their codes")
        if self.searched:
            lines.append(f"  outside the blocks, grid search only: {', '.join(self.searched)}")
        if self.unseen:
            lines.append(f"  reached by no calibration input: {', '.join(self.unseen)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``gptq`` that its parts need."""

    damp: float
    shrink: float
    act_order: bool
    correction: float
    sweeps: int
    skip_first: bool
    block_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction={self.correction}: a share, 0 (plain GPTQ) to 1")
        if min(self.damp, self.shrink, self.sweeps) < 0 or self.block_size < 1:
            raise ValueError(
                f"damp={self.damp}, shrink={self.shrink}, sweeps={self.sweeps} must be >= 0, "
                f"block_size={self.block_size} >= 1"
            )


def gptq(
    model: nn.Module,
    data: Batches,
    *,
    damp: float = 0.01,
    shrink: float = 0.0,
    act_order: bool = True,
    correction: float = 0.5,
    sweeps: int = 2,
    skip_first: bool = False,
    block_size: int = 128,
    batch_size: int | None = None,
    progress: bool = True,
) -> GPTQReport:
    """Quantize the weights of a freshly converted model with error compensation, in place.

    Args:
        model: a model converted by ``quantize_model``; its latents are taken as the float weights.
        data: token ids (samples, tokens), or batches (ids, or a tokenizer's mappings).
        damp: a share of the mean of the second moment's diagonal, added to the diagonal.
        shrink: the diagonal also grows by this times inputs / tokens of itself. Correlations then
            count for less: chance makes some of them, more with many inputs and few tokens
            (notebook: "Shrinking the correlations of few calibration tokens").
        act_order: round the columns with the largest inputs first.
        correction: how much of the error that a layer's input inherits from the quantized layers
            before it the layer shall make up for, 0 (plain GPTQ) .. 1. Costs one more forward,
            and memory for the inputs of one block's layers on all of ``data``.
        sweeps: passes of coordinate descent over the codes afterwards.
        skip_first: leave first tokens out, as padding always is. That is bad for models that park
            massive activations there: perplexity 84 against 35 (notebook: "First tokens in GPTQ's
            moments").
        block_size: columns that are rounded before the rest of the matrix is updated.
        batch_size: samples in a forward when ``data`` is one tensor; None: as many as fit in 256
            MiB (``as_batches``). One batch is fastest: every block then runs once, otherwise once
            for each group of layers.
        progress: show a bar.

    Blocks are done in the order the model calls them, each on inputs from the quantized ones before
    it, and inside a block layer after layer. The latents stay near the compensated weights and have
    exactly the compensated codes, so training goes on from here. Layers outside the blocks get a
    grid search weighted by their inputs; a head tied to the embedding keeps the embedding's grid.
    Activations are not quantized meanwhile; calibrate their steps afterwards.

    Raises:
        ValueError: no data, nothing to quantize, or inputs with NaN or infinity (names the layer).

    GPTQ is arXiv:2210.17323; the correction has the aim of GPTAQ (arXiv:2504.02692), here as a
    regression: the target W + correction * W E[(x_float - x) x^T] E[x x^T]^-1 replaces W.
    """
    settings = _Settings(damp, shrink, act_order, correction, sweeps, skip_first, block_size)
    names = {
        m: n
        for n, m in model.named_modules()
        if isinstance(m, MaQDLinear) and m.weight_step is not None
    }
    if not names:
        raise ValueError("the model has no quantized weights: convert it with quantize_model first")
    batches = as_batches(data, model, batch_size)
    report = GPTQReport()
    with evaluating(model), float_activations(model), bfloat16_products(model):
        inside = _quantize_blocks(model, batches, settings, names, report, progress)
        _search_outside(model, batches, {m: n for m, n in names.items() if m not in inside}, report)
    known = {*report.layers, *report.searched}
    tied = {id(t.weight) for t in model.modules() if isinstance(t, MaQDEmbedding)}
    report.unseen = [n for m, n in names.items() if n not in known and id(m.weight) not in tied]
    return report


def _quantize_blocks(
    model: nn.Module,
    batches: list[Batch],
    settings: _Settings,
    names: dict[MaQDLinear, str],
    report: GPTQReport,
    progress: bool,
) -> set[nn.Module]:
    """Quantize the blocks in the order the model calls them; returns the modules inside them."""
    segments = find_segments(model, batches[0])
    total = sum(len(segment.calls) for segment in segments)
    with tqdm(total=total, desc="GPTQ", unit="block", disable=not progress) as bar:
        for segment in segments:
            segment.capture(batches)
            walk = _Walk(segment, batches, settings, names, report)
            for call in segment.calls:
                walk.quantize(call)
                bar.update()
            segment.release()
    return {m for s in segments for call in s.calls for m in call.block.modules()}


_FloatInputs = dict[MaQDLinear, tuple[list[MaQDLinear], dict[int, Tensor]]]
"""For the first of the layers that share an input: these layers, and the input by batch."""


class _Walk:
    """Quantizes the blocks of a segment one after the other."""

    def __init__(
        self,
        segment: Segment,
        batches: list[Batch],
        settings: _Settings,
        names: dict[MaQDLinear, str],
        report: GPTQReport,
    ) -> None:
        self.segment, self.settings, self.names, self.report = segment, settings, names, report
        self.counted = [counted_tokens(batch, settings.skip_first) for batch in batches]
        self.float_hidden = list(segment.hidden)

    def quantize(self, call: Call) -> None:
        """Quantize the layers of one block and move the hidden states behind it."""
        floats = self._float_inputs(call)
        if len(self.counted) == 1:
            self._quantize_on_the_way(call, floats)
            return
        for first, (group, inputs) in floats.items():
            moments = InputMoments(first.in_features, first.weight.device)
            for index, counted in enumerate(self.counted):
                x = self.segment.input_of(first, call, index)
                if x is not None:
                    moments.add(input_rows(first, x, counted), inputs.pop(index, None))
            if moments.tokens:
                self._quantize_group(group, moments)
        self.segment.advance(call)

    def _quantize_on_the_way(self, call: Call, floats: _FloatInputs) -> None:
        """Quantize the layers of one block while the only batch runs through it.

        No layer has to wait for other batches, so one forward does, and finds every layer before
        the next one quantized.
        """

        def see(layer: MaQDLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in floats:
                group, inputs = floats.pop(layer)
                moments = InputMoments(layer.in_features, layer.weight.device)
                x = args[0] if args else kwargs["input"]
                moments.add(input_rows(layer, x, self.counted[0]), inputs.pop(0, None))
                self._quantize_group(group, moments)

        with watching(list(floats), see):
            self.segment.advance(call)

    def _float_inputs(self, call: Call) -> _FloatInputs:
        """Which layers share an input, and what that input is in the float model, by batch.

        It moves the float hidden states behind the block, whose latents must be unchanged. Without
        correction nobody needs those states, and the first batch alone tells the groups.
        """
        found: _FloatInputs = {}
        leader: dict[nn.Module, MaQDLinear] = {}
        current: dict[MaQDLinear, Tensor] = {}  # inputs of this batch
        index = 0

        def see(layer: MaQDLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if layer not in leader:
                same = (m for m, seen in current.items() if seen is x)
                leader[layer] = next((m for m in same if m.rotation == layer.rotation), layer)
                found.setdefault(leader[layer], ([], {}))[0].append(layer)
            if leader[layer] is layer and layer not in current:  # its first call counts
                current[layer] = x
                if self.settings.correction:
                    found[layer][1][index] = input_rows(layer, x, self.counted[index])

        todo = [
            m
            for m in call.block.modules()
            if isinstance(m, MaQDLinear) and self.names.get(m, "") not in {"", *self.report.layers}
        ]
        with float_weights(call.block), watching(todo, see):
            for index, hidden in enumerate(self.float_hidden):
                current.clear()
                self.float_hidden[index] = self.segment.run(call, index, hidden)
                if not self.settings.correction:
                    break
        return found

    def _quantize_group(self, group: list[MaQDLinear], moments: InputMoments) -> None:
        """Quantize the layers of ``group``, which share an input with these ``moments``."""
        settings = self.settings
        with torch.autocast(moments.second.device.type, enabled=False):
            try:
                shrink = settings.shrink * len(moments.second) / moments.tokens
                hessian = Hessian.of(moments.second, settings.damp, settings.act_order, shrink)
            except ValueError as error:
                raise ValueError(f"{self.names[group[0]]}: {error}") from error
            for layer in group:
                result = _quantize_layer(layer, moments, hessian, settings)
                self.report.layers[self.names[layer]] = result


def _quantize_layer(
    layer: MaQDLinear, moments: InputMoments, hessian: Hessian, settings: _Settings
) -> LayerResult:
    """Give ``layer`` compensated codes on a searched grid, and their best scales."""
    _, _, log_scale = layer.grid()
    second = moments.second
    target = layer.weight.detach().float().clone()
    if moments.drift is not None:
        target += settings.correction * hessian.solve(target @ moments.drift)
    grid = _search_grid(layer, target, second.diagonal())
    nearest = grid.codes(target)
    rounding_error = output_error(target, grid.values(nearest), second)
    codes, wanted = compensate(target, grid, hessian, settings.block_size)
    if settings.sweeps:
        codes, wanted = descend(target, grid, codes, hessian, settings.block_size, settings.sweeps)
    worse = output_error(target, grid.values(codes), second) > rounding_error
    codes = torch.where(worse.unsqueeze(1), nearest, codes)
    wanted = torch.where(worse.unsqueeze(1), target, wanted)
    unreachable = set_codes(layer, codes, wanted, grid)
    has_offset = layer.weight_offset is not None
    scale, offset = fit_scales(target, layer.weight_codes(), grid, second, has_offset)
    log_scale.copy_(scale.log())
    if layer.weight_offset is not None:
        layer.weight_offset.copy_(offset)
    size = float(output_error(target, torch.zeros_like(target), second).sum()) or 1.0
    error = float(output_error(target, layer.quantized_weight(), second).sum())
    return LayerResult(float(rounding_error.sum()) / size, error / size, unreachable)


def _search_grid(layer: MaQDLinear, weight: Tensor, input_square: Tensor) -> Grid:
    """The grid of least error of ``weight``, each column weighted by its mean squared input."""
    levels, weight_step, _ = layer.grid()
    center = weight.mean(dim=1, keepdim=True)
    if layer.weight_offset is None:
        center = torch.zeros_like(center)
    groups = weight_step.shape[1]
    floor = 1e-6 * float(input_square.mean()) or 1.0  # silent inputs still count a little
    importance = (input_square + floor).view(groups, -1)
    grouped = (weight - center).view(len(weight), groups, -1)
    return Grid(search_step(grouped, levels, importance), center, levels)


def _search_outside(
    model: nn.Module, batches: list[Batch], names: dict[MaQDLinear, str], report: GPTQReport
) -> None:
    """Search the grids of layers outside the blocks, weighted by inputs from quantized blocks."""
    tied = {id(table.weight) for table in model.modules() if isinstance(table, MaQDEmbedding)}
    squares: dict[MaQDLinear, Tensor] = {}
    counted: Tensor | None = None

    def see(layer: MaQDLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        square = input_rows(layer, args[0] if args else kwargs["input"], counted).square().sum(0)
        squares[layer] = squares[layer] + square if layer in squares else square

    layers = [layer for layer in names if id(layer.weight) not in tied]
    if not layers:
        return
    with watching(layers, see):
        for batch in batches:
            counted = counted_tokens(batch, skip_first=False)
            run_body(model, batch)
    for layer, square in squares.items():
        if not bool(square.isfinite().all()):
            raise ValueError(f"{names[layer]}: its calibration inputs hold NaN or infinity")
        weight = layer.weight.detach().float()
        grid = _search_grid(layer, weight, square)
        layer.set_grid(grid.step, grid.center, refit=True)
        report.searched.append(names[layer])
