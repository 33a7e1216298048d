"""Layer-Batch Normalization: trains like a layer norm, and at inference its statistics are fixed.

Our reading of arXiv:2403.14999. In training every sample is divided by the root mean square pooled
over its own tokens and features, with the gradient through it; a running average of the log
statistic becomes the one scalar used at inference. A LayerNorm's centring stays exact and per token
(W(x - mean) costs nothing extra: centring is linear), RMS norms are not centred.

Why pooled and not per token: a running average of per-token statistics destroys a model that was
trained with per-token ones, pooled statistics do not (``scripts/experiments/lbn_from_scratch.py``).

Not in the paper, for pretrained models:
- ``gate`` g in [0, 1] mixes log statistics, (1 - g) * token + g * pooled, so that conversion
  (g = 0) changes nothing and a schedule can move the model over;
- the first token of a sequence may keep its own statistic (``first_token="own"``): pretrained
  models park a massive activation there (rms 960 against 6 to 30 in SmolLM2-135M). It costs
  nothing in decoding, where no first token occurs;
- ``fixed`` ends a training with the running averages already, as constants without a gradient: the
  model adapts to the statistics it will have. From the start this fails; as the last 40 % of the
  steps it won 0.03 nats and more from scratch (``scripts/experiments/lbn_batch_size.py``);
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
from .context import BatchContext, FirstToken
from .precision import Apply, without_narrowing
from .stamp import CountedModule, Derived

Statistics = Literal["token", "gated", "static"]

MOMENTUM_BATCH = 8


@dataclass(frozen=True)
class NormSpec:
    """How one norm computes; plain values, as they stand in a checkpoint's config.

    Args:
        centered: subtract each token's mean first (LayerNorm) or not (RMSNorm).
        weight, bias: whether an affine is left (False once absorbed by the consumers).
        statistics: "token" (the original norm), "gated" (QAT, see module docstring) or "static".
        first_token: "own": the first token of a sequence keeps its own statistic; "shared": it
            takes part like any other.
        pooling: "mean" of squares over the sample's tokens, or "geometric" (mean of logs).
        momentum: weight of a batch of ``MOMENTUM_BATCH`` samples in the running average. n samples
            weigh 1 - (1 - momentum) ** (n / MOMENTUM_BATCH): the average spans the same samples at
            every batch size.
        absorbed: static only: the scalar lives in ``weight`` or in the consumers, here it is 1.
    """

    centered: bool = False
    weight: bool = True
    bias: bool = False
    statistics: Statistics = "gated"
    first_token: FirstToken = "shared"
    pooling: Literal["mean", "geometric"] = "mean"
    momentum: float = 0.05
    absorbed: bool = False

    @property
    def folded(self) -> bool:
        """Whether nothing is left to multiply with."""
        return self.absorbed and not self.weight


def _recomputing() -> bool:
    """True while autograd runs a forward again for gradient checkpointing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class LayerBatchNorm(CountedModule):
    """Layer-Batch Normalization over inputs (batch, tokens, features); see the module docstring.

    Parameters ``weight`` and ``bias`` are (features,) or None. Buffers, float32 and in every
    checkpoint: ``running_log_ms`` (1,), ``batches_seen`` (1,), ``gate`` (1,). Buffers, because they
    change in forward and must neither be sharded nor optimised. While ``fixed`` (an attribute, set
    by a schedule) training uses the running average and does not move it.

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
        """Affine to identity, statistics forgotten, gate closed (the original norm)."""
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
        """What the compiled library is given of a norm that is not "gated"."""
        tensors = (*self._parameters.values(), self._buffers["running_log_ms"])
        return self._native.get(tensors, self._make_native, self.spec)

    def _make_native(self) -> NativeNorm:
        static, absorbed = self.spec.statistics == "static", self.spec.absorbed
        log_ms = float(self.running_log_ms)
        return NativeNorm(
            self.features,
            self.eps,
            token=not static,
            constant=math.exp(-log_ms / 2) if static and not absorbed else 1.0,
            first_factor=math.exp(log_ms / 2) if static and absorbed else 1.0,
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
        """(batch, ..., features) -> the same shape and dtype."""
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
        static = self.running_log_ms
        absorbed = static if self.spec.absorbed else torch.zeros_like(static)
        _, first = self.context.masks_for(x)
        if self.spec.first_token == "own" and first is not None:
            token = token_log_ms(x, self.eps)
            return normalize(x, torch.where(first, token, static) - absorbed)
        if self.spec.absorbed:
            return x
        return normalize(x, static.view([1] * (x.dim() - 1)))

    @torch.no_grad()
    def _observe(self, pooled: Tensor, counted: Tensor | None) -> None:
        if _recomputing():
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
