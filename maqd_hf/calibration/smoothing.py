"""Start values before rounding: every channel's spread is shared between inputs and weights.

The output of a norm or a layer in channel j may be divided by any s_j > 0 if the layers that read
it multiply their column j by s_j: the model stays the same, but the error of rounding does not. An
input channel that is fifty times the others coarsens the step of all inputs; moved into the weights
it coarsens their groups instead. s is chosen here for the least sum of both expected errors:

    inputs    sum_j s_j^2 |W_j|^2 * E[step_x(x / s)^2] / 12
    weights   sum_j d_j / s_j^2 * step_w(group of j, W s)^2 / 12, over all rows

where step_x is the step that the layer's input quantizer would take and step_w the step that clips
nothing of a group. d_j is the cost of an error of column j once GPTQ has let the columns after it
make up for it: the second moment of x_j, conditional on theirs. Tokens count relative to their own
size, or a first token's massive activations would own every mean. Not in the paper, which trains
from scratch. SmoothQuant (arXiv:2211.10438) and AWQ (arXiv:2306.00978) move one power of the
channels' maxima; here both terms have a gradient, so s is simply optimized.

Layers that rotate their input (``LinearSpec.rotation``) are judged by the numbers that they round:
x / s and W s rotated, and d_j / s_j^2 as its mean over the channels that are mixed.

Which channels may move is found without a table of families: norms and their readers by the traced
forward that conversion uses, pairs of layers (up and down of a gated feed-forward part, value and
output of attention) by scaling one against the other and seeing that nothing changes.

16 levels with 8-bit inputs have perplexity 35.4 with it and 36.7 without (notebook: "What smoothing
is worth"; simpler errors did harm: "Simpler errors to smooth by").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..functional import grid_center
from ..models.finding import modules_of
from ..models.probing import example_inputs, trace_norms
from ..nn import LayerBatchNorm, MaQDEmbedding, MaQDLinear, Start, own_rows, rotate
from ..nn.modes import evaluating
from .blocks import (
    Batches,
    as_batches,
    counted_tokens,
    find_blocks,
    float_activations,
    float_weights,
    rows_of,
    run_body,
    watching,
)
from .compensation import Hessian, InputMoments

_TOKENS, _ROWS = 1024, 256  # tokens of the inputs and rows of the weights that the choice looks at
_STEPS, _RATE = 80, 0.1  # optimizer steps and rate of Adam on log factors: moves them by up to 4
_DAMP = 0.01  # the default of gptq
_CLOSE = 1e-3  # a share of the largest output: float rounding of a forward, no changed function


@dataclass(frozen=True)
class Edge:
    """Channels that ``producer`` puts out and ``consumers`` read as columns.

    ``reads`` (in,) says which channel a column reads, where they differ (heads that share a value).
    """

    name: str
    producer: LayerBatchNorm | MaQDLinear
    consumers: tuple[MaQDLinear, ...]
    reads: Tensor | None = None

    @property
    def channels(self) -> int:
        """The number of channels."""
        if isinstance(self.producer, LayerBatchNorm):
            return self.producer.features
        return self.producer.out_features

    def columns(self, factors: Tensor) -> Tensor:
        """Factors (channels,) as the consumers' columns see them, (in,)."""
        return factors if self.reads is None else factors[self.reads]

    @torch.no_grad()
    def apply(self, factors: Tensor) -> None:
        """Divide the producer's output by ``factors`` (channels,), multiply the consumers' columns.

        Raises:
            ValueError: the producer has no weight to divide.
        """
        producer = self.producer
        shape = (-1,) if isinstance(producer, LayerBatchNorm) else (-1, 1)
        if producer.weight is None:
            raise ValueError(f"{self.name} has no weight of its own: its channels cannot move")
        producer.weight.div_(factors.view(shape).to(producer.weight))
        if producer.bias is not None:
            producer.bias.div_(factors.to(producer.bias))
        for layer in self.consumers:
            layer.set_input_weight(layer.input_weight() * self.columns(factors).to(layer.weight))


@dataclass
class SmoothingReport:
    """Expected squared errors of the layers' outputs, before and after, by the name of the edge.

    Errors are relative to the outputs; ``inputs`` and ``weights`` are the two terms of the module's
    docstring.
    """

    inputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values: the number of edges, and means [before, after] over them."""

        def mean(found: dict[str, tuple[float, float]]) -> list[float]:
            return [sum(v[i] for v in found.values()) / max(len(found), 1) for i in (0, 1)]

        inputs, weights = mean(self.inputs), mean(self.weights)
        return {"edges": len(self.weights), "inputs": inputs, "weights": weights}

    def __str__(self) -> str:
        if not self.weights:
            return "smoothing: no channels that may move"
        found = self.summary()
        inputs, weights = (
            "{:.2e} -> {:.2e}".format(*found[term]) for term in ("inputs", "weights")
        )
        return (
            f"smoothing: {found['edges']} sets of channels, expected relative error from inputs "
            f"{inputs}, from weights {weights}"
        )


def smooth(
    model: nn.Module, data: Batches, *, start: Start = "search", progress: bool = True
) -> SmoothingReport:
    """Move channels' spread between inputs and weights of a freshly converted model, in place.

    Args:
        model: converted by ``quantize_model``; its latents are taken as the float weights. Its
            float function stays the same up to rounding; its grids start anew.
        data: token ids (samples, tokens), or batches.
        start: where the grids of the layers start anew (``nn.Start``); "range" is enough before
            ``gptq``, which searches again.
        progress: show a bar.

    Tensors of converted layers are float32 in a model of any dtype, so factors do not round them.
    """
    batches = as_batches(data, model)
    report = SmoothingReport()
    with evaluating(model), float_activations(model), float_weights(model):
        with _widened(model):
            edges = find_edges(model)
        inputs = _sample_inputs(model, batches, edges)
    for edge in tqdm(edges, desc="smoothing", unit="edge", disable=not progress):
        factors, before, after = choose_factors(edge, *inputs.pop(edge.consumers[0]))
        edge.apply(factors)
        report.inputs[edge.name] = (before[0], after[0])
        report.weights[edge.name] = (before[1], after[1])
    touched = {m for e in edges for m in (e.producer, *e.consumers) if isinstance(m, MaQDLinear)}
    for layer in touched:
        layer.reset_quantizer(start)
    return report


# --------------------------------------------------------------------------------- which channels


def find_edges(model: nn.Module) -> list[Edge]:
    """Channels that may move, in the order of the model: norms' first, then pairs of layers."""
    linears: dict[str, nn.Module] = dict(modules_of(model, nn.Linear))
    norms = {n: m for n, m in modules_of(model, LayerBatchNorm) if m.weight is not None}
    tied = {id(m.weight) for _, m in modules_of(model, MaQDEmbedding)}
    free = {
        n: m
        for n, m in linears.items()
        if isinstance(m, MaQDLinear) and m.weight_levels is not None and id(m.weight) not in tied
    }
    trace = trace_norms(model, dict(norms), linears)
    edges, behind_norms = [], set()
    for name, use in trace.uses.items():
        readers = [n for n in use.consumers if n in free and trace.calls[n] == 1]
        behind_norms.update(use.consumers)
        if readers and len(readers) == len(use.consumers) and not use.others and use.runs == 1:
            edges.append(Edge(name, norms[name], tuple(free[n] for n in readers)))
    return edges + _pairs(model, free, behind_norms)


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """For a while, the whole model is float32: in half precision equal functions look different."""
    tensors = (*model.parameters(), *model.buffers())
    narrow = {t: t.dtype for t in tensors if t.dtype in (torch.float16, torch.bfloat16)}
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow.items():
            tensor.data = tensor.data.to(dtype)


def _pairs(model: nn.Module, free: dict[str, MaQDLinear], behind_norms: set[str]) -> list[Edge]:
    """Pairs of layers inside a block, tried in all blocks at once: blocks of a list are alike."""
    blocks = list(find_blocks(model).values())
    inside: dict[str, dict[str, MaQDLinear]] = {}  # name in the block -> block -> layer
    for name, layer in free.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None:
            inside.setdefault(name[len(block) + 1 :], {})[block] = layer
    edges: list[Edge] = []
    for reader, consumers in inside.items():
        if any(f"{block}.{reader}" in behind_norms for block in consumers):
            continue
        for maker, producers in inside.items():
            if maker == reader or producers.keys() != consumers.keys():
                continue
            found = [
                Edge(f"{b}.{maker}", producers[b], (consumers[b],), reads)
                for b in consumers
                for reads in [_reads(model, producers[b], consumers[b])]
                if reads is None or len(reads)
            ]
            if len(found) == len(consumers) and _unchanged(model, found):
                edges += found
                break
    return edges


def _reads(model: Any, producer: MaQDLinear, consumer: MaQDLinear) -> Tensor | None:
    """The channel (in,) that each column would read.

    None: every column reads its own; an empty tensor: the sizes do not fit.
    """
    made, read = producer.out_features, consumer.in_features
    if made == read:
        return None
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or read // heads
    if read % made or made % size:
        return torch.empty(0, dtype=torch.long)
    channel = torch.arange(made, device=producer.weight.device).view(-1, size)
    return channel.repeat_interleave(read // made, dim=0).flatten()


def _unchanged(model: nn.Module, edges: list[Edge]) -> bool:
    """Whether scaling all these channels by random factors leaves the model's output as it is."""
    generator = torch.Generator().manual_seed(0)
    inputs = example_inputs(model)
    before = _first_output(model, inputs)
    with _scaled(edges, generator):
        after = _first_output(model, inputs)
    return float((after - before).abs().max()) <= _CLOSE * float(before.abs().max())


@contextmanager
def _scaled(edges: list[Edge], generator: torch.Generator) -> Iterator[None]:
    """For a while, the channels of ``edges`` are divided and multiplied by random factors."""
    with ExitStack() as stack:
        for edge in edges:
            (consumer,) = edge.consumers
            factors = torch.rand(edge.channels, generator=generator).add(0.5).to(consumer.weight)
            columns = edge.columns(factors)

            def less(_m: Any, _a: Any, output: Tensor, by: Tensor = factors) -> Tensor:
                return output / by

            def more(_m: Any, args: tuple[Tensor, ...], by: Tensor = columns) -> Tensor:
                return args[0] * by

            stack.callback(edge.producer.register_forward_hook(less).remove)
            stack.callback(consumer.register_forward_pre_hook(more).remove)
        yield


@torch.no_grad()
def _first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found.double()


# -------------------------------------------------------------------------------- which factors


def _sample_inputs(
    model: nn.Module, batches: list[dict[str, Tensor]], edges: list[Edge]
) -> dict[MaQDLinear, tuple[Tensor, Tensor]]:
    """Some inputs (tokens, in) of every edge's first consumer, and the ``reach`` (in,) of them all.

    The inputs are those of the float model.
    """
    found: dict[MaQDLinear, list[Tensor]] = {edge.consumers[0]: [] for edge in edges}
    moments = {layer: InputMoments(layer.in_features, layer.weight.device) for layer in found}
    counted: Tensor | None = None
    share = -(-_TOKENS // len(batches))

    def see(layer: MaQDLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of(args[0] if args else kwargs["input"], counted)
        if not layer.spec.static_activations:
            rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        found[layer].append(rows[:: max(1, len(rows) // share)].clone())
        moments[layer].add(rows)

    static = any(layer.spec.static_activations for layer in found)
    with watching(found, see):
        for batch in batches:
            counted = counted_tokens(batch, skip_first=static)
            run_body(model, batch)
    return {layer: (torch.cat(rows), _reach(moments[layer])) for layer, rows in found.items()}


def _reach(moments: InputMoments) -> Tensor:
    """The cost (in,) of an error of a column once the columns after it have made up for theirs.

    It is the second moment of the column's input, conditional on the inputs after it.
    """
    hessian = Hessian.of(moments.second, _DAMP, act_order=True)
    reach = torch.empty_like(hessian.order, dtype=moments.second.dtype)
    reach[hessian.order] = hessian.factor.diagonal().square().reciprocal()
    return reach


@dataclass(frozen=True)
class Errors:
    """The two errors as functions of log factors (channels,), relative to the layers' output."""

    x: Tensor  # (tokens, in)
    reach: Tensor  # (in,)
    weight: Tensor  # (rows, in)
    edge: Edge

    def __call__(self, log_factors: Tensor) -> tuple[Tensor, Tensor]:
        spec, mixed = self.edge.consumers[0].spec, self.edge.consumers[0].rotation
        factors = self.edge.columns(log_factors).exp()
        scaled = rotate(self.weight * factors, mixed)
        total = (self.weight.square() * self.x.square().mean(0)).sum()
        inputs = total.new_zeros(())
        if spec.activation_levels is not None:
            inputs = self._from_inputs(rotate(self.x / factors, mixed), scaled)
        groups = spec.groups(self.weight.shape[1])
        reach = self.reach / factors.square()
        reach = reach.view(-1, mixed).mean(-1, keepdim=True).expand(-1, mixed)
        reach = reach.reshape(groups, -1).sum(-1)
        most = scaled.view(len(scaled), groups, -1).abs().amax(-1)
        step = most / grid_center(spec.weight_grid_levels)
        weights = (reach * step.square()).sum() / 12
        return inputs / total, weights / total

    def _from_inputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """The error of rounding inputs ``x`` (tokens, in) that meet ``weight`` (rows, in)."""
        spec = self.edge.consumers[0].spec
        rows = own_rows(x, spec.input_group or weight.shape[1])
        most = rows.abs().amax(-1)  # (tokens, groups)
        most = most.amax() if spec.static_activations else most * spec.activation_clip_ratio
        step = most / grid_center(spec.input_grid_levels)
        met = own_rows(weight.square(), rows.shape[-1]).sum((0, -1))  # (groups,)
        return (met * step.square().mean(0)).sum() / 12


@torch.enable_grad()
def choose_factors(
    edge: Edge, x: Tensor, reach: Tensor
) -> tuple[Tensor, tuple[float, float], tuple[float, float]]:
    """The factors (channels,) of least expected error for inputs ``x`` (tokens, in).

    Returns them with the errors (from inputs, from weights) before and after.
    """
    weight = torch.cat([layer.input_weight().detach().float() for layer in edge.consumers])
    errors = Errors(x, reach, weight[:: -(-len(weight) // _ROWS)], edge)
    log_factors = torch.zeros(edge.channels, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_factors], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)

    @torch.no_grad()
    def now() -> tuple[float, float]:
        inputs, weights = errors(log_factors)
        return float(inputs), float(weights)

    before = now()
    for _ in range(_STEPS):
        inputs, weights = errors(log_factors)
        optimizer.zero_grad()
        (inputs + weights).log().backward()
        optimizer.step()
        schedule.step()
    after = now()
    if not sum(after) < sum(before):  # silent channels, or NaN
        return torch.ones_like(log_factors), before, before
    return log_factors.detach().exp(), before, after
