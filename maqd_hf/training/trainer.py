"""``MaQDTrainer``: quantisation-aware training with transformers' Trainer and accelerate.

What it adds to ``transformers.Trainer``, and why a plain one will not do:

- distillation from the float model, with the head inside the loss (``distillation``);
- parameter groups: standardised latents do not feel their own length, so weight decay would only
  shrink them until their gradients explode; steps, scales and offsets mean something, decay would
  move them. Scales are logarithms and take a learning rate of their own;
- the gate's schedule and one running statistic for all ranks (``callbacks``);
- a first interrupt (Ctrl-C) ends the step, saves, and only then interrupts; a checkpoint that was
  cut off while it was written is never resumed from;
- packed models can be evaluated (``evaluate`` reports perplexity), and say why they cannot train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..calibration import calibrate_activations
from ..nn import (
    ActivationQuantizer,
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
)
from . import rates as recipes
from .arguments import MaQDTrainingArguments
from .callbacks import GateSchedule, QuantizerMonitor, RankAgreement
from .checkpoints import first_interrupt, is_complete, last_complete_checkpoint
from .distillation import (
    IGNORE,
    HiddenLoss,
    Logits,
    Target,
    bare_model,
    deferred_head,
    distillation_loss,
    head_is_deferrable,
    head_of,
    last_hidden_states,
    teacher_output,
)
from .memory import economy

__all__ = ["MaQDTrainer", "MaQDTrainingArguments", "last_complete_checkpoint"]

logger = logging.get_logger(__name__)


class MaQDTrainer(Trainer):
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

    args: MaQDTrainingArguments
    model: PreTrainedModel

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
        schedule = GateSchedule(args.lbn_start, args.lbn_end, args.lbn_norms, args.lbn_fixed)
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
                callbacks=[schedule, self.ranks, self.monitor, *(callbacks or [])],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        args.fill_rates(*recipes.usual_levels(self.model))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if plugin.fsdp_version != 2:
                raise ValueError("FSDP 1 is not supported: set fsdp_config={'version': 2}")
            # Its policy would round latents and logarithms of scales to bf16 before they are
            # quantised. See autocast_smart_context_manager for what stands in its place.
            plugin.mixed_precision_policy = None
        bare = bare_model(self.model)
        self._causal = (
            LOSS_MAPPING.get(str(getattr(bare, "loss_type", ""))) is ForCausalLMLoss
            and not bare.config.is_encoder_decoder
        )
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        self._defers: dict[int, bool] = {}

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
            ValueError: a packed model, or no complete checkpoint to resume from.
        """
        if _is_packed(self.model):
            raise ValueError(
                "a packed model holds codes, which cannot be trained: train the state='qat' "
                "checkpoint it was packed from, or attach a LoRA adapter and use a plain Trainer"
            )
        checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        if checkpoint is None and self.model_init is None:
            self._calibrate()
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
        return output

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
            return found
        if not is_complete(Path(resume)):
            raise ValueError(
                f"{resume} has no readable {TRAINER_STATE_NAME}, the last file a checkpoint gets: "
                "it was cut off while being written, or is not a checkpoint. "
                "resume_from_checkpoint=True takes the last complete one"
            )
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

    # ------------------------------------------------------------------------------- the loss

    def _prepare_teacher(self, teacher: PreTrainedModel | str | Path) -> PreTrainedModel:
        student = bare_model(self.model)
        if not isinstance(teacher, nn.Module):
            teacher = type(student).from_pretrained(teacher)
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                "the teacher shares trainable parameters with the model, so it would change with "
                "it: load it again, or copy.deepcopy it before quantize_model"
            )
        same = ["vocab_size", "num_labels"] + ["hidden_size"] * (self.args.hidden_distillation > 0)
        for what in same:
            ours, theirs = (getattr(m.config, what, None) for m in (student, teacher))
            if ours != theirs:
                raise ValueError(f"the teacher has {what}={theirs}, the model {ours}")
        self._move_model_to_device(teacher, self.args.device)
        return teacher.eval()

    def _probe_heads(self) -> None:
        """See, before anything is wrapped, for which models the head can move into the loss."""
        for model in (self.model, self.teacher):
            if model is not None and id(model) not in self._defers:
                self._defers[id(model)] = self._causal and head_is_deferrable(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """In training the distillation objective, else (``evaluate``) the model's own loss.

        Sums over tokens and divides by ``num_items_in_batch``, the tokens of all accumulated
        batches of all ranks. A training loss with ``return_outputs`` goes with true logits.
        """
        deferred = self._defers.get(id(self.model), False) and not return_outputs
        in_training = self.model.training and "labels" in inputs and self.label_smoother is None
        if not in_training or (self.teacher is None and not deferred):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with ExitStack() as stack:
            target = self._target(inputs, stack)
            if deferred:
                loss = partial(self._deferred_loss, target=target)
                stack.enter_context(deferred_head(self.model, loss))
            else:
                self.compute_loss_func = partial(self._whole_loss, target=target)
                stack.callback(setattr, self, "compute_loss_func", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast around every loss; accelerate does it for all wrappers but FSDP2."""
        return self.accelerator.autocast()

    def _target(self, inputs: dict[str, Any], stack: ExitStack) -> Target:
        """What the teacher says of the batch. Hooks on the model stay while ``stack`` is open."""
        weight = self.args.hidden_distillation
        if self.teacher is None or (self.args.distillation_weight == 0 and not weight):
            return Target()
        given = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
        deferred = self._defers.get(id(self.teacher), False)
        if not weight:
            return Target(teacher_output(self.teacher, given, deferred))
        with last_hidden_states(self.teacher) as theirs:
            logits = teacher_output(self.teacher, given, deferred)
        ours = stack.enter_context(last_hidden_states(self.model))
        return Target(logits, HiddenLoss(ours, theirs, inputs.get("attention_mask"), weight))

    @torch.compiler.disable
    def _deferred_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Called by the model's forward: ``logits`` are hidden states (batch, tokens, features)."""
        if shift_labels is None:
            shift_labels = _shift(labels)
        counted = shift_labels != IGNORE
        student = head_of(self.model, logits[counted])
        return self._mean_loss(student, target, shift_labels, num_items_in_batch)

    def _whole_loss(
        self, outputs: Any, labels: Tensor, target: Target, num_items_in_batch: Any = None
    ) -> Tensor:
        """Logits (batch, tokens, vocabulary) with a label a token, or (batch, classes)."""
        logits: Tensor = outputs["logits"]
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise ValueError(
                f"distillation needs one class label per prediction: logits {tuple(logits.shape)}, "
                f"labels {tuple(labels.shape)} of {labels.dtype}; train without a teacher"
            )
        if self._causal:
            labels = _shift(labels)
        return self._mean_loss(Logits(logits[labels != IGNORE]), target, labels, num_items_in_batch)

    def _mean_loss(
        self, student: Logits, target: Target, labels: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        counted = labels != IGNORE
        expected = target.logits
        if expected is not None:
            expected = expected._replace(hidden=expected.hidden[counted])
        total = distillation_loss(student, expected, labels[counted], self.args.objective())
        if target.hidden is not None:
            total = total + target.hidden(labels)
        count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    # ------------------------------------------------------------------------- which labels count

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in Trainer, with labels that nothing predicts taken out before they are counted."""
        return super().get_batch_samples(
            map(self._drop_unpredicted, epoch_iterator), num_batches, device
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in Trainer, on the labels that training counts."""
        inputs = self._drop_unpredicted(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _drop_unpredicted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """-100 for labels of padding and, in a causal model, of what follows no real token."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or "shift_labels" in batch:
            return batch
        mask = batch.get("attention_mask")
        counted = torch.ones_like(labels, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            counted = mask.bool()
        if self._causal:
            counted = counted & nn.functional.pad(counted[:, :-1], (1, 0), value=False)
        return {**batch, "labels": labels.masked_fill(~counted, IGNORE)}

    # ------------------------------------------------------------------------------- parameters

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices outside the quantised layers and norms; those never decay."""
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
        """Trainer's log, with a look into the quantisers beside every training loss."""
        if "loss" in logs and self.monitor.due(self.state.global_step):
            logs.update(self.monitor.metrics(self.model))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with ``perplexity`` = exp(loss) for causal models.

        The loss is the mean over batches: with blocks of equal length it is that of all tokens.
        """
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        metrics: dict[str, float] = output.metrics or {}
        for name in [n for n in metrics if n.endswith("_loss") and self._causal]:
            perplexity = math.exp(metrics[name]) if metrics[name] < 700 else math.inf
            metrics[name.removesuffix("loss") + "perplexity"] = perplexity
        return output

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing every rank writes; after it rank 0 writes the trainer state, which is what
        # marks a checkpoint as complete.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def _shift(labels: Tensor) -> Tensor:
    """Labels (batch, tokens) moved to the position that predicts them; -100 for the last."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(m, (PackedLinear, PackedEmbedding)) for m in model.modules())


@contextmanager
def _passing_for_float(model: PreTrainedModel | None) -> Iterator[None]:
    """Trainer refuses quantised models at construction, where it cannot know that they are only to
    be evaluated. Ours refuses in ``train``."""
    if model is None or not _is_packed(model) or not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.is_quantized = True  # type: ignore[assignment]
