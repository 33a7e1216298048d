"""What happens between training steps: the gate's schedule, agreement of ranks, a look inside.

None of the three has a state that moves, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..functional import pooled_log_ms, quantize, standardize_weight, token_log_ms
from ..models.finding import gated_norms
from ..nn import ActivationQuantizer, LayerBatchNorm, MaQDLinear

SAMPLED_LAYERS = 4
"""Layers of each kind that ``QuantizerMonitor`` looks at: the cost of a log must not grow."""


class GateSchedule(TrainerCallback, ExportableState):
    """Moves pretrained norms from their own statistics (gate 0) to pooled ones (gate 1).

    The gate is a function of ``state.global_step`` alone: 0 until the fraction ``start`` of all
    steps, 1 from the fraction ``end`` on, linear in between. A gate that is further open (from an
    earlier training) stays so, and norms that match none of ``norms`` (glob patterns of module
    names; None or "*" = all) keep theirs. Not in the paper, which trains from scratch: a pretrained
    model needs the way from one statistic to the other.

    From the fraction ``fixed`` of all steps on (1 = never) the norms train with their running
    averages, which no longer move (``nn.norm``).
    """

    def __init__(
        self,
        start: float = 0.0,
        end: float = 0.2,
        norms: Sequence[str] | None = None,
        fixed: float = 1.0,
    ) -> None:
        if not 0 <= start <= end <= 1:
            raise ValueError(f"the gate opens from {start} to {end}: needs 0 <= start <= end <= 1")
        if not end <= fixed <= 1:
            raise ValueError(
                f"the statistics are fixed from {fixed} on: needs {end} (the gate is open) to 1"
            )
        self.start, self.end, self.norms, self.fixed = start, end, norms, fixed

    def state(self) -> dict[str, Any]:
        """The arguments, for the checkpoint: a resumed training opens the same norms."""
        norms = None if self.norms is None else list(self.norms)
        args = {"start": self.start, "end": self.end, "norms": norms, "fixed": self.fixed}
        return {"args": args, "attributes": {}}

    def gate(self, step: int, steps: int) -> float:
        """Gate after ``step`` of ``steps`` training steps.

        >>> [round(GateSchedule(0.0, 0.4).gate(step, 10), 2) for step in (0, 2, 4, 10)]
        [0.0, 0.5, 1.0, 1.0]
        """
        done = step / max(steps, 1)
        if done >= self.end:
            return 1.0
        return 0.0 if done <= self.start else (done - self.start) / (self.end - self.start)

    def selected(self, model: nn.Module) -> list[LayerBatchNorm]:
        """The norms this schedule moves; ``ValueError`` for a pattern that matches none."""
        norms = gated_norms(model)
        if self.norms is None:
            return list(norms.values())
        for pattern in self.norms:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in norms):
                raise ValueError(
                    f"lbn_norms: {pattern!r} matches no gated norm of this model; "
                    f"there are {', '.join(norms) or 'none (layer_batch_norm=False?)'}"
                )
        return [n for name, n in norms.items() if any(fnmatchcase(name, p) for p in self.norms)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._norms = self.selected(kwargs["model"])
        self._set(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set(state)

    def _set(self, state: TrainerState) -> None:
        gate = self.gate(state.global_step, state.max_steps)
        fixed = self.fixed < 1 and state.global_step >= self.fixed * state.max_steps
        for norm in self._norms:
            norm.gate.clamp_(min=gate)
            norm.fixed = fixed and bool(norm.batches_seen)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for norm in self._norms:
            norm.fixed = False


class RankAgreement(TrainerCallback):
    """After every step: one running statistic for all ranks, and one opinion on what is next.

    Each rank averages over its own samples; the mean over ranks makes the statistics those of the
    whole batch, and a checkpoint independent of who writes it. ``stop_requested`` (set by an
    interrupt) and ``save_requested`` travel in the same all-reduce: ranks that left the loop, or
    saved, at different steps would wait for each other for ever.
    """

    def __init__(self) -> None:
        self.stop_requested = self.save_requested = False
        self.between_steps = True

    def request_save(self) -> None:
        """Have a checkpoint saved after this step."""
        self.save_requested = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._statistics = [norm.running_log_ms for norm in gated_norms(kwargs["model"]).values()]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.between_steps = False

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            wishes = [float(self.stop_requested), float(self.save_requested)]
            together = torch.cat([*self._statistics, torch.tensor(wishes, device=args.device)])
            distributed.all_reduce(together)
            *means, stop, save = together.div_(distributed.get_world_size()).split(1)
            for statistic, mean in zip(self._statistics, means, strict=True):
                statistic.copy_(mean)
            self.stop_requested, self.save_requested = bool(stop > 0), bool(save > 0)
        control.should_training_stop |= self.stop_requested
        control.should_save |= self.stop_requested or self.save_requested
        self.save_requested = False
        self.between_steps = True
        return control


class QuantizerMonitor(TrainerCallback):
    """A look at a few layers for the log: are the levels used, what is clipped, do samples differ.

    Weights are read when ``metrics`` is called; what depends on data is measured by hooks during
    the last step before a log, and not at all under ``torch.compile``, which would keep the hooks
    out of its graphs. Keys of ``metrics``:

    - ``weight_entropy``: bits of the code histogram (log2 M = every level equally used);
    - ``weight_unused_levels``: levels no weight of a layer takes, mean over the layers;
    - ``weight_clipped``, ``activation_clipped``: share of values beyond the outermost level;
    - ``lbn_gate``: mean gate of all norms;
    - ``lbn_spread``: standard deviation over samples of the log statistic; large means that one
      static number will fit the samples badly.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self._handles: list[RemovableHandle] = []
        self._measured: dict[str, list[Tensor]] = {}

    def due(self, step: int) -> bool:
        """Whether a log at ``step`` is to have these numbers."""
        return self.every is None or (self.every > 0 and step % self.every == 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        logs = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if logs and self.due(step) and not args.torch_compile:
            self._measured = {"activation_clipped": [], "lbn_spread": []}
            modules = list(kwargs["model"].modules())
            for quantizer in _sample(modules, ActivationQuantizer):
                self._handles.append(quantizer.register_forward_hook(self._see_activation))
            for norm in _sample(modules, LayerBatchNorm):
                self._handles.append(norm.register_forward_hook(self._see_norm))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _see_activation(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer, ActivationQuantizer)
        self._measured["activation_clipped"].append(layer.clipped(args[0]))

    @torch.no_grad()
    def _see_norm(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer, LayerBatchNorm)
        x = args[0] - args[0].mean(dim=-1, keepdim=True) if layer.spec.centered else args[0]
        valid, first = layer.context.masks_for(x)
        if first is not None and layer.spec.first_token == "own":
            valid = ~first if valid is None else valid & ~first
        geometric = layer.spec.pooling == "geometric"
        pooled = pooled_log_ms(token_log_ms(x, layer.eps), valid, geometric=geometric)
        self._measured["lbn_spread"].append(pooled.std(correction=0))

    @torch.no_grad()
    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The numbers described above, those that apply to ``model``."""
        found = dict(self._measured)
        self._measured = {}
        for layer in _sample(list(model.modules()), MaQDLinear):
            for name, value in _weight_metrics(layer).items():
                found.setdefault(name, []).append(value)
        found["lbn_gate"] = [norm.gate for norm in gated_norms(model).values()]
        return {name: float(torch.stack(v).mean()) for name, v in found.items() if v}


def _sample(modules: list[nn.Module], kind: type[nn.Module]) -> list[Any]:
    """Up to ``SAMPLED_LAYERS`` modules of a kind, evenly spread over the depth."""
    found = [module for module in modules if isinstance(module, kind)]
    stride = max(1, -(-len(found) // SAMPLED_LAYERS))
    return found[stride // 2 :: stride]


def _weight_metrics(layer: MaQDLinear) -> dict[str, Tensor]:
    levels = layer.weight_levels
    if levels is None or layer.weight_step is None:
        return {}
    weight, step = _local(layer.weight), _local(layer.weight_step)
    # FSDP2: this rank may hold no row of the layer. A weight that is not finite has no codes.
    if not weight.numel() or not bool(weight.isfinite().all()):
        return {}
    u = standardize_weight(weight).view(*step.shape, -1) / step.unsqueeze(-1)
    counts = quantize(u, levels, 1.0).flatten().long().bincount(minlength=levels)
    share = counts / counts.sum()
    return {
        "weight_entropy": -torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0)),
        "weight_unused_levels": (counts == 0).sum().float(),
        "weight_clipped": (u.abs() > levels / 2).float().mean(),
    }


def _local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter that FSDP2 has sharded, or the parameter itself."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
