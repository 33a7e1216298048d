"""The trainable quantised layer: a Linear whose weight and input pass through the round-clip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..functional import (
    check_levels,
    gaussian_step,
    get_surrogate,
    scaled_round_clip,
    stored_scale,
    token_step,
    widen,
)
from ..kernels.fake_quantize import fake_quantize_weight, round_tokens, weight_codes
from ..kernels.hadamard import hadamard
from ..search import full_range_step, search_step
from .context import BatchContext, FirstToken
from .precision import Apply, product_dtype, without_narrowing

ActivationScaling = Literal["static", "token", "group"]
"""Whose step an input is rounded with: "static", one learned step, so that nothing is reduced at
inference; "token", one a token, from its absmax; "group", one for every group of a token's inputs
that share a weight scale, from that group's absmax (one a token where a row has one scale).

The paper has the first. Steps of groups are Atom's (arXiv:2310.19102): a large input then coarsens
the grid of its neighbours only, which few levels need (``functional.token_step`` has figures). In
the compiled product they are one more multiplication a group and row: 1.03 of the time of one a
token for one token, 1.0 to 1.15 for 64 (groups of 64, 1536 x 1536, 2 and 4 bit, one thread)."""

Start = Literal["search", "range", "gaussian"]
"""Where a grid starts: "search", the step of least squared error per group; "range", the step that
clips nothing, for grids that a calibration chooses again; "gaussian", the constant of M, for rows
trained from scratch."""


@dataclass(frozen=True)
class LinearSpec:
    """How one layer is quantised; plain values, as they stand in a checkpoint's config.

    Args:
        weight_levels: M of the weights, 2..256, or None to keep them float.
        activation_levels: M of the input, 2..256, or None to keep it float.
        activation_scaling: "static", "token" or "group", see ``ActivationScaling``.
        activation_clip_ratio: share of its absmax that the grid of a token, or group, covers, in
            (0, 1]; what lies beyond is clipped. 1: nothing is (``functional.token_step`` has
            figures).
        first_token: "own": with static scaling, the first token of a sequence still gets a step
            of its own (pretrained models park a massive activation there); or "shared".
        group_size: inputs that share a weight scale, must divide the input width; None: the row.
        weight_offset: keep the row mean that standardisation removes as a learned offset.
        surrogate: gradient of the activation staircase, a key of ``functional.SURROGATES``.
        rotation: inputs that a Hadamard transform mixes before they are quantised, a power of two,
            or less where it does not divide the width (``rotation_size``); None: not rotated.
    """

    weight_levels: int | None = 16
    activation_levels: int | None = 255
    activation_scaling: ActivationScaling = "static"
    activation_clip_ratio: float = 1.0
    first_token: FirstToken = "shared"
    group_size: int | None = None
    weight_offset: bool = True
    surrogate: str = "clip"
    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.weight_levels is not None:
            check_levels(self.weight_levels, "weight_levels")
        if self.activation_levels is not None:
            check_levels(self.activation_levels, "activation_levels")
        if self.activation_scaling not in get_args(ActivationScaling):
            raise ValueError(
                f"activation_scaling={self.activation_scaling!r}: choose 'static', 'token' or "
                "'group'"
            )
        if self.input_group is not None and (self.activation_levels or 1) % 2 == 0:
            raise ValueError(
                f"activation_levels={self.activation_levels}: steps of groups want an odd number, "
                "of which zero is one, such as 3, 15 or 255"
            )
        ratio = self.activation_clip_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(
                f"activation_clip_ratio={ratio!r}: a number in (0, 1], 1 clips nothing"
            )
        if self.first_token not in ("own", "shared"):
            raise ValueError(f"first_token={self.first_token!r}: choose 'own' or 'shared'")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"group_size={size!r}: a positive int, or None for the row")
        get_surrogate(self.surrogate)
        turn = self.rotation
        if turn is not None and (
            isinstance(turn, bool) or not isinstance(turn, int) or turn < 2 or turn & (turn - 1)
        ):
            raise ValueError(f"rotation={turn!r}: a power of two from 2, or None")

    @property
    def static_activations(self) -> bool:
        return self.activation_levels is not None and self.activation_scaling == "static"

    @property
    def input_group(self) -> int | None:
        """Inputs of a token that share a step of their own, where not all do."""
        return self.group_size if self.activation_scaling == "group" else None

    def groups(self, in_features: int) -> int:
        """Groups a row of ``in_features`` has; ``ValueError`` if ``group_size`` does not divide."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the input width {in_features}; "
                "choose a divisor, or None (one scale per row) for this layer with an override"
            )
        return in_features // self.group_size

    def on_table(self, levels: int) -> LinearSpec:
        """The settings of a head that shares an embedding's grid of ``levels``."""
        return replace(
            self, weight_levels=levels, group_size=None, weight_offset=True, rotation=None
        )

    def rotation_size(self, in_features: int) -> int:
        """Neighbouring inputs that are mixed: the largest power of two up to ``rotation`` that
        divides the width; 1: none are."""
        return math.gcd(self.rotation or 1, in_features)


def own_rows(x: Tensor, group: int | None) -> Tensor:
    """``x`` (..., in) as rows that have one step each: itself, or (..., groups, ``group``)."""
    return x if group is None else x.unflatten(-1, (-1, group))


def activation_step(
    x: Tensor,
    spec: LinearSpec,
    static: Tensor | None,
    context: BatchContext,
    own: Tensor | None = None,
) -> Tensor:
    """The step in force for ``own_rows`` ``x`` (..., D), whose static one is ``static``: (1,) or
    (..., 1).

    ``own`` stands for the step a token takes from itself, where it is not to be computed here.
    """
    levels = spec.activation_levels
    assert levels is not None

    def of_token() -> Tensor:
        return token_step(widen(x), levels, spec.activation_clip_ratio) if own is None else own

    if static is None:
        return of_token()
    _, first = context.masks_for(x)
    if spec.first_token == "shared" or first is None:
        return static
    return torch.where(first.unsqueeze(-1), of_token(), static)


def rotate(x: Tensor, size: int, context: BatchContext | None = None) -> Tensor:
    """``x`` (..., in) between the inputs' basis and that of the weight's columns, either way.

    ``size``: a layer's ``rotation``. With ``context``, an input that several layers read is rotated
    once.
    """
    if size == 1:
        return x
    return hadamard(x, size) if context is None else context.once(x, size, hadamard)


def _round_for_product(x: Tensor, grid: tuple[int, float, int | None]) -> Tensor:
    levels, clip_ratio, group = grid
    return round_tokens(own_rows(x, group), levels, clip_ratio, product_dtype(x)).reshape(x.shape)


def round_inputs(
    x: Tensor, spec: LinearSpec, static: Tensor | None, context: BatchContext
) -> Tensor:
    """``x`` (..., in) on the grid of ``spec``, differentiable; ``static``: the static step."""
    levels = spec.activation_levels
    assert levels is not None
    rows = own_rows(x, spec.input_group)
    step = activation_step(rows, spec, static, context)
    rounded = scaled_round_clip(widen(rows), levels, step, spec.surrogate)
    return rounded.to(x.dtype).reshape(x.shape)


class ActivationQuantizer(nn.Module):
    """The round-clip on a layer's input; static steps are learned as their logarithm.

    ``log_step`` (1,) is NaN until calibrated. In the log domain an Adam step is a relative change,
    so that one learning rate fits steps of 0.002 and of 20 (not in the paper).
    """

    def __init__(
        self, spec: LinearSpec, context: BatchContext, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        assert spec.activation_levels is not None
        self.levels, self.spec, self.context = spec.activation_levels, spec, context
        self.log_step: nn.Parameter | None = None
        if spec.static_activations:
            self.log_step = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.log_step is not None:
            nn.init.constant_(self.log_step, float("nan"))

    @property
    def calibrated(self) -> bool:
        return self.log_step is None or not bool(self.log_step.isnan().any())

    def set_step(self, step: float | Tensor) -> None:
        """Set the static step (distance between two levels, in units of the input)."""
        if self.log_step is None:
            raise ValueError("per-token quantisers take their step from each token")
        with torch.no_grad():
            self.log_step.copy_(torch.as_tensor(step).log())

    def _static_step(self) -> Tensor | None:
        return None if self.log_step is None else self.log_step.exp()

    def clipped(self, x: Tensor) -> Tensor:
        """Share of ``x`` (..., in) beyond the outermost levels by more than half a step: ()."""
        rows = own_rows(x, self.spec.input_group)
        step = activation_step(rows, self.spec, self._static_step(), self.context)
        return (rows.abs() > step * (self.levels / 2)).float().mean()

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if self.log_step is None and spec.surrogate == "clip":
            grid = (self.levels, spec.activation_clip_ratio, spec.input_group)
            return self.context.once(x, grid, _round_for_product)
        return round_inputs(x, spec, self._static_step(), self.context)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, scaling={self.spec.activation_scaling}"


class MaQDLinear(nn.Linear):
    """Linear layer trained on the grid it will be packed on.

    ``y = q_a(x) @ W.T + bias`` with ``W = weight_scale * round_clip(standardise(weight) /
    weight_step) + weight_offset`` (``functional.fake_quantize_weight``). Input (..., in), output
    (..., out). Parameters, float32 (or float64) even in a bfloat16 model:

    - ``weight`` (out, in): the latent, under the name the float layer had;
    - ``weight_step`` (out, groups): grid on the standardised rows, fixed by the start values;
    - ``weight_log_scale`` (out, groups): log of what one code is worth, learned; in force is what
      ``weight_scale()`` makes of it;
    - ``weight_offset`` (out, 1): learned, or absent;
    - ``activation.log_step`` (1,): see ``ActivationQuantizer``.

    With ``spec.rotation`` the input is rotated first, and all of these are in the rotated basis;
    ``input_weight`` and ``set_input_weight`` speak of the latent in the basis of the input.

    >>> layer = MaQDLinear.from_linear(nn.Linear(8, 4), LinearSpec(activation_levels=None))
    >>> layer.quantized_weight().unique().numel() <= 4 * 16
    True
    """

    weight_step: nn.Parameter | None
    weight_log_scale: nn.Parameter | None
    weight_offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        spec: LinearSpec | None = None,
        context: BatchContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spec = spec or LinearSpec()
        self.spec, self.context = spec, context or BatchContext()
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        groups, self.rotation = spec.groups(in_features), spec.rotation_size(in_features)

        def table(columns: int, wanted: bool, grad: bool) -> nn.Parameter | None:
            if not wanted:
                return None
            empty = torch.empty(out_features, columns, device=device, dtype=dtype)
            return nn.Parameter(empty, requires_grad=grad)

        quantized = spec.weight_levels is not None
        self.weight_step = table(groups, quantized, grad=False)
        self.weight_log_scale = table(groups, quantized, grad=True)
        self.weight_offset = table(1, quantized and spec.weight_offset, grad=True)
        self.activation: ActivationQuantizer | nn.Identity = nn.Identity()
        if spec.activation_levels is not None:
            self.activation = ActivationQuantizer(spec, self.context, device)
        if not self.weight.is_meta:
            self.reset_quantizer("gaussian")

    def _apply(self, fn: Apply, recurse: bool = True) -> MaQDLinear:
        return super()._apply(without_narrowing(fn, self.parameters()), recurse)

    @property
    def weight_levels(self) -> int | None:
        return self.spec.weight_levels

    @torch.no_grad()
    def reset_quantizer(self, start: Start = "search") -> None:
        """Start values of step, scale and offset from the current latent.

        ``scale`` is the least-squares fit, so that the layer starts as close to its float self as
        its grid allows.
        """
        if self.weight_step is None or self.weight_log_scale is None:
            return
        levels = self.spec.weight_levels
        assert levels is not None
        if not bool(self.weight.isfinite().all()):
            raise ValueError(
                f"the weight {tuple(self.weight.shape)} holds NaN or infinity: "
                "the float checkpoint is broken, nothing was quantised"
            )
        mean = self.weight.mean(dim=1, keepdim=True)
        std = (self.weight.var(dim=1, keepdim=True, correction=0) + 1e-12).sqrt()
        if start == "gaussian":
            self.set_grid(std.expand_as(self.weight_step) * gaussian_step(levels), mean, refit=True)
        else:
            grouped = (self.weight - mean).view(*self.weight_step.shape, -1)
            choose = search_step if start == "search" else full_range_step
            self.set_grid(choose(grouped, levels), mean, refit=True)

    @torch.no_grad()
    def set_grid(self, step: Tensor, offset: Tensor | None = None, refit: bool = False) -> None:
        """Put the grid at ``step`` (out, groups), in units of the weight, and scale to match.

        ``refit`` fits the scale to the latent by least squares instead of taking ``step``.
        """
        assert self.weight_step is not None and self.weight_log_scale is not None
        std = (self.weight.var(dim=1, keepdim=True, correction=0) + 1e-12).sqrt()
        self.weight_step.copy_(step / std)
        scale = step
        if refit:
            assert self.spec.weight_levels is not None
            units = self.weight_units().view(*step.shape, -1)
            centred = self.weight - self.weight.mean(dim=1, keepdim=True)
            fit = (units * centred.view_as(units)).sum(-1) / units.square().sum(-1).clamp(min=1e-12)
            scale = torch.where(fit > 0, fit, step)
        self.weight_log_scale.copy_(scale.log())
        if self.weight_offset is not None and offset is not None:
            self.weight_offset.copy_(offset)

    def weight_codes(self) -> Tensor:
        """Codes (out, in), float in 0..M-1."""
        assert self.weight_step is not None and self.spec.weight_levels is not None
        return weight_codes(self.weight, self.weight_step, self.spec.weight_levels)

    def weight_units(self) -> Tensor:
        """Codes centred on zero: (out, in) in -(M-1)/2 .. (M-1)/2."""
        assert self.spec.weight_levels is not None
        return self.weight_codes() - (self.spec.weight_levels - 1) / 2

    def weight_scale(self) -> Tensor:
        """What one code is worth, (out, groups), rounded as it is stored; differentiable."""
        assert self.weight_log_scale is not None
        return stored_scale(self.weight_log_scale.exp())

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) weight in force, in ``dtype`` (None: the latent's); differentiable."""
        if self.weight_step is None or self.weight_log_scale is None:
            return self.weight.to(dtype or self.weight.dtype)
        assert self.spec.weight_levels is not None
        return fake_quantize_weight(
            self.weight,
            self.weight_step,
            self.weight_scale(),
            self.weight_offset,
            self.spec.weight_levels,
            dtype,
        )

    def input_weight(self) -> Tensor:
        """The latent (out, in) as the unrotated input meets it."""
        return rotate(self.weight, self.rotation)

    @torch.no_grad()
    def set_input_weight(self, weight: Tensor) -> None:
        """Set the latent from ``weight`` (out, in), which the unrotated input would meet."""
        self.weight.copy_(rotate(weight, self.rotation))

    def forward(self, input: Tensor) -> Tensor:
        x = self.activation(rotate(input, self.rotation, self.context))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.quantized_weight(product_dtype(x)), bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        spec: LinearSpec | None = None,
        context: BatchContext | None = None,
        start: Start | None = "search",
    ) -> MaQDLinear:
        """A quantised copy of an ``nn.Linear`` or a ``Conv1D`` (weight (in, out)), same device.

        ``start=None`` leaves the grid to a later ``reset_quantizer``.
        """
        weight: Tensor = linear.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(linear, "bias", None)
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        out_features, in_features = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        layer = cls(in_features, out_features, bias is not None, spec, context, "meta", dtype)
        layer.to_empty(device=weight.device)
        for module in layer.modules():
            if isinstance(module, ActivationQuantizer):
                module.reset_parameters()
        with torch.no_grad():
            layer.set_input_weight(weight.to(dtype))
            if bias is not None:
                layer.bias.copy_(bias)
        if start is not None and not weight.is_meta:
            layer.reset_quantizer(start)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the quantised weight; the input is no longer quantised."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype
        ).to_empty(device=self.weight.device)
        with torch.no_grad():
            linear.weight.copy_(rotate(self.quantized_weight(), self.rotation))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        spec = self.spec
        grid = f"weight_levels={spec.weight_levels}, group_size={spec.group_size}"
        return f"{super().extra_repr()}, {grid}"
