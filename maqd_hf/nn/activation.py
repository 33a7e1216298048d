"""What happens to a layer's input before the product: rotation, then the round-clip.

``MaQDLinear`` and ``PackedLinear`` both come here, so that they compute the same numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..functional import scaled_round_clip, token_step, widen
from ..kernels.fake_quantize import round_tokens
from ..kernels.hadamard import hadamard
from .context import BatchContext
from .precision import product_dtype
from .spec import LinearSpec


def own_rows(x: Tensor, group: int | None) -> Tensor:
    """``x`` (..., in) as rows that have one step each: unchanged, or (..., groups, ``group``)."""
    return x if group is None else x.unflatten(-1, (-1, group))


def activation_step(
    x: Tensor,
    spec: LinearSpec,
    static: Tensor | None,
    context: BatchContext,
    own: Tensor | None = None,
) -> Tensor:
    """The step in force for ``x`` (..., D), rows as of ``own_rows``: (1,) or (..., 1).

    ``static`` is the layer's static step, None where it has none. ``own`` is put in place of the
    step that a token takes from itself, where that is not to be computed here.
    """
    levels = spec.input_grid_levels

    def of_token() -> Tensor:
        return token_step(widen(x), levels, spec.activation_clip_ratio) if own is None else own

    if static is None:
        return of_token()
    _, first = context.masks_for(x)
    if spec.first_token == "shared" or first is None:
        return static
    return torch.where(first.unsqueeze(-1), of_token(), static)


def rotate(x: Tensor, size: int, context: BatchContext | None = None) -> Tensor:
    """``x`` (..., in) rotated from the input's basis to that of the weight's columns, or back.

    The Hadamard transform is its own inverse. ``size`` is a layer's ``rotation``, 1 for none. With
    ``context``, an input that several layers read is rotated once.
    """
    if size == 1:
        return x
    return hadamard(x, size) if context is None else context.once(x, size, hadamard)


def _round_for_product(x: Tensor, grid: tuple[int, float, int | None]) -> Tensor:
    """``x`` on the grids of its own tokens or groups; ``grid``: levels, clip ratio, group."""
    levels, clip_ratio, group = grid
    return round_tokens(own_rows(x, group), levels, clip_ratio, product_dtype(x)).reshape(x.shape)


def round_inputs(
    x: Tensor, spec: LinearSpec, static: Tensor | None, context: BatchContext
) -> Tensor:
    """``x`` (..., in) on the grid of ``spec``, differentiable; ``static``: the static step."""
    levels = spec.input_grid_levels
    rows = own_rows(x, spec.input_group)
    step = activation_step(rows, spec, static, context)
    rounded = scaled_round_clip(widen(rows), levels, step, spec.surrogate)
    return rounded.to(x.dtype).reshape(x.shape)


NEVER_CALIBRATED = (
    "the static activation step was never calibrated; run "
    "maqd_hf.calibration.calibrate_activations(model, batches), train with MaQDTrainer, or use "
    "activation_scaling='token'"
)


class _WithoutBackward(torch.autograd.Function):
    """The input as it is; its backward is refused, since the step would never be learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError(f"{ctx.name}: {NEVER_CALIBRATED}")


def check_all_calibrated(model: nn.Module) -> None:
    """``ValueError`` that names a layer of ``model`` whose static step was never calibrated.

    To be asked before anything is measured: a forward would leave the inputs float.
    """
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer) and not module.calibrated:
            raise ValueError(f"{name.removesuffix('.activation')}: {NEVER_CALIBRATED}")


class ActivationQuantizer(nn.Module):
    """The round-clip on a layer's input; a static step is learned as its logarithm.

    ``log_step`` (1,) is NaN until calibrated. Until then inputs stay float, with a warning, and a
    backward, a compiled forward and packing raise ``ValueError``: nothing is trained, measured by
    this package or kept on a grid that nobody has chosen. Adam's change of a logarithm is a
    relative change of the step, so that one learning rate fits steps of 0.002 and of 20 (not in the
    paper).
    """

    # Whether ``log_step`` was seen to be calibrated. Training cannot take that back, so it is
    # looked at once and not in every forward, which would make a GPU wait.
    _seen_calibrated = False

    def __init__(
        self, spec: LinearSpec, context: BatchContext, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.levels, self.spec, self.context = spec.input_grid_levels, spec, context
        self.log_step: nn.Parameter | None = None
        if spec.static_activations:
            self.log_step = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the static step: it is NaN until it is calibrated again."""
        self._seen_calibrated = False
        if self.log_step is not None:
            nn.init.constant_(self.log_step, float("nan"))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._seen_calibrated = False
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def calibrated(self) -> bool:
        """Whether a static step is known, or none is needed."""
        if self._seen_calibrated or self.log_step is None:
            return True
        return not bool(self.log_step.isnan().any())

    def set_step(self, step: float | Tensor) -> None:
        """Set the static step: the distance between two levels, in units of the input.

        Raises:
            ValueError: the steps come from the tokens.
        """
        if self.log_step is None:
            raise ValueError("per-token quantizers take their step from each token")
        self._seen_calibrated = False
        with torch.no_grad():
            self.log_step.copy_(torch.as_tensor(step).log())

    def _has_step(self) -> bool:
        """Whether inputs can be rounded; ``ValueError`` if not and a graph would keep that."""
        if self._seen_calibrated or self.log_step is None:
            return True
        if torch.compiler.is_compiling():
            self._check_when_traced()
            return True
        self._seen_calibrated = self._look()
        return self._seen_calibrated

    @torch.compiler.assume_constant_result
    def _check_when_traced(self) -> None:
        if not self._look():  # and nothing else: the trace depends on the flag, which must not move
            raise ValueError(f"{self._name()}: {NEVER_CALIBRATED}")

    def _look(self) -> bool:
        # A fake tensor, as exports use, has a shape and no value to look at.
        return isinstance(self.log_step, FakeTensor) or self.calibrated

    def _name(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _static_step(self) -> Tensor | None:
        return None if self.log_step is None else self.log_step.exp()

    def clipped(self, x: Tensor) -> Tensor:
        """The share of ``x`` (..., in) beyond the outermost levels by more than half a step, ()."""
        rows = own_rows(x, self.spec.input_group)
        step = activation_step(rows, self.spec, self._static_step(), self.context)
        return (rows.abs() > step * (self.levels / 2)).float().mean()

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if not self._has_step():
            warnings.warn(f"inputs stay float: {NEVER_CALIBRATED}", stacklevel=2)
            unknown: Tensor = _WithoutBackward.apply(x, self.log_step, self._name())
            return unknown
        if self.log_step is None and spec.surrogate == "clip":
            grid = (self.levels, spec.activation_clip_ratio, spec.input_group)
            return self.context.once(x, grid, _round_for_product)
        return round_inputs(x, spec, self._static_step(), self.context)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, scaling={self.spec.activation_scaling}"
