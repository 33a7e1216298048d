"""Layers for inference, which hold packed codes and never a float weight.

The codes are in the parameter named ``weight``, as int32 words: a loader that does not know this
package fails on its shape instead of giving a random model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..functional import scale_dtype
from ..packing import pack_codes, words_per_row
from .activation import (
    NEVER_CALIBRATED,
    ActivationQuantizer,
    activation_step,
    rotate,
    round_inputs,
)
from .context import BatchContext
from .embedding import MaQDEmbedding
from .linear import MaQDLinear
from .precision import Apply, mark_output_dtype, without_narrowing
from .spec import LinearSpec
from .stamp import CountedModule, Derived, freeze


def _frozen(shape: tuple[int, ...], dtype: torch.dtype, device: object = None) -> nn.Parameter:
    empty = torch.empty(shape, dtype=dtype, device=device)  # type: ignore[call-overload]
    return nn.Parameter(empty, requires_grad=False)


def check_calibrated(layer: MaQDLinear, name: str) -> None:
    """``ValueError`` if ``layer``, called ``name`` in the message, has no activation step yet."""
    if isinstance(layer.activation, ActivationQuantizer) and not layer.activation.calibrated:
        raise ValueError(f"{name}: {NEVER_CALIBRATED}")


class PackedModule(CountedModule):
    """What packed layers have in common: no edit of their parameters goes unnoticed.

    They are frozen as soon as they are filled, and not when a kernel first reads them: a graph of
    ``torch.compile`` depends on what kind of parameters it saw, and would be made twice.
    """

    def freeze(self) -> None:
        """Freeze the parameters (``FrozenParameter``) that have no gradient."""
        for parameter in self.parameters(recurse=False):
            freeze(parameter)

    def _apply(self, fn: Apply, recurse: bool = True) -> PackedModule:
        super()._apply(fn, recurse)
        self.freeze()  # a conversion may have made new ones
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.freeze()


class PackedLinear(PackedModule):
    """A linear layer on packed codes: what packing makes of a ``MaQDLinear``.

    Its parameters are frozen (and no buffers, so that offloading moves them): ``weight_scale``
    (out, groups) of ``functional.scale_dtype``, ``weight`` (out, words) int32, and in float32
    ``weight_offset`` (out, 1) or None, ``activation_step`` (1,) or None, ``bias`` (out,) or None.

    The compiled kernel sums integers, the torch reference floats: both use the same codes, and
    their outputs agree to float32 rounding (about 1e-6 of the output's norm). Every layer
    multiplies for itself: one call for q, k and v took 17.9 ms a token and three 17.7 (notebook:
    "One call for the layers that read one input").
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: LinearSpec,
        context: BatchContext | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if spec.weight_levels is None:
            raise ValueError("a packed layer needs weight_levels; float weights are not packed")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.levels: int = spec.weight_levels
        self.context = context or BatchContext()
        words = words_per_row(in_features, self.levels)
        floats = torch.float32
        groups = self.groups = spec.groups(in_features)
        self.rotation = spec.rotation_size(in_features)
        # The scale comes first: models take their first parameter's dtype for that of activations.
        self.weight_scale = _frozen((out_features, groups), scale_dtype(groups), device)
        self.weight = _frozen((out_features, words), torch.int32, device)
        self.weight_offset = (
            _frozen((out_features, 1), floats, device) if spec.weight_offset else None
        )
        self.activation_step = _frozen((1,), floats, device) if spec.static_activations else None
        self.bias = _frozen((out_features,), floats, device) if bias else None
        self._native: Derived[kernels.NativeWeight] = Derived()
        self._number = kernels.register(self)  # compiled graphs find the layer by it

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: MaQDLinear) -> PackedLinear:
        """The packed form of a trained layer.

        Raises:
            ValueError: the layer has a static activation step that was never calibrated.
        """
        check_calibrated(layer, f"MaQDLinear({layer.extra_repr()})")
        packed = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.spec,
            device=layer.weight.device,
        )
        packed.weight.copy_(pack_codes(layer.weight_codes(), packed.levels))
        packed.weight_scale.copy_(layer.weight_scale())
        if packed.weight_offset is not None and layer.weight_offset is not None:
            packed.weight_offset.copy_(layer.weight_offset)
        if packed.bias is not None:
            packed.bias.copy_(layer.bias)
        packed.context = layer.context
        static = getattr(layer.activation, "log_step", None)
        if packed.activation_step is not None and static is not None:
            packed.activation_step.copy_(static.exp())
        packed.freeze()
        return packed

    def _apply(self, fn: Apply, recurse: bool = True) -> PackedModule:
        return super()._apply(without_narrowing(fn, self.parameters(), self.weight_scale), recurse)

    def widen_scale(self) -> None:
        """Hold the scales in float32 while a file is loaded; ``narrow_scale`` undoes it."""
        self.weight_scale.data = self.weight_scale.data.float()

    def narrow_scale(self) -> None:
        """Hold the scales in their stored dtype; float32 ones, as older files have, are rounded."""
        self.weight_scale.data = self.weight_scale.data.to(scale_dtype(self.weight_scale.shape[1]))

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` (..., in), in the basis of the weight, on the activation grid if there is one."""
        if self.spec.activation_levels is None:
            return x
        return round_inputs(x, self.spec, self.activation_step, self.context)

    def dequantized_weight(self) -> Tensor:
        """The float weight (out, in), in the rotated basis if the layer rotates its input."""
        return kernels.unpack_weight(
            self.weight, self.levels, self.in_features, self.weight_scale, self.weight_offset
        )

    def native_weight(self) -> kernels.NativeWeight:
        """The weight in the kernel's layout (``GpuWeight`` on a GPU), made anew when it changed."""
        # It is made from all parameters: to take some, `Module` would look each up by name.
        return self._native.get(self._parameters.values(), self._make_native)

    def _make_native(self) -> kernels.NativeWeight:
        self.freeze()  # those that somebody has put in since
        # On a CPU the library rotates a token as it quantizes it, on a GPU `forward` has done so.
        rotation = {"rotation": self.rotation} if self.weight.is_cpu else {}
        return kernels.weight_type(self.weight.device)(
            self.weight,
            self.levels,
            self.in_features,
            self.weight_scale,
            self.weight_offset,
            self.bias,
            self.spec.activation_levels,
            activation_clip_ratio=self.spec.activation_clip_ratio,
            group_steps=self.spec.input_group is not None,
            **rotation,
        )

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._number = kernels.register(self)

    def _native_step(self, x: Tensor) -> Tensor | None:
        """The activation steps for the compiled kernel.

        A step of 0 asks for a token's own; None stands for the own step of every token, or for
        float activations.
        """
        if self.activation_step is None:
            return None
        own = torch.zeros_like(self.activation_step)
        return activation_step(x, self.spec, self.activation_step, self.context, own)

    def product(self, x: Tensor, step: Tensor | None) -> Tensor:
        """The compiled kernel's product of ``x`` (..., in), quantized with ``step`` unless None.

        The kernel for the CPU rotates ``x`` first, the one for a GPU takes it rotated.
        """
        return self.native_weight()(x, step)

    def forward(self, x: Tensor) -> Tensor:
        serves = kernels.native_serves(x, self.weight, self.levels, self.groups)
        if not (serves and x.is_cpu):
            x = rotate(x, self.rotation, self.context)
        if serves:
            step = self._native_step(x)
            if torch.compiler.is_compiling():
                return kernels.packed_linear_op(x, step, self._number, self.out_features)
            return self.product(x, step)
        return kernels.packed_linear(
            self.quantize_input(x),
            self.weight,
            self.levels,
            self.weight_scale,
            self.weight_offset,
            self.bias,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec}"


class PackedEmbedding(PackedModule):
    """An embedding on packed codes: what packing makes of a ``MaQDEmbedding``.

    Its parameters are those of a ``PackedLinear`` with one scale a row. The output has the dtype of
    the empty parameter ``output_like``.
    """

    output_like: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        levels: int,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
        device: torch.device | str | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.levels, self.padding_idx, self.output_scale = levels, padding_idx, output_scale
        words = words_per_row(embedding_dim, levels)
        self.weight = _frozen((num_embeddings, words), torch.int32, device)
        self.weight_scale = _frozen((num_embeddings, 1), torch.float32, device)
        self.weight_offset = _frozen((num_embeddings, 1), torch.float32, device)
        mark_output_dtype(self, output_dtype or torch.float32)
        self._native: Derived[kernels.Table] = Derived()

    @classmethod
    @torch.no_grad()
    def from_qat(cls, table: MaQDEmbedding) -> PackedEmbedding:
        """The packed form of a trained embedding."""
        packed = cls(
            table.num_embeddings,
            table.embedding_dim,
            table.levels,
            table.padding_idx,
            table.output_scale,
            table.weight.device,
            table.output_like.dtype,
        )
        packed.weight.copy_(pack_codes(table.weight_codes(), table.levels))
        packed.weight_scale.copy_(table.weight_log_scale.exp())
        packed.weight_offset.copy_(table.weight_offset)
        packed.freeze()
        return packed

    def _apply(self, fn: Apply, recurse: bool = True) -> PackedModule:
        wide = (self.weight_scale, self.weight_offset)
        return super()._apply(without_narrowing(fn, wide), recurse)

    def tie(self, head: PackedLinear) -> None:
        """Make ``head`` share this table's words, scales and offsets."""
        for name in ("weight", "weight_scale", "weight_offset"):
            setattr(head, name, getattr(self, name))

    def dequantized_weight(self) -> Tensor:
        """The float table (rows, dim)."""
        return kernels.unpack_weight(
            self.weight, self.levels, self.embedding_dim, self.weight_scale, self.weight_offset
        )

    def native_table(self) -> kernels.Table:
        """The table as the compiled library reads it."""
        words, scale, offset = self.weight, self.weight_scale, self.weight_offset

        def make() -> kernels.Table:
            self.freeze()
            return kernels.Table(
                words, self.levels, self.embedding_dim, scale, offset, self.output_scale
            )

        return self._native.get((words, scale, offset), make)

    def forward(self, ids: Tensor) -> Tensor:
        if kernels.serves(ids, self.weight):
            return self.native_table()(ids).to(self.output_like.dtype)
        rows = kernels.packed_embedding(
            ids, self.weight, self.levels, self.embedding_dim, self.weight_scale, self.weight_offset
        )
        return (rows * self.output_scale).to(self.output_like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, levels={self.levels}"
