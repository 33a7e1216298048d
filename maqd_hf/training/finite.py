"""A run that diverges stops at its first number that is not finite, and nothing is saved of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ADVICE = "lower learning_rate, warm up for longer (warmup_steps), or clip (max_grad_norm)"


class FiniteGuard(TrainerCallback):
    """Looks at loss and gradient before every step of the optimizer.

    The model then still has the parameters of the step before, which are finite. The opinion is
    one of all ranks, so that none waits for another that has stopped. Under a gradient scaler
    (float16) gradients overflow by design, and only losses are looked at.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None

    def see_loss(self, loss: Tensor) -> None:
        """Remember the loss of a batch, () and detached; this does not wait for a GPU."""
        self._loss = loss if self._loss is None else self._loss + loss

    def see_norm(self, norm: Tensor | None) -> None:
        """Remember the norm of the gradient, which clipping has computed anyway."""
        self._norm = norm

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loss = self._norm = None

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        norm = self._norm
        if args.fp16:
            norm = None
        elif norm is None:
            norm = gradient_norm(kwargs["model"])
        numbers = [torch.zeros(()) if n is None else _local(n) for n in (self._loss, norm)]
        broken = torch.stack([~n.to(args.device).isfinite().all() for n in numbers]).float()
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(broken)
        if bool(broken.any()):
            name, number = ("loss", numbers[0]) if broken[0] else ("gradient's norm", numbers[1])
            what = f"the {name} is {float(number)}"
            if bool(number.isfinite().all()):
                what = f"the {name} of another rank is not finite"
            raise FloatingPointError(
                f"step {state.global_step + 1} of {state.max_steps}: {what}. The training has "
                f"diverged and stops here, with the parameters of step {state.global_step}; "
                f"checkpoints stay as they are: {ADVICE}. learning_rate is {args.learning_rate}"
            )


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm () of this rank's part of the gradient."""
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in gradients if g.numel()]
    return torch.stack(norms).norm() if norms else torch.zeros(())


@torch.no_grad()
def check_parameters(model: nn.Module, step: int, learning_rate: float | None) -> None:
    """``FloatingPointError`` if a trained parameter is not finite after ``step``; on all ranks."""
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not _finite(p)]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        opinions: list[list[str]] = [[]] * distributed.get_world_size()
        distributed.all_gather_object(opinions, broken[:1])
        broken = broken or [name for opinion in opinions for name in opinion]
    if broken:
        raise FloatingPointError(
            f"after step {step} {len(broken)} parameter(s) are not finite, the first {broken[0]}: "
            f"the training has diverged, and nothing is saved of it. Go on from an earlier "
            f"checkpoint, or start again: {ADVICE}. learning_rate is {learning_rate}"
        )


def _finite(parameter: Tensor) -> bool:
    return bool(_local(parameter).isfinite().all())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP2 has sharded, or the tensor itself."""
    full = getattr(tensor, "to_local", None)
    return tensor if full is None else full()
