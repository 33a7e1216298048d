"""``MaQDTrainer``: quantization-aware training with transformers' Trainer and accelerate.

What it adds to ``transformers.Trainer``, and why a plain one will not do:

- distillation from the float model, with the head inside the loss (``losses``, ``distillation``);
- parameter groups: standardized latents do not feel their own length, so weight decay would only
  shrink them until their gradients explode; steps, scales and offsets mean something, decay would
  move them. Scales are logarithms and take a learning rate of their own;
- the choice of norms that can be static (``norms``), the schedule of their gates, and one running
  statistic for all ranks (``callbacks``);
- a run that diverges stops before it spoils the model, and saves nothing of it (``finite``);
- a first interrupt (Ctrl-C) ends the step, saves, and only then interrupts; a checkpoint that was
  cut off while it was written is never resumed from;
- packed models can be evaluated (``evaluate`` reports perplexity), and say why they cannot train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..calibration import calibrate_activations
from ..nn import ActivationQuantizer, LayerBatchNorm, MaQDEmbedding, MaQDLinear
from ..nn.kinds import OURS, PACKED
from . import rates
from .arguments import MaQDTrainingArguments
from .callbacks import GateSchedule, QuantizerMonitor, RankAgreement
from .checkpoints import (
    CheckpointCadence,
    check_processes,
    first_interrupt,
    is_complete,
    last_complete_checkpoint,
)
from .finite import FiniteGuard, check_parameters
from .losses import DistillingTrainer
from .memory import economy
from .norms import affordable_norms, norms_of_checkpoint

__all__ = ["MaQDTrainer", "MaQDTrainingArguments", "last_complete_checkpoint"]

logger = logging.get_logger(__name__)


class MaQDTrainer(DistillingTrainer):
    """``transformers.Trainer`` for models made by ``quantize_model``.

    Args:
        teacher: the float model whose predictions are the target: a model, an id or folder (read
            with the class of ``model``), or None for the task's own loss. It is put on the
            training device, never trained, never saved; it may share *frozen* parameters with
            ``model``. Every rank holds all of it.
        others: as in ``transformers.Trainer``.

    Raises:
        ValueError: teacher and model do not fit, or the arguments contradict each other.
    """

    requires_quantized = True
    """Whether a model without any layer of this package is refused; a comparison with the layers
    of others switches that off."""

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: MaQDTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        teacher: PreTrainedModel | str | Path | None = None,
    ) -> None:
        args = args or MaQDTrainingArguments()
        if not isinstance(args, MaQDTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; give MaQDTrainingArguments")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start with "
                "`torchrun --nproc_per_node` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
            )
        if teacher is not None and args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor and a teacher exclude each other: drop one")
        if teacher is None and args.hidden_distillation:
            raise ValueError("hidden_distillation needs a teacher: give one, or leave it at 0")
        self.ranks = RankAgreement()
        self.monitor = QuantizerMonitor(args.quantizer_logging_steps)
        self.finite = FiniteGuard()
        cadence = CheckpointCadence(args.checkpoint_share, self.ranks.request_save)
        self.gates = GateSchedule(args.lbn_start, args.lbn_end, args.lbn_norms, args.lbn_fixed)
        with _passing_for_float(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                model_init=model_init,
                compute_metrics=compute_metrics,
                callbacks=[
                    *(self.gates, cadence, self.ranks, self.monitor, self.finite),
                    *(callbacks or []),
                ],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        args.fill_rates(*rates.usual_levels(self.model))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if plugin.fsdp_version != 2:
                raise ValueError("FSDP 1 is not supported: set fsdp_config={'version': 2}")
            # Its policy would round latents and logarithms of scales to bf16 before they are
            # quantized. See autocast_smart_context_manager for what stands in its place.
            plugin.mixed_precision_policy = None
        self.prepare_loss(teacher)

    # ------------------------------------------------------------------------------ training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; ``resume_from_checkpoint=True`` takes the last complete checkpoint.

        A first interrupt (Ctrl-C) finishes the step, saves a checkpoint and raises
        ``KeyboardInterrupt``; a second one raises at once and saves nothing.

        Raises:
            ValueError: a packed model or one that was never quantized, no complete checkpoint to
                resume from, or one of a run with another number of processes.
            FloatingPointError: a loss, a gradient or a parameter is not finite.
        """
        if _is_packed(self.model):
            raise ValueError(
                "a packed model holds codes, which cannot be trained: train the state='qat' "
                "checkpoint it was packed from, or attach a LoRA adapter and use a plain Trainer"
            )
        ours = any(isinstance(module, OURS) for module in self.model.modules())
        if self.requires_quantized and not ours:
            raise ValueError(
                f"this {type(self.model).__name__} was never quantized: call "
                "maqd_hf.quantize_model(model, MaQDConfig(...)) before MaQDTrainer(model, ...), or "
                "train a float model with transformers.Trainer"
            )
        checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        if checkpoint is None and self.model_init is None:
            self._calibrate()
        self._choose_norms(checkpoint)
        self._probe_heads()
        self.ranks.stop_requested, self.ranks.between_steps = False, True
        try:
            with first_interrupt(self._request_stop), economy(self.teacher, self.accelerator):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        except KeyboardInterrupt:  # raised by someone's code, or by a second Ctrl-C
            if self.ranks.between_steps and self.args.world_size == 1 and self.state.global_step:
                self._save_checkpoint(self.model_wrapped, trial)
            raise
        if self.ranks.stop_requested:
            raise KeyboardInterrupt
        self._check_parameters()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; the loss is looked at before the optimizer steps (``finite``)."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.finite.see_loss(loss.detach())
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.finite.see_norm(norm if isinstance(norm, Tensor) else None)
        return norm

    def _check_parameters(self) -> None:
        check_parameters(self.model, self.state.global_step, self.args.learning_rate)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_parameters()
        super()._save_checkpoint(*args, **kwargs)

    def _request_stop(self) -> None:
        self.ranks.stop_requested = True
        logger.warning("Interrupted: finishing this step, then saving. Once more quits at once.")

    def _complete_checkpoint(self, resume: str | bool | None) -> str | None:
        if not resume:
            return None
        if resume is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            resume = found
        if not is_complete(Path(resume)):
            raise ValueError(
                f"{resume} has no readable {TRAINER_STATE_NAME}, the last file a checkpoint gets: "
                "it was cut off while being written, or is not a checkpoint. "
                "resume_from_checkpoint=True takes the last complete one"
            )
        check_processes(Path(resume), self.args.world_size)
        return resume

    def _calibrate(self) -> None:
        """Set the activation steps that are still unknown from the first training batches."""
        quantizers = [m for m in self.model.modules() if isinstance(m, ActivationQuantizer)]
        if all(quantizer.calibrated for quantizer in quantizers):
            return
        with torch.random.fork_rng():  # a resumed run does not come here: same numbers for both
            batches = list(islice(self.get_train_dataloader(), self.args.calibration_batches))
            batches = [self._prepare_inputs(batch) for batch in batches]
            calibrate_activations(self.model, batches, progress=not self.args.disable_tqdm)
        for quantizer in quantizers:  # every rank saw other batches
            if quantizer.log_step is not None and self.args.world_size > 1:
                quantizer.log_step.data.copy_(broadcast(quantizer.log_step.data))

    def _choose_norms(self, checkpoint: str | None) -> None:
        """Decide which norms' gates will open, where the arguments do not say it."""
        if self.args.lbn_norms is not None:
            return
        if checkpoint is not None:
            self.gates.norms = norms_of_checkpoint(checkpoint)
        elif self.model_init is not None:
            self.gates.norms = []  # every trial has a model of its own, which nobody has seen yet
        else:
            with torch.random.fork_rng():
                self.gates.norms = affordable_norms(
                    self.model, self.get_train_dataloader(), progress=not self.args.disable_tqdm
                )

    # ------------------------------------------------------------------------------- parameters

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices outside the quantized layers and norms; those never decay."""
        free = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, (MaQDEmbedding, LayerBatchNorm, ActivationQuantizer))
            or (isinstance(module, MaQDLinear) and module.weight_levels is not None)
            for parameter in module.parameters()
        }
        matrices = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.dim() > 1 and id(parameter) not in free
        }
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the logarithmic scales in a group of their own."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args)
        if given:
            return optimizer
        scales = {
            id(parameter)
            for name, parameter in (args[0] if args else self.model).named_parameters()
            if name.rpartition(".")[2] in ("weight_log_scale", "log_step")
        }
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in scales]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in scales]
                options = {**group, "lr": self.args.scale_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group({**options, "params": own})
        return optimizer

    # --------------------------------------------------------------------- logs, evaluation, files

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with a look into the quantizers beside every training loss."""
        if "loss" in logs and self.monitor.due(self.state.global_step):
            logs.update(self.monitor.metrics(self.model))
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing every rank writes; after it rank 0 writes the trainer state, which is what
        # marks a checkpoint as complete.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(m, PACKED) for m in model.modules())


@contextmanager
def _passing_for_float(model: PreTrainedModel | None) -> Iterator[None]:
    """Trainer refuses quantized models at construction, where it cannot know that they are only to
    be evaluated. Ours refuses in ``train``."""
    if model is None or not _is_packed(model) or not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.is_quantized = True  # type: ignore[assignment]
