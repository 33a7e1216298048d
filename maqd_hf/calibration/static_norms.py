"""The choice of norms that can be static, measured on a little text before any training.

A pretrained model can be taught static norms (``trainer``), but a short training cannot teach it
all of them: some norms damp massive tokens, and a model in which one such norm is static explodes.
``select_static_norms`` finds the norms that can be static almost for nothing, with forward passes
alone; the trainer then opens the gates of these only, the others stay per token:

    selection = select_static_norms(model, token_ids, tolerance=0.05)
    print(selection)
    MaQDTrainingArguments(..., lbn_norms=selection.static)

The trainer makes this choice by itself where it is not given one.

Not in the paper, which trains from scratch. The reference p is the model's own output with float
activations and its gates as they are. The cost of a set S of static norms is
KL(p || quantized, S static) - KL(p || quantized), nats per token: the increase of the loss that the
model itself expects, without the noise that labels add. At a tolerance of 0.05 nats it admits 14 of
SmolLM2's 60 norms, which add 0.039 on other text (notebook: "Which norms of SmolLM2 can be static,
untrained"). The float output is the reference because against the quantized one every harmless norm
seems to cost up to 0.09 (notebook: "Static norms judged by the quantized output").

Costs do not add up: a static norm no longer damps what an earlier one lets through. Norms are
therefore first measured alone and then admitted *together*, cheapest first, while the joint cost
stays within the tolerance.

Activation quantizers belong to the measurement: they clip the massive tokens that a static norm
would let through. Convert and calibrate first, then select.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..models.finding import gated_norms
from ..models.names import collapse
from ..nn import LayerBatchNorm, MaQDLinear
from ..nn.activation import check_all_calibrated
from ..nn.modes import evaluating
from .blocks import (
    Batch,
    Batches,
    Entries,
    as_batches,
    counted_tokens,
    float_activations,
    run_model,
)

TOLERANCE = 0.02
"""Nats a token that static norms may add unless the caller says otherwise: less than a training of
a few ten thousand tokens gains."""


class NoLogitsError(ValueError):
    """A model without logits, whose output cannot be compared."""


@dataclass(frozen=True)
class NormChoice:
    """One norm's measurement; costs in nats per token.

    ``alone`` is the cost with only this norm static, ``joint`` with it and all admitted before it;
    None if that was not measured, because the sum of their costs exceeds the tolerance already.
    """

    name: str
    static: bool
    alone: float
    joint: float | None
    reason: str


@dataclass
class NormSelection:
    """Result of ``select_static_norms``; ``str(selection)`` is the readable form.

    ``cost`` is the joint cost of all ``static`` norms on the calibration text.
    """

    tolerance: float
    cost: float = 0.0
    choices: list[NormChoice] = field(default_factory=list)

    @property
    def static(self) -> list[str]:
        """Full names of the norms that can be static, in the model's order."""
        return [choice.name for choice in self.choices if choice.static]

    @property
    def per_token(self) -> list[str]:
        """Full names of the norms that had better stay per token, in the model's order."""
        return [choice.name for choice in self.choices if not choice.static]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (a cost that is not finite becomes None)."""
        content = asdict(self)
        for choice in content["choices"]:
            for key in ("alone", "joint"):
                if choice[key] is not None and not math.isfinite(choice[key]):
                    choice[key] = None
        return content

    def __str__(self) -> str:
        lines = [
            f"{len(self.static)} of {len(self.choices)} norms can be static: together "
            f"{self.cost:.4f} nats per token (tolerance {self.tolerance:g})"
        ]
        for title, names in (("static", self.static), ("per token", self.per_token)):
            lines += [f"  {title}: {', '.join(collapse(names))}"] if names else []
        return "\n".join(lines)


def calibrate_norm_statistics(
    model: nn.Module, data: Batches, *, batch_size: int = 1
) -> dict[str, float]:
    """Set the running statistics of all gated norms from ``data``, as training would.

    Only the norms are in training mode in these forwards; earlier averages are forgotten. Gates,
    weights and modes stay as they are. Returns log mean squares by name; norms that the forward
    does not reach keep ``batches_seen`` 0 and are not listed. See ``select_static_norms`` for
    ``data``.
    """
    norms = gated_norms(model)
    batches = as_batches(data, model, batch_size)
    with evaluating(model):
        try:
            for norm in norms.values():
                norm.train()
                norm.batches_seen.zero_()
            for batch in batches:
                run_model(model, batch)
        finally:
            for norm in norms.values():
                norm.eval()
    return {name: float(norm.running_log_ms) for name, norm in norms.items() if norm.batches_seen}


def select_static_norms(
    model: nn.Module,
    data: Batches,
    tolerance: float = TOLERANCE,
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> NormSelection:
    """Choose the gated norms that can be static at a joint cost of at most ``tolerance`` nats.

    Args:
        model: converted by ``quantize_model``, with a head (``logits``) and, where activations are
            quantized statically, calibrated. Afterwards its norms hold calibrated statistics;
            nothing else has changed.
        data: token ids (samples, tokens), or batches (ids, or a tokenizer's mappings); a few
            windows of the usual length. Logits of all of them are kept for comparison.
        tolerance: admitted cost in nats per token.
        batch_size: samples in a forward when ``data`` is one tensor.
        progress: show bars.

    Takes a forward per norm, from the norm's block on, and a few more for the joint measurements.

    Raises:
        ValueError: a tolerance below 0, no data or padding alone, no gated norm, activations that
            were never calibrated, a model without logits, or one whose own output is not finite.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: nats per token, 0 or more")
    norms = gated_norms(model)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no gated norm: convert it with layer_batch_norm=True, "
            "before packing"
        )
    check_all_calibrated(model)
    batches = as_batches(data, model, batch_size)
    with evaluating(model), _fixed_weights(model):
        reached = calibrate_norm_statistics(model, batches)
        search = _Search(model, batches, tolerance)
        for name in tqdm(norms, desc="norms alone", disable=not progress):
            search.alone[name] = search.cost([name]) if name in reached else math.inf
        ranked = sorted(norms, key=lambda name: search.alone[name])
        with tqdm(total=len(norms), desc="norms together", disable=not progress) as bar:
            for start in range(0, len(ranked), _CHUNK):
                search.admit(ranked[start : start + _CHUNK], bar)
    return search.selection(norms)


_CHUNK = 8
"""The number of norms tried together at first; a chunk that costs too much is halved."""


class _Search:
    """The search for norms that can be static together: joint costs, and the norms admitted."""

    def __init__(self, model: nn.Module, batches: list[Batch], tolerance: float) -> None:
        self.model, self.batches, self.tolerance = model, batches, tolerance
        self.norms = gated_norms(model)
        with float_activations(model):
            self.reference = [
                self._log_probabilities(index, run_model(model, batch))
                for index, batch in enumerate(batches)
            ]
        if not sum(map(len, self.reference)):
            raise ValueError("no token of the data counts: give samples that are not padding alone")
        self.entries = Entries(model, batches)
        self.quantized = self._divergence(0)
        if not math.isfinite(self.quantized):
            raise ValueError("the model's own output holds NaN or infinity")
        self.alone: dict[str, float] = {}
        self.joint: dict[str, float] = {}
        self.admitted: list[str] = []
        self.total = 0.0

    def _log_probabilities(self, index: int, output: Any) -> Tensor:
        """Log probabilities (tokens that count, classes), float32, of an output for a batch."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise NoLogitsError(
                f"{type(self.model).__name__} returns no logits to compare: load it with its head "
                "(AutoModelForCausalLM, AutoModelForSequenceClassification, ...)"
            )
        counted = counted_tokens(self.batches[index], skip_first=False)
        if counted is not None and logits.shape[:-1] == counted.shape:
            logits = logits[counted]
        return logits.flatten(0, -2).float().log_softmax(dim=-1)

    def _divergence(self, block: int) -> float:
        """The divergence KL(reference || the model as it is now), nats per token.

        Nothing has changed before the block number ``block``.
        """
        total, tokens = 0.0, 0
        for index, own in enumerate(self.reference):
            now = self._log_probabilities(index, self.entries.run(index, block))
            total += float(nn.functional.kl_div(now, own, reduction="sum", log_target=True))
            tokens += len(own)
        return total / tokens

    def cost(self, names: list[str]) -> float:
        """The divergence that these norms add when they are static; infinite if not finite."""
        with _opened([self.norms[name] for name in names]):
            first = min(map(self.entries.block_of, names))
            cost = self._divergence(first) - self.quantized
        return cost if math.isfinite(cost) else math.inf

    def admit(self, names: list[str], bar: tqdm[Any]) -> None:
        """Admit all of ``names`` if the joint cost allows, else try its halves.

        Norms that are static together seldom cost less than the sum of their costs, so names whose
        sum exceeds the tolerance are not measured together.
        """
        if self.total + sum(self.alone[name] for name in names) <= self.tolerance:
            joint = self.cost(self.admitted + names)
            if joint <= self.tolerance or len(names) == 1:
                self.joint.update(dict.fromkeys(names, joint))
            if joint <= self.tolerance:
                self.admitted += names
                self.total = joint
                bar.update(len(names))
                return
        if len(names) == 1:
            bar.update()
            return
        middle = len(names) // 2
        self.admit(names[:middle], bar)
        self.admit(names[middle:], bar)

    def selection(self, order: Iterable[str]) -> NormSelection:
        """The result, with norms in ``order``."""
        choices = []
        for name in order:
            alone, joint = self.alone[name], self.joint.get(name)
            if name in self.admitted:
                reason = "within the tolerance"
            elif alone > self.tolerance:
                reason = "too expensive even alone"
            else:
                reason = "too expensive together with cheaper ones"
            choices.append(NormChoice(name, name in self.admitted, alone, joint, reason))
        return NormSelection(self.tolerance, self.total, choices)


@contextmanager
def _fixed_weights(model: nn.Module) -> Iterator[None]:
    """For a while, layers multiply with weights quantized once, not anew in every forward."""
    layers = [m for m in model.modules() if isinstance(m, MaQDLinear) and m.weight_step is not None]
    latent = [(layer.weight, layer.weight_step) for layer in layers]
    try:
        for layer in layers:
            quantized = layer.quantized_weight().detach()
            layer.weight = nn.Parameter(quantized, requires_grad=False)
            layer.weight_step = None
        yield
    finally:
        for layer, (weight, step) in zip(layers, latent, strict=True):
            layer.weight, layer.weight_step = weight, step


@contextmanager
def _opened(norms: list[LayerBatchNorm]) -> Iterator[None]:
    """For a while, the gates of these norms are open."""
    gates = [norm.gate.clone() for norm in norms]
    try:
        for norm in norms:
            norm.gate.fill_(1.0)
        yield
    finally:
        for norm, gate in zip(norms, gates, strict=True):
            norm.gate.copy_(gate)
