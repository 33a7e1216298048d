"""The operations of a token around the matrix products of a model: counted, not timed.

Normalizing and quantizing cost more than their few multiplications: a reduction over the features
has to finish before the first product can start, and a square root or an absmax of a token keeps
the hardware from working with constants alone. ``inference_cost`` counts what is left:

    pack_model(model)
    print(inference_cost(model))  # what is left, in which modules, and what static ones save
    print(inference_cost(model).table(beside=inference_cost(float_model)))

Counted exactly, from the modules (``NormSpec``, ``LinearSpec``) and from how many rows each of them
got in one small forward (a q/k norm runs once a head). Not counted: the matrix products themselves,
additions, embeddings, attention's softmax, the activation functions and the residual stream.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import nn

from ..decoding.forward import NativeForward, use_native
from ..models.names import collapse
from ..models.probing import NormKind, example_inputs, looks_like_norm, probe_norm
from ..nn import LayerBatchNorm, LinearSpec, MaQDLinear, PackedLinear
from ..nn.kinds import LINEARS
from ..nn.modes import evaluating


@dataclass(frozen=True)
class Count:
    """The operations of one token, or of one row of a module.

    Args:
        reductions: sums or maxima over the features of a token, in float.
        square_roots: one for each mean square.
        dynamic_scales: activation steps taken from the token itself (each is one of the
            ``reductions`` and a division).
        multiplications: of floats, for squares, scaling, affines, quantizing an input and scaling
            an integer sum back; with static steps these are multiplications by constants.
        integer_sums: sums of a token's codes, which offsets and half codes (even levels) need.
        additions: of floats, for rotating an input, whose one scaling is among the
            ``multiplications``; those of reductions are not counted again.
    """

    reductions: int = 0
    square_roots: int = 0
    dynamic_scales: int = 0
    multiplications: int = 0
    integer_sums: int = 0
    additions: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, rows: int) -> Count:
        return Count(*(rows * number for number in astuple(self)))


@dataclass(frozen=True)
class ModuleCost:
    """The cost of one module, a token.

    ``left`` is what it computes, ``dynamic`` what it would with norms and steps per token; ``what``
    says which of the two it is, in words.
    """

    name: str
    kind: str
    what: str
    left: Count
    dynamic: Count


@dataclass
class InferenceCost:
    """The result of ``inference_cost``; ``str(cost)`` is the readable form.

    ``unit`` is "token" or "picture". ``first_token`` is the additional cost of the first token of a
    sequence, where it keeps statistics and steps of its own. ``seldom`` names modules that run less
    than once a token (a head on the first token); they are not in the sums.
    """

    unit: str
    modules: list[ModuleCost] = field(default_factory=list)
    first_token: Count = field(default_factory=Count)
    seldom: list[str] = field(default_factory=list)

    @property
    def left(self) -> Count:
        """The operations of a token in all modules."""
        return sum((module.left for module in self.modules), Count())

    @property
    def saved(self) -> Count:
        """The operations that the same model would add with every norm and step per token."""
        return sum((module.dynamic for module in self.modules), Count()) - self.left

    @property
    def reduced(self) -> dict[str, str]:
        """The modules that still reduce something, by name, and what they are."""
        return {module.name: module.what for module in self.modules if module.left.reductions}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        sums = {"left": asdict(self.left), "saved": asdict(self.saved)}
        return asdict(self) | sums | {"reduced": self.reduced}

    def table(self, beside: InferenceCost | None = None) -> str:
        """The counts as text; ``beside``, e.g. the float model's, gets a column of its own."""
        columns = {"left": self.left, "saved": self.saved}
        if beside is not None:
            columns["beside"] = beside.left
        lines = [f"{'per ' + self.unit:<20}" + "".join(f"{name:>12}" for name in columns)]
        for name in asdict(Count()):
            numbers = (getattr(count, name) for count in columns.values())
            lines.append(f"{name.replace('_', ' '):<20}" + "".join(f"{n:>12,}" for n in numbers))
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.table()]
        by_reason: dict[str, list[str]] = {}
        for name, what in self.reduced.items():
            by_reason.setdefault(what, []).append(name)
        lines += [f"  {', '.join(collapse(names))}: {w}" for w, names in by_reason.items()]
        if self.first_token != Count():
            extra = self.first_token
            lines.append(
                f"  first token of a sequence: {extra.reductions:,} reductions, "
                f"{extra.square_roots:,} square roots more"
            )
        if self.seldom:
            lines.append(f"  not every {self.unit}: {', '.join(self.seldom)}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------- one module


def _token_norm(features: int, centered: bool, affine: bool) -> Count:
    """The operations of a row in a norm per token."""
    return Count(
        reductions=1 + centered,
        square_roots=1,
        multiplications=features * (2 + affine),  # squares, times the root, times gamma
    )


def _norm_cost(norm: LayerBatchNorm) -> tuple[str, Count, Count, Count]:
    """What the norm is, in words, and three counts of a row.

    They are what it computes, what a norm per token would, and what a first token adds.
    """
    spec, features = norm.spec, norm.features
    affine = norm.weight is not None
    dynamic = _token_norm(features, spec.centered, affine)
    static = spec.statistics == "static" or (spec.statistics == "gated" and float(norm.gate) == 1)
    if not static:
        what = "layer norm per token" if spec.centered else "RMS norm per token"
        return what, dynamic, dynamic, Count()
    left = Count(
        reductions=int(spec.centered),
        multiplications=features * (affine + (not spec.folded)),
    )
    own = Count(1, 1, 0, features * (1 + spec.folded)) if spec.first_token == "own" else Count()
    what = "static" + (", the token's mean is left" if spec.centered else "")
    return what, left, dynamic, own


def _input_cost(spec: LinearSpec, columns: int, static: bool) -> Count:
    """The operations of quantizing an input of ``columns``, and of summing its codes."""
    if spec.activation_levels is None:
        return Count()
    steps = 0 if static else columns // (spec.input_group or columns)
    scale = Count(reductions=steps, dynamic_scales=steps)
    sums = spec.weight_offset or (spec.weight_levels or 1) % 2 == 0
    return scale + Count(multiplications=columns, integer_sums=int(sums))


def _rotation_cost(size: int, columns: int) -> Count:
    """The operations of the fast Hadamard transform: log2(size) passes, an addition an input."""
    if size == 1:
        return Count()
    return Count(multiplications=columns, additions=columns * (size.bit_length() - 1))


def _linear_cost(layer: MaQDLinear | PackedLinear) -> tuple[str, Count, Count, Count]:
    """As ``_norm_cost``, for ``y = step * (scale * sum + offset * input sum) + bias``.

    A static step is a constant and part of scale and offset; without integer codes on both sides
    the scales are part of the float product.
    """
    spec, rows, group = layer.spec, layer.out_features, layer.spec.input_group
    rotation = _rotation_cost(layer.rotation, layer.in_features)
    if spec.activation_levels is None:
        return "float input", rotation, rotation, Count()
    output = Count()
    if spec.weight_levels is not None:
        output = Count(multiplications=rows * (spec.groups(layer.in_features) + spec.weight_offset))
    by_step = Count(multiplications=rows * (layer.in_features // group if group else 1))
    output = output + rotation
    dynamic = _input_cost(spec, layer.in_features, static=False) + output + by_step
    if not spec.static_activations:
        each = f"{group} inputs" if group else "token"
        return f"activation step from each {each}", dynamic, dynamic, Count()
    left = _input_cost(spec, layer.in_features, static=True) + output
    own = dynamic - left if spec.first_token == "own" else Count()
    return "static activation step", left, dynamic, own


def _plain_norm_cost(norm: nn.Module) -> tuple[str, Count, Count, Count] | None:
    """As ``_norm_cost``, for a norm of the float model; None where it is of no known kind."""
    kind = probe_norm(norm)
    if not isinstance(kind, NormKind):
        return None
    count = _token_norm(kind.features, kind.centered, affine=True)
    return f"{type(norm).__name__} per token", count, count, Count()


def _cost_of(module: nn.Module) -> tuple[str, Count, Count, Count] | None:
    """As ``_norm_cost``, for any module that is counted; None where it is of no known kind."""
    if isinstance(module, LayerBatchNorm):
        return _norm_cost(module)
    if isinstance(module, LINEARS):
        return _linear_cost(module)
    return _plain_norm_cost(module) if looks_like_norm(module) else None


# ------------------------------------------------------------------------------------ the model


def _row_counts(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many vectors each norm and converted layer gets in one forward, by name."""
    rows: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

        return hook

    kinds = (LayerBatchNorm, *LINEARS)
    watched = {n: m for n, m in model.named_modules() if isinstance(m, kinds) or looks_like_norm(m)}
    handles = [module.register_forward_pre_hook(watch(n)) for n, module in watched.items()]
    own = model.__dict__.get("forward")
    try:
        if isinstance(own, NativeForward):  # it runs no module
            use_native(model, False)
        with evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        if isinstance(own, NativeForward):
            model.forward = own
    return rows


def inference_cost(model: nn.Module) -> InferenceCost:
    """Count the operations of a transformers ``model`` (float, QAT or packed) around its products.

    One forward on a tiny input tells how often each module runs. A model of pictures is counted per
    picture.

    Raises:
        ValueError: a norm is of an unknown kind, and its cost must not be left out silently.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **size))
    >>> inference_cost(model).left  # doctest: +ELLIPSIS
    Count(reductions=3, ..., multiplications=72, integer_sums=0, additions=0)
    """
    inputs = example_inputs(model)
    pictures = "pixel_values" in inputs
    tokens = 1 if pictures else inputs["input_ids"].numel()
    rows = _row_counts(model, inputs)
    cost = InferenceCost("picture" if pictures else "token")
    for name, module in model.named_modules():
        if name not in rows:
            continue
        found = _cost_of(module)
        if found is None:
            raise ValueError(f"{name} ({type(module).__name__}) is no norm this version can count")
        what, left, dynamic, own = found
        times = rows[name] // tokens
        if times == 0:
            cost.seldom.append(name)
            continue
        kind = "linear" if isinstance(module, LINEARS) else "norm"
        cost.modules.append(ModuleCost(name, kind, what, left * times, dynamic * times))
        cost.first_token += Count() if pictures else own * times
    return cost
