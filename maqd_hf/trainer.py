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

import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from .callbacks import GateSchedule, QuantizerMonitor, RankAgreement
from .calibration import calibrate_activations
from .distillation import (
    IGNORE,
    Logits,
    Objective,
    bare_model,
    deferred_head,
    distillation_loss,
    head_is_deferrable,
    head_of,
)
from .nn import (
    ActivationQuantizer,
    LayerBatchNorm,
    MaQDEmbedding,
    MaQDLinear,
    PackedEmbedding,
    PackedLinear,
)

logger = logging.get_logger(__name__)


@dataclass
class MaQDTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and what quantisation-aware training adds.

    Starting points for ``learning_rate`` (latents; extrapolated from published runs, sweep x3
    around them): 3e-5 at 4 bit, 1e-4 at 3, 2e-4 at 2, 3e-4 ternary.
    """

    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Divides teacher's and student's logits in the KL."}
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Share of the KL; the rest is cross entropy with the labels."}
    )
    kl_chunk_tokens: int = field(
        default=256, metadata={"help": "Tokens whose logits exist at once during training."}
    )
    scale_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "For weight scales and activation steps, both logarithms: relative."},
    )
    lbn_start: float = field(
        default=0.0, metadata={"help": "Fraction of all steps at which the norms' gate starts."}
    )
    lbn_end: float = field(
        default=0.4, metadata={"help": "Fraction of all steps from which the gate is open (1)."}
    )
    lbn_norms: list[str] | None = field(
        default=None, metadata={"help": "Glob patterns of the norms to open; default: all."}
    )
    calibration_batches: int = field(
        default=4, metadata={"help": "Training batches that set uncalibrated activation steps."}
    )
    quantizer_logging_steps: int | None = field(
        default=None,
        metadata={"help": "Logs at multiples of it look into quantisers; default: all, 0: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # validates the distillation settings
        if self.scale_learning_rate < 0:
            raise ValueError(f"scale_learning_rate={self.scale_learning_rate} must not be negative")
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # RankAgreement averages, DDP would take rank 0's

    def objective(self) -> Objective:
        """What a token costs, as these arguments say."""
        return Objective(
            self.distillation_temperature, self.distillation_weight, self.kl_chunk_tokens
        )


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
        self.ranks = RankAgreement()
        self.monitor = QuantizerMonitor(args.quantizer_logging_steps)
        schedule = GateSchedule(args.lbn_start, args.lbn_end, args.lbn_norms)
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
        bare = bare_model(self.model)
        self._causal = (
            LOSS_MAPPING.get(getattr(bare, "loss_type", None)) is ForCausalLMLoss
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
            with _first_interrupt(self._request_stop):
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
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            return found
        if not _is_complete(Path(resume)):
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
            calibrate_activations(self.model, [self._prepare_inputs(batch) for batch in batches])
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
        for what in ("vocab_size", "num_labels"):
            ours, theirs = (getattr(m.config, what, None) for m in (student, teacher))
            if ours != theirs:
                raise ValueError(f"the teacher has {what}={theirs}, the model {ours}")
        return teacher.to(self.args.device).eval()

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
        in_training = model.training and "labels" in inputs and self.label_smoother is None
        if not in_training or (self.teacher is None and not deferred):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        target = self._teacher_logits(inputs)
        with ExitStack() as stack:
            if deferred:
                loss = partial(self._deferred_loss, target=target)
                stack.enter_context(deferred_head(self.model, loss))
            else:
                self.compute_loss_func = partial(self._whole_loss, target=target)
                stack.callback(setattr, self, "compute_loss_func", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> Logits | None:
        """The teacher's prediction for every token: hidden states and head, or logits."""
        if self.teacher is None or self.args.distillation_weight == 0:
            return None
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self._defers[id(self.teacher)]:
                stack.enter_context(deferred_head(self.teacher, _no_loss))
            output = self.teacher(**inputs).logits
            return head_of(self.teacher, output) if self._defers[id(self.teacher)] else Logits(output)

    @torch.compiler.disable
    def _deferred_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Logits | None,
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
        self, outputs: Any, labels: Tensor, target: Logits | None, num_items_in_batch: Any = None
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
        self, student: Logits, target: Logits | None, labels: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        counted = labels != IGNORE
        if target is not None:
            target = target._replace(hidden=target.hidden[counted])
        total = distillation_loss(student, target, labels[counted], self.args.objective())
        count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    # ------------------------------------------------------------------------- which labels count

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in Trainer, with labels that nothing predicts taken out before they are counted."""
        return super().get_batch_samples(  # type: ignore[no-any-return]
            map(self._drop_unpredicted, epoch_iterator), num_batches, device
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in Trainer, on the labels that training counts."""
        inputs = self._drop_unpredicted(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[no-any-return]

    def _drop_unpredicted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """-100 for labels of padding and, in a causal model, of what follows no real token."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or "shift_labels" in batch:
            return batch
        mask = batch.get("attention_mask")
        fits = isinstance(mask, Tensor) and mask.shape == labels.shape
        counted = mask.bool() if fits else torch.ones_like(labels, dtype=torch.bool)
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
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = super().get_decay_parameter_names(model)
        return [n for n in names if id(parameters[n]) not in free and parameters[n].dim() > 1]

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
        for name in [n for n in output.metrics if n.endswith("_loss")] if self._causal else []:
            loss = output.metrics[name]
            perplexity = math.exp(loss) if loss < 700 else math.inf
            output.metrics[name.removesuffix("loss") + "perplexity"] = perplexity
        return output

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing every rank writes; after it rank 0 writes the trainer state, which is what
        # marks a checkpoint as complete.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in ``folder`` that was written to its end, or None.

    transformers' ``get_last_checkpoint`` takes any folder of that name, also one whose writer was
    killed half-way.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if _is_complete(path):
            return str(path)
        logger.warning(f"{path} was cut off while being written and is left out.")
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _shift(labels: Tensor) -> Tensor:
    """Labels (batch, tokens) moved to the position that predicts them; -100 for the last."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]


def _no_loss(**kwargs: Any) -> Tensor:
    raise AssertionError("the teacher is called without labels")


def _is_packed(model: Iterable[nn.Module] | nn.Module) -> bool:
    return any(isinstance(m, (PackedLinear, PackedEmbedding)) for m in model.modules())


@contextmanager
def _passing_for_float(model: nn.Module | None) -> Iterator[None]:
    """Trainer refuses quantised models at construction, where it cannot know that they are only to
    be evaluated. Ours refuses in ``train``."""
    if model is None or not _is_packed(model) or not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


@contextmanager
def _first_interrupt(request_stop: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT within into a request; the next one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        request_stop()

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
