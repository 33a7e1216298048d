"""Start values of the weights: a searched grid, error compensation (GPTQ), least-squares scales.

What helped, on stories260K (Llama, 0.26 M; one scale per row; 32x256 tokens of TinyStories; nats on
256 other windows, float 1.598):

===============================================  ======  ======  ======  ======
weight levels                                        16       8       4       3
===============================================  ======  ======  ======  ======
plain GPTQ (correction=0, sweeps=0)               1.688   2.074   3.510   4.237
correction=0.5, sweeps=2                          1.672   1.947   3.009   3.512
===============================================  ======  ======  ======  ======

With an earlier version (no cost on row means, scales fitted to the damped moments):

===============================================  ======  ======  ======  ======
plain GPTQ, scales of the searched grid           1.687   2.075   3.511   4.219
least-squares scales and offset                   1.691   2.043   3.460   4.275
the same, sweeps=2                                1.685   2.040   3.401   3.965
the same, correction=1                            1.676   1.990   3.251   3.873
the same, correction=0.5                          1.669   1.954   3.073   3.682
the same, correction=0.5, sweeps=2                1.668   1.934   2.967   3.539
===============================================  ======  ======  ======  ======

So the correction is what matters, half of it more than all of it; sweeps help below 16 levels;
least-squares scales alone are a wash. All of the above left first tokens out (skip_first=True),
which this model bears and SmolLM2-135M does not: see ``gptq``.

One setting changed at a time on SmolLM2-135M (groups of 64; only the first 10 of 30 blocks
quantised, on 8x512 tokens of WikiText-2 validation; perplexity of 12 windows of 512 of its raw test
text in bfloat16, float 33.95, one run each):

===============================================  ======  ======
weight levels                                        16       4
===============================================  ======  ======
as it is by default                               36.89   80.98
correction=0                                      36.92  104.92
correction=1                                      37.52   94.26
damp=0.03                                         36.52   78.16
act_order=False                                   36.59   89.28
sweeps=0                                          36.70   81.92
sweeps=4                                          36.80   84.94
===============================================  ======  ======

Here too half the correction is best, and act_order pays at few levels. The rest is one to five
percent on one run each, too little to choose by: damp=0.03 is better in both columns, more sweeps
lower the layers' own error but not the perplexity. The whole model with the defaults and 16x512
tokens: results/ptq-*.json.

At few levels the number of tokens matters more than any setting: 1536 inputs have a million second
moments, and what little text leaves to chance the compensation takes for a law. The whole model, 4
levels, groups of 64, 8-bit inputs, smoothed and rotated, samples of 256 tokens; perplexity of 24
windows of WikiText-2 / IMDB (float 32.3 / 47.9), before and after distillation (at a rate of
2.5e-4, the longer one at 5e-4):

=======  ==============  ====================  ====================
tokens           start   16,384 more, trained  65,536 more, trained
=======  ==============  ====================  ====================
  8,192    87.7 / 127.1          69.8 /  95.3          60.9 /  88.4
 32,768    73.7 / 110.3          61.2 /  86.1
=======  ==============  ====================  ====================

With the more of them correction=1 is no worse than half. With the fewer, ``shrink`` makes up for
part of what is missing, with the more it is not needed, so it is left to the user; the first 10
blocks alone, 12 windows:

=============================================  ======  =============
4 levels                                       tokens
=============================================  ======  =============
shrink=0, damp=0.01                             8,192  50.0 /  80.7
damp=0.05                                       8,192  48.5 /  78.2
damp=0.2                                        8,192  47.3 /  77.6
damp=0.2, correction=1                          8,192  47.9 /  77.5
damp=0.6                                        8,192  48.2 /  79.5
shrink=1                                        8,192  49.0 /  77.0
shrink=3                                        8,192  47.6 /  77.5
diagonal 1.2 times itself, whatever the layer   8,192  47.3 /  76.3
the same, 16 levels: 34.74 / 51.19 becomes      8,192  34.38 / 51.26
shrink=0                                       32,768  45.0 /  73.1
shrink=0, correction=1                         32,768  45.4 /  72.8
diagonal 1.07 times itself                     32,768  45.4 /  71.6
diagonal 1.2 times itself                      32,768  45.5 /  73.6
=============================================  ======  =============

Tokens that count by what an error of the layer's output costs the model there (the mean square of
its gradient, labels drawn from the model itself; GuidedQuant, arXiv:2505.07004, has this for groups
of outputs) take one more backward and gain little. SmolLM2-135M, whole model, 3 levels, 32,768
tokens: 127.8 / 178.9 becomes 126.0 / 171.5 with half of it and half of equal counts, and 125.3 /
165.1 with its root. In the first blocks a hundredth of the tokens owns the mean. stories260K (one
scale per row, mean of 3 seeds): 2.780 nats at 4 levels become 2.799 and 2.903, 2.979 with all of
it; at 16 levels nothing changes.
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
    """Squared output error on the calibration inputs, relative to the squared output.

    ``rounding_error``: codes rounded to nearest on the searched grid; ``error``: what came out.
    ``unreachable_rows``: rows whose latent could not keep the compensated codes.
    """

    rounding_error: float
    error: float
    unreachable_rows: int = 0


@dataclass
class GPTQReport:
    """What ``gptq`` did: results by layer name, layers that only got a weighted grid search, and
    layers that no calibration input reached (they stay as they were)."""

    layers: dict[str, LayerResult] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values: what ``layers`` holds as a count, means and a sum; the rest as is."""
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
    damp: float
    shrink: float
    act_order: bool
    correction: float
    sweeps: int
    skip_first: bool
    block_size: int


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
    """Quantise the weights of a freshly converted model with error compensation, in place.

    Args:
        model: a model converted by ``quantize_model``; its latents are taken as the float weights.
        data: token ids (samples, tokens), or batches (ids, or a tokenizer's mappings).
        damp: added to the second moment's diagonal, as a share of its mean.
        shrink: times inputs / tokens, a share of itself that the diagonal gets on top: correlations
            count for less, of which chance makes some, the more inputs and the fewer tokens there
            are, the more.
        act_order: round the columns with the largest inputs first.
        correction: how much of the error that a layer's input inherits from the quantised layers
            before it the layer shall make up for, 0 (plain GPTQ) .. 1. Costs one more forward,
            and memory for the inputs of one block's layers on all of ``data``.
        sweeps: of coordinate descent over the codes afterwards.
        skip_first: leave first tokens out; padding always is. Bad for models that park massive
            activations there: the error then goes into the columns only they use (SmolLM2-135M,
            16 levels, groups of 64: perplexity 84 against 35, float 25).
        block_size: columns rounded before the rest of the matrix is updated.
        batch_size: samples in a forward when ``data`` is one tensor; None: what fits in 256 MiB
            (``as_batches``). Fastest is one batch: every block then runs once, else once per group
            of layers.
        progress: show a bar.

    Blocks are done in the order the model calls them, each on inputs from the quantised ones before
    it, and inside a block layer after layer. The latents stay near the compensated weights and have
    exactly the compensated codes, so training goes on from here. Layers outside the blocks get a
    grid search weighted by their inputs; a head tied to the embedding keeps the embedding's grid.
    Activations are not quantised meanwhile; calibrate their steps afterwards.

    Raises:
        ValueError: no data, nothing to quantise, or inputs with NaN or infinity (names the layer).

    GPTQ is arXiv:2210.17323; the correction has the aim of GPTAQ (arXiv:2504.02692), here as a
    regression: the target W + correction * W E[(x_float - x) x^T] E[x x^T]^-1 replaces W.
    """
    if not 0 <= correction <= 1:
        raise ValueError(f"correction={correction}: a share, 0 (plain GPTQ) to 1")
    if min(damp, shrink, sweeps) < 0 or block_size < 1:
        raise ValueError(
            f"damp={damp}, shrink={shrink}, sweeps={sweeps} must be >= 0, "
            f"block_size={block_size} >= 1"
        )
    names = {
        m: n
        for n, m in model.named_modules()
        if isinstance(m, MaQDLinear) and m.weight_step is not None
    }
    if not names:
        raise ValueError("the model has no quantised weights: convert it with quantize_model first")
    batches = as_batches(data, model, batch_size)
    settings = _Settings(damp, shrink, act_order, correction, sweeps, skip_first, block_size)
    report = GPTQReport()
    with evaluating(model), float_activations(model), bfloat16_products(model):
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
        inside = {m for s in segments for call in s.calls for m in call.block.modules()}
        _search_outside(model, batches, {m: n for m, n in names.items() if m not in inside}, report)
    known = {*report.layers, *report.searched}
    tied = {id(t.weight) for t in model.modules() if isinstance(t, MaQDEmbedding)}
    report.unseen = [n for m, n in names.items() if n not in known and id(m.weight) not in tied]
    return report


_FloatInputs = dict[MaQDLinear, tuple[list[MaQDLinear], dict[int, Tensor]]]
"""By the first of the layers that share an input: these layers, and the input by batch."""


class _Walk:
    """Quantises the blocks of a segment one after the other."""

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
        """Quantise the layers of one block and move the hidden states behind it."""
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
        """The same when all data is one batch: no layer has to wait for other batches, so one
        forward does, which finds every layer quantised when it gets there."""

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(layer, MaQDLinear)
            if layer in floats:
                group, inputs = floats.pop(layer)
                moments = InputMoments(layer.in_features, layer.weight.device)
                x = args[0] if args else kwargs["input"]
                moments.add(input_rows(layer, x, self.counted[0]), inputs.pop(0, None))
                self._quantize_group(group, moments)

        with watching(list(floats), see):
            self.segment.advance(call)

    def _float_inputs(self, call: Call) -> _FloatInputs:
        """Which layers share an input, and what it is in the float model, batch by batch.

        The block's weights must still be float. Moves the float hidden states behind the block;
        without correction nobody needs these, and the first batch tells the groups.
        """
        found: _FloatInputs = {}
        leader: dict[nn.Module, MaQDLinear] = {}
        current: dict[MaQDLinear, Tensor] = {}  # inputs of this batch
        index = 0

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(layer, MaQDLinear)
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
    assert layer.weight_step is not None and layer.weight_log_scale is not None
    assert layer.spec.weight_levels is not None
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
    layer.weight_log_scale.copy_(scale.log())
    if layer.weight_offset is not None:
        layer.weight_offset.copy_(offset)
    size = float(output_error(target, torch.zeros_like(target), second).sum()) or 1.0
    error = float(output_error(target, layer.quantized_weight(), second).sum())
    return LayerResult(float(rounding_error.sum()) / size, error / size, unreachable)


def _search_grid(layer: MaQDLinear, weight: Tensor, input_square: Tensor) -> Grid:
    """The grid of least error of ``weight``, each column weighted by its mean squared input."""
    assert layer.weight_step is not None and layer.spec.weight_levels is not None
    centre = weight.mean(dim=1, keepdim=True)
    if layer.weight_offset is None:
        centre = torch.zeros_like(centre)
    groups = layer.weight_step.shape[1]
    floor = 1e-6 * float(input_square.mean()) or 1.0  # silent inputs still count a little
    importance = (input_square + floor).view(groups, -1)
    grouped = (weight - centre).view(len(weight), groups, -1)
    step = search_step(grouped, layer.spec.weight_levels, importance)
    return Grid(step, centre, layer.spec.weight_levels)


def _search_outside(
    model: nn.Module, batches: list[Batch], names: dict[MaQDLinear, str], report: GPTQReport
) -> None:
    """Weighted search for layers outside the blocks, on inputs from the quantised blocks."""
    tied = {id(table.weight) for table in model.modules() if isinstance(table, MaQDEmbedding)}
    squares: dict[MaQDLinear, Tensor] = {}
    counted: Tensor | None = None

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, MaQDLinear)
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
        layer.set_grid(grid.step, grid.centre, refit=True)
        report.searched.append(names[layer])
