"""Half a block in integers alone: what static norms and steps make possible, checked in numbers.

``IntegerLinear`` takes the int8 codes of its input, sums products in int32 and gives integers in a
unit of the caller's choice (the next layer's activation step, or a binary fraction), by one
fixed-point multiplication and shift:

    out[o] = (m1[o] * sum_i w[o, i] a[i]  +  m2[o] * sum_i a[i]  +  b[o]) >> shift

``m2`` carries what is the same for all weights of a row: the learned offset, and the half code by
which even levels straddle zero; without an offset and with odd levels it is zero. ``b`` is the
bias. ``IntegerMLP`` is the whole feed-forward half of a block: integer residual -> static norm (no
operation left but a LayerNorm's centring) -> codes -> up (and gate) -> table -> codes -> down ->
integers to add to the residual. There is no float in its forward, which a test asserts.

The rest of a model stays float: attention's softmax and rotary angles, per-token norms (the final
one), embedding and head, and the first token of a sequence where it has statistics and steps of its
own.

Not in the paper, which says only that such an inference is possible. This is a reference for tests
and for writers of kernels and hardware, in torch's integer arithmetic; it is not fast.

    mlp = IntegerMLP(block.post_attention_layernorm, block.mlp.up_proj, block.mlp.down_proj,
                     torch.nn.functional.silu, gate=block.mlp.gate_proj)
    residual = mlp.to_fixed(hidden_states)         # int32, unit 2 ** -mlp.fraction_bits
    residual = residual + mlp(residual)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..nn import LayerBatchNorm, PackedLinear
from ..packing import unpack_codes

MULTIPLIER_BITS = 30
VALUE_BITS = 24  # bits of integers between two layers: two of them and a multiplier fit 64 bits
TABLE_RANGE = 16  # beyond it SiLU and GELU are ReLU to 2e-6
TABLE_BITS = 16


def shift_right(value: Tensor, shift: int) -> Tensor:
    """``value / 2**shift`` (int64), rounded to the nearest integer, halves up.

    >>> shift_right(torch.tensor([-5, 5, 6, 7]), 2)
    tensor([-1,  1,  2,  2])
    """
    return (value + (1 << (shift - 1))) >> shift if shift > 0 else value << -shift


def _shift_for(largest: float, bits: int) -> int:
    """The shift at which a multiplier of this size takes ``bits`` bits."""
    return bits - math.ceil(math.log2(largest)) if largest > 0 else bits


def check_integer(layer: PackedLinear, name: str = "the layer") -> tuple[Tensor, int]:
    """The static step (1,) and the levels of the int8 codes that ``layer`` can take.

    Raises:
        ValueError: its input is not such codes; the message says why, and calls it ``name``.
    """
    levels = layer.spec.activation_levels
    if layer.activation_step is None or levels is None:
        raise ValueError(f"{name} has no static activation step: its input is not integer")
    if layer.rotation > 1:
        raise ValueError(f"{name} rotates its input, which is not integer then: rotation=None")
    if levels % 2 == 0 or levels > 255:
        raise ValueError(
            f"{name} has {levels} activation levels: int8 codes with an exact zero need an odd "
            "number up to 255"
        )
    return layer.activation_step, levels


class IntegerLinear(nn.Module):
    """A ``PackedLinear`` on int8 codes: (..., in) -> (..., out) int64, counted in ``unit``.

    Args:
        layer: packed, with a static step and odd activation levels.
        unit: what 1 of the output is worth; the next layer's activation step makes the output its
            codes.
        limit: outputs are clipped to plus or minus this, 127 for 255 levels.

    Buffers: ``weight`` int8 (out, groups, in / groups), ``scale`` and ``sum_scale`` int64
    (out, groups), ``bias`` int64 (out,); ``shift`` is one number for the layer.
    """

    weight: Tensor
    scale: Tensor
    sum_scale: Tensor
    bias: Tensor

    def __init__(self, layer: PackedLinear, unit: float, limit: int) -> None:
        super().__init__()
        step, _ = check_integer(layer)
        self.limit = limit
        groups = layer.weight_scale.shape[1]
        codes = unpack_codes(layer.weight, layer.levels, layer.in_features).long()
        whole = layer.levels // 2
        half = whole - (layer.levels - 1) / 2
        scale = layer.weight_scale.double() * step.double() / unit
        sum_scale = scale * half
        if layer.weight_offset is not None:
            sum_scale = sum_scale + layer.weight_offset.double() * step.double() / unit
        bias = scale.new_zeros(len(scale)) if layer.bias is None else layer.bias.double() / unit
        largest = max(float(table.abs().max()) for table in (scale, sum_scale, bias * 2.0**-30))
        self.shift = _shift_for(largest, MULTIPLIER_BITS)
        self.register_buffer("weight", (codes - whole).to(torch.int8).unflatten(1, (groups, -1)))
        for name, table in (("scale", scale), ("sum_scale", sum_scale), ("bias", bias)):
            self.register_buffer(name, (table * 2.0**self.shift).round().long())

    def forward(self, codes: Tensor) -> Tensor:
        a = codes.to(torch.int32).unflatten(-1, self.weight.shape[1:])  # (..., groups, in / groups)
        sums = torch.einsum("...gi,ogi->...og", a, self.weight.to(torch.int32))
        total = (sums.long() * self.scale).sum(-1) + (
            a.sum(-1, dtype=torch.int64).unsqueeze(-2) * self.sum_scale
        ).sum(-1)
        return shift_right(total + self.bias, self.shift).clamp(-self.limit, self.limit)


def largest_output(layer: PackedLinear) -> float:
    """A bound that no output of ``layer`` exceeds, whatever the codes of its input."""
    step, levels = check_integer(layer)
    reach = float(step) * (levels - 1) / 2
    bias = 0 if layer.bias is None else layer.bias.abs()
    return float((layer.dequantized_weight().abs().sum(1) * reach + bias).max())


class _Activation(nn.Module):
    """An activation function that tends to ReLU: ReLU plus a table of the difference."""

    table: Tensor

    def __init__(self, function: Callable[[Tensor], Tensor], fraction_bits: int) -> None:
        super().__init__()
        finest = TABLE_BITS - 1 - int(math.log2(TABLE_RANGE))
        self.index_shift = max(fraction_bits - finest, 0)
        index_bits = fraction_bits - self.index_shift
        self.last = TABLE_RANGE << index_bits
        x = torch.arange(-self.last, self.last + 1, dtype=torch.float64) * 2.0**-index_bits
        difference = function(x) - x.relu()
        if float(difference[[0, -1]].abs().max()) > 1e-3:
            raise ValueError(
                f"the activation function is not ReLU beyond {TABLE_RANGE}: only such (ReLU, GELU, "
                "SiLU) have a table here"
            )
        self.register_buffer("table", (difference * 2.0**fraction_bits).round().long())

    def forward(self, value: Tensor) -> Tensor:
        index = shift_right(value, self.index_shift).clamp(-self.last, self.last)
        return value.clamp(min=0) + self.table[index + self.last]


class IntegerMLP(nn.Module):
    """The feed-forward half of a packed block, from integer residual to what is added to it.

    Args:
        norm: static; its constant and affine, where they are not folded into ``up`` and ``gate``,
            join the rescaling of their inputs, which then has a multiplier for every feature.
        up, down: packed, with static steps and odd activation levels.
        function: the activation function, applied to the output of ``gate`` or else of ``up``.
        gate: packed like ``up``, in a gated block (Llama): ``down(function(gate(x)) * up(x))``.
        fraction_bits: the residual is an int32 in units of ``2 ** -fraction_bits``.

    Raises:
        ValueError: a norm that still reduces, or a layer without integer codes.
    """

    def __init__(
        self,
        norm: LayerBatchNorm,
        up: PackedLinear,
        down: PackedLinear,
        function: Callable[[Tensor], Tensor],
        gate: PackedLinear | None = None,
        fraction_bits: int = 20,
    ) -> None:
        super().__init__()
        if norm.spec.statistics != "static":
            raise ValueError(
                f"the norm is not static ({norm.spec}): open its gate, then pack_model"
            )
        for name, layer in (("up", up), ("down", down), ("gate", gate)):
            if layer is not None:
                check_integer(layer, name)
        self.centered, self.fraction_bits = norm.spec.centered, fraction_bits
        readers = [up] if gate is None else [gate, up]
        bound = max(largest_output(layer) for layer in readers)
        self.value_bits = VALUE_BITS - math.ceil(math.log2(bound))
        unit, limit = 2.0**-self.value_bits, 1 << VALUE_BITS
        self.readers = nn.ModuleList(IntegerLinear(layer, unit, limit) for layer in readers)
        self.activation = _Activation(function, self.value_bits)
        self.down = IntegerLinear(down, 2.0**-fraction_bits, (1 << 31) - 1)
        width = up.in_features if self.centered else 1  # the mean is not divided out
        residual_bits = 31 + math.ceil(math.log2(2 * width))
        factor = 1.0 if norm.spec.folded else math.exp(-float(norm.running_log_ms) / 2)
        in_unit = torch.tensor(factor * 2.0**-fraction_bits / width, dtype=torch.float64)
        if norm.weight is not None:
            in_unit = in_unit * norm.weight.detach().double()
        self.inputs = nn.ModuleList(
            _Rescale(in_unit, residual_bits, reader, norm.bias) for reader in readers
        )
        factors = 1 if gate is None else 2
        self.hidden = _Rescale(torch.tensor(unit).double() ** factors, factors * VALUE_BITS, down)

    def to_fixed(self, residual: Tensor) -> Tensor:
        """The float ``residual`` as int32: the one rounding that no layer of the model does."""
        return (residual.double() * 2.0**self.fraction_bits).round().to(torch.int32)

    def input_codes(self, residual: Tensor) -> list[Tensor]:
        """The int8 codes that gate and up (or up alone) read."""
        x = residual.long()
        if self.centered:
            x = x * x.shape[-1] - x.sum(-1, keepdim=True)
        return [rescale(x) for rescale in self.inputs]

    def hidden_codes(self, inputs: list[Tensor]) -> Tensor:
        """The int8 codes that down reads, from those that ``input_codes`` gave."""
        first, *rest = (reader(codes) for reader, codes in zip(self.readers, inputs, strict=True))
        hidden = self.activation(first)
        return self.hidden(hidden * rest[0] if rest else hidden)

    def forward(self, residual: Tensor) -> Tensor:
        """What the block adds to ``residual`` (..., width) int32, in the same shape and unit."""
        added: Tensor = self.down(self.hidden_codes(self.input_codes(residual)))
        return added.to(torch.int32)


class _Rescale(nn.Module):
    """Turns integers of ``bits`` bits into ``layer``'s int8 codes: multiply, add, shift, clip.

    ``unit`` is the worth of 1, one number or one for every feature; ``bias``, by feature or None,
    is added to the product.
    """

    multiplier: Tensor
    bias: Tensor

    def __init__(
        self, unit: Tensor, bits: int, layer: PackedLinear, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        static, levels = check_integer(layer)
        self.limit = (levels - 1) // 2
        step = float(static)
        factor = unit.detach().double() / step
        added = factor.new_zeros(()) if bias is None else bias.detach().double() / step
        room = min(62 - bits, MULTIPLIER_BITS)
        self.shift = _shift_for(float(factor.abs().max()), room)
        if bool(added.any()):  # the sum has to fit as well
            self.shift = min(self.shift, _shift_for(float(added.abs().max()), 61))
        self.register_buffer("multiplier", (factor * 2.0**self.shift).round().long())
        self.register_buffer("bias", (added * 2.0**self.shift).round().long())

    def forward(self, value: Tensor) -> Tensor:
        codes = shift_right(value * self.multiplier + self.bias, self.shift)
        return codes.clamp(-self.limit, self.limit).to(torch.int8)
