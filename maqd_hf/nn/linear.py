"""The trainable quantized layer: a Linear whose weight and input pass through the round-clip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..functional import gaussian_step, grid_center, stored_scale
from ..kernels.fake_quantize import fake_quantize_weight, weight_codes
from .activation import ActivationQuantizer, rotate
from .context import BatchContext
from .precision import Apply, product_dtype, without_narrowing
from .spec import LinearSpec
from .step_search import full_range_step, search_step

Start = Literal["search", "range", "gaussian"]
"""Where a grid starts: "search", the step of least squared error per group; "range", the step that
clips nothing, for grids that a calibration chooses again; "gaussian", the constant of M, for rows
trained from scratch."""


class MaQDLinear(nn.Linear):
    """Linear layer trained on the grid it will be packed on.

    ``y = q_a(x) @ W.T + bias`` with ``W = weight_scale * round_clip(standardize(weight) /
    weight_step) + weight_offset`` (``functional.fake_quantize_weight``). Input (..., in), output
    (..., out). Parameters, float32 (or float64) even in a bfloat16 model:

    - ``weight`` (out, in): the latent, under the name the float layer had;
    - ``weight_step`` (out, groups): the step on the standardized rows, constant in training;
    - ``weight_log_scale`` (out, groups): the log of what one code is worth, learned;
      ``weight_scale()`` is the scale in force;
    - ``weight_offset`` (out, 1): learned, or None;
    - ``activation.log_step`` (1,): see ``ActivationQuantizer``.

    With ``spec.rotation`` the input is rotated first, and all of these are in the rotated basis;
    ``input_weight`` and ``set_input_weight`` take the latent in the basis of the input.

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
        """M of the weight; None where it is float."""
        return self.spec.weight_levels

    @torch.no_grad()
    def reset_quantizer(self, start: Start = "search") -> None:
        """Take start values of step, scale and offset from the current latent.

        The scale is the least-squares fit, so that the layer starts as close to its float self as
        its grid allows. A layer with float weights stays as it is.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        if self.weight_step is None or self.weight_log_scale is None:
            return
        levels = self.spec.weight_grid_levels
        if not bool(self.weight.isfinite().all()):
            raise ValueError(
                f"the weight {tuple(self.weight.shape)} holds NaN or infinity: "
                "the float checkpoint is broken, nothing was quantized"
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
        """Put the grid at ``step`` (out, groups), in units of the weight, and the scale with it.

        ``offset`` (out, 1) becomes the learned offset, where the layer has one. ``refit`` fits the
        scale to the latent by least squares instead of taking ``step``.
        """
        _, weight_step, log_scale = self.grid()
        std = (self.weight.var(dim=1, keepdim=True, correction=0) + 1e-12).sqrt()
        weight_step.copy_(step / std)
        scale = step
        if refit:
            units = self.weight_units().view(*step.shape, -1)
            centered = self.weight - self.weight.mean(dim=1, keepdim=True)
            square = units.square().sum(-1).clamp(min=1e-12)
            fit = (units * centered.view_as(units)).sum(-1) / square
            scale = torch.where(fit > 0, fit, step)
        log_scale.copy_(scale.log())
        if self.weight_offset is not None and offset is not None:
            self.weight_offset.copy_(offset)

    def grid(self) -> tuple[int, nn.Parameter, nn.Parameter]:
        """The weight's levels, ``weight_step`` and ``weight_log_scale``.

        Raises:
            ValueError: the weight is float, or multiplied as float for the moment.
        """
        levels, step, log_scale = self.spec.weight_levels, self.weight_step, self.weight_log_scale
        if levels is None or step is None or log_scale is None:
            raise ValueError(
                f"weight_levels={levels}, and the weight {tuple(self.weight.shape)} has no grid in "
                "force: only quantized weights have codes and scales"
            )
        return levels, step, log_scale

    def weight_codes(self) -> Tensor:
        """The weight's codes (out, in), floats in 0..M-1."""
        levels, step, _ = self.grid()
        return weight_codes(self.weight, step, levels)

    def weight_units(self) -> Tensor:
        """The weight's codes around zero: (out, in) in -(M-1)/2 .. (M-1)/2."""
        return self.weight_codes() - grid_center(self.spec.weight_grid_levels)

    def weight_scale(self) -> Tensor:
        """What one code is worth, (out, groups), rounded as it is stored; differentiable."""
        if self.weight_log_scale is None:
            raise ValueError("weight_levels=None: the layer's weight is float and has no scales")
        return stored_scale(self.weight_log_scale.exp())

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in force (out, in), in ``dtype`` (None: the latent's); differentiable."""
        if self.weight_step is None:
            return self.weight.to(dtype or self.weight.dtype)
        levels, step, _ = self.grid()
        return fake_quantize_weight(
            self.weight, step, self.weight_scale(), self.weight_offset, levels, dtype
        )

    def input_weight(self) -> Tensor:
        """The latent (out, in) in the basis of the input, before any rotation."""
        return rotate(self.weight, self.rotation)

    @torch.no_grad()
    def set_input_weight(self, weight: Tensor) -> None:
        """Set the latent from ``weight`` (out, in), given in the basis of the input."""
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
        """A quantized copy of an ``nn.Linear``, or of a ``Conv1D`` (weight (in, out)).

        The copy is on the same device. ``start=None`` leaves the grid to a later
        ``reset_quantizer``.
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

    def extra_repr(self) -> str:
        spec = self.spec
        grid = f"weight_levels={spec.weight_levels}, group_size={spec.group_size}"
        return f"{super().extra_repr()}, {grid}"
