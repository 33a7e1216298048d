"""Layer-Batch Normalization: it trains like a layer norm and divides by a constant at inference.

Our reading of arXiv:2403.14999. In training every sample is divided by the root mean square pooled
over its own tokens and features, with the gradient through it; a running average of the log
statistic becomes the one scalar used at inference. A LayerNorm's centring stays exact and per token
(W(x - mean) costs nothing extra: centring is linear), RMS norms are not centered. Frozen statistics
of single tokens cost 0.7 nats, pooled ones nothing (notebook: "Which statistics can be made static,
from scratch").

A norm is in one of four states, and the whole package uses these words for them:

=========  ===============================================  ====================================
state      what an input is divided by                      what sets it
=========  ===============================================  ====================================
token      each token's own root mean square, always        ``statistics="token"``
gate open  in training the sample's, pooled over tokens;    ``statistics="gated"``, ``gate`` 1;
           in evaluation the running average                a gate of 0 is closed: as "token"
fixed      the running average, in training too, without    ``statistics="gated"``, ``gate`` 1
           a gradient                                       and the attribute ``fixed``
static     the running average, a constant                  ``statistics="static"``, by packing
=========  ===============================================  ====================================

Not in the paper, for pretrained models:

- ``gate`` g in [0, 1] mixes log statistics, (1 - g) * token + g * pooled, so that conversion
  (g = 0) changes nothing and a schedule can move the model over;
- the first token of a sequence may keep its own statistic (``first_token="own"``): pretrained
  models park a massive activation there, of rms 960 against 6 to 30 (notebook: "Massive activations
  on first tokens"). It costs nothing in decoding, where no first token occurs;
- ``fixed`` norms at the end of a training let the model adapt to the constants it will have: 0.03
  nats and more from scratch (notebook: "Norms that end their training with constants");
- ``pooling="geometric"`` averages log statistics, so that one massive token cannot own the mean.

Static norms alone are not new; see FakeLN (arXiv:2409.13710, 2507.02559), TaperNorm (2602.10408),
PRepBN/SLAB (2405.11582), RBN (2210.05153), PowerNorm (2003.07845).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..functional import normalize, pooled_log_ms, token_log_ms, widen
from ..kernels import serves
from ..kernels.norm import NativeNorm
from .calls import NO_BACKWARD, running_backward
from .context import BatchContext, FirstToken
from .precision import Apply, without_narrowing
from .spec import LinearSpec
from .stamp import CountedModule, Derived

Statistics = Literal["token", "gated", "static"]

MOMENTUM_BATCH = 8
"""The number of samples that ``NormSpec.momentum`` speaks of."""


@dataclass(frozen=True)
class NormSpec:
    """How one norm computes; plain values, as they stand in a checkpoint's config.

    Args:
        centered: subtract each token's mean first (LayerNorm) or not (RMSNorm).
        weight, bias: whether an affine is left (False once folded into the consumers).
        statistics: "token" (the original norm), "gated" (in training) or "static" (in inference),
            see the table of states in the module's docstring.
        first_token: "own": the first token of a sequence keeps its own statistic; "shared": it
            takes part like any other.
        pooling: "mean" of squares over the sample's tokens, or "geometric" (mean of logs).
        momentum: weight of a batch of ``MOMENTUM_BATCH`` samples in the running average. n samples
            weigh 1 - (1 - momentum) ** (n / MOMENTUM_BATCH): the average spans the same samples at
            every batch size.
        folded: static only: the scalar lives in ``weight`` or in the consumers, here it is 1.

    ``MaQDConfig`` takes the defaults of ``pooling`` and ``momentum`` from here.
    """

    centered: bool = False
    weight: bool = True
    bias: bool = False
    statistics: Statistics = "gated"
    first_token: FirstToken = LinearSpec.first_token
    pooling: Literal["mean", "geometric"] = "geometric"
    momentum: float = 0.05
    folded: bool = False


class LayerBatchNorm(CountedModule):
    """Layer-Batch Normalization of inputs (batch, tokens, features); see the module's docstring.

    The parameters ``weight`` and ``bias`` are (features,) or None. ``running_log_ms`` (1,),
    ``batches_seen`` (1,) and ``gate`` (1,) are float32 and in every checkpoint; they are buffers,
    because they change in forward and must neither be sharded nor optimized. While the attribute
    ``fixed`` is True, training uses the running average and does not move it.

    >>> norm = LayerBatchNorm(4, NormSpec(weight=False))
    >>> x = torch.randn(2, 3, 4)
    >>> torch.allclose(norm(x), nn.functional.rms_norm(x, (4,), eps=norm.eps))  # gate 0
    True
    """

    running_log_ms: Tensor
    batches_seen: Tensor
    gate: Tensor

    def __init__(
        self,
        features: int,
        spec: NormSpec,
        eps: float = 1e-6,
        context: BatchContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.spec, self.eps = features, spec, eps
        self.context = context or BatchContext()
        self.fixed = False
        self._native: Derived[NativeNorm] = Derived()

        def affine(wanted: bool) -> nn.Parameter | None:
            empty = torch.empty(features, device=device, dtype=dtype)
            return nn.Parameter(empty) if wanted else None

        self.weight, self.bias = affine(spec.weight), affine(spec.bias)
        for name in ("running_log_ms", "batches_seen", "gate"):
            self.register_buffer(name, torch.zeros(1, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the affine to identity, forget the statistics and close the gate."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget the running statistic and close the gate."""
        for buffer in (self.running_log_ms, self.batches_seen, self.gate):
            buffer.zero_()

    def _apply(self, fn: Apply, recurse: bool = True) -> LayerBatchNorm:
        return super()._apply(without_narrowing(fn, [*self.parameters(), *self.buffers()]), recurse)

    def native_norm(self) -> NativeNorm:
        """The norm as the compiled library reads it; for norms that are not "gated"."""
        tensors = (*self._parameters.values(), self._buffers["running_log_ms"])
        return self._native.get(tensors, self._make_native, self.spec)

    def _make_native(self) -> NativeNorm:
        static, folded = self.spec.statistics == "static", self.spec.folded
        log_ms = float(self.running_log_ms)
        return NativeNorm(
            self.features,
            self.eps,
            token=not static,
            constant=math.exp(-log_ms / 2) if static and not folded else 1.0,
            first_factor=math.exp(log_ms / 2) if static and folded else 1.0,
            own_first=static and self.spec.first_token == "own",
            centered=self.spec.centered,
            weight=self.weight,
            bias=self.bias,
        )

    def _native_serves(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or self.spec.statistics == "gated" or x.dtype != torch.float32:
            return False
        return serves(x, self.running_log_ms)

    def forward(self, x: Tensor) -> Tensor:
        """The normalized ``x`` (batch, ..., features), in its shape and dtype."""
        if self._native_serves(x):
            norm = self.native_norm()
            return norm(x, self.context.masks_for(x)[1] if norm.own_first else None)
        y = widen(x)
        if self.spec.centered:
            y = y - y.mean(dim=-1, keepdim=True)
        y = self._static(y) if self.spec.statistics == "static" else self._dynamic(y)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _dynamic(self, x: Tensor) -> Tensor:
        """``x`` (batch, ..., features) over the statistic of a "token" or "gated" norm."""
        token = token_log_ms(x, self.eps)
        if self.spec.statistics == "token":
            return normalize(x, token)
        valid, first = self.context.masks_for(x)
        own_first = first if self.spec.first_token == "own" else None
        if self.training and not self.fixed:
            counted = _both(valid, None if own_first is None else ~own_first)
            pooled = pooled_log_ms(token, counted, geometric=self.spec.pooling == "geometric")
            self._observe(pooled, counted)
        else:
            pooled = self.running_log_ms
        gate = self.gate.to(token.dtype)
        mixed = torch.lerp(token, pooled.to(token.dtype).expand_as(token), gate)
        return normalize(x, mixed if own_first is None else torch.where(own_first, token, mixed))

    def _static(self, x: Tensor) -> Tensor:
        """``x`` (batch, ..., features) over the constant of a "static" norm."""
        static = self.running_log_ms
        folded = static if self.spec.folded else torch.zeros_like(static)
        _, first = self.context.masks_for(x)
        if self.spec.first_token == "own" and first is not None:
            token = token_log_ms(x, self.eps)
            return normalize(x, torch.where(first, token, static) - folded)
        if self.spec.folded:
            return x
        return normalize(x, static.view([1] * (x.dim() - 1)))

    @torch.no_grad()
    def _observe(self, pooled: Tensor, counted: Tensor | None) -> None:
        """Move the running average towards the samples' statistics ``pooled`` (batch, 1, ...).

        ``counted`` (batch, ...) marks the tokens that count: a sample without one does not.
        """
        if running_backward() != NO_BACKWARD:  # gradient checkpointing: it was observed before
            return
        new = pooled.detach().to(self.running_log_ms.dtype).flatten()
        counts = new.isfinite()  # one bad batch must not spoil the average for good
        if counted is not None:
            counts &= counted.flatten(1).any(dim=1)
        samples = counts.sum()
        self.batches_seen += samples > 0
        steady = 1 - (1 - self.spec.momentum) ** (samples / MOMENTUM_BATCH)
        momentum = torch.maximum(1 / self.batches_seen.clamp(min=1), steady)
        average = torch.where(counts, new, 0).sum() / samples.clamp(min=1)
        self.running_log_ms.lerp_(average.expand(1), momentum * (samples > 0))

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, {self.spec}"


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b
