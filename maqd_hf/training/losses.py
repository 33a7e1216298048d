"""What a batch costs, in training and in evaluation, and which of its labels count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import EvalLoopOutput

from ..nn.activation import check_all_calibrated
from .arguments import MaQDTrainingArguments
from .distillation import (
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
from .labels import IGNORE, any_counted, drop_unpredicted, shift, zero_unless


class DistillingTrainer(Trainer):
    """``transformers.Trainer`` with the distillation objective, and labels that count themselves.

    ``prepare_loss`` comes before the first batch.
    """

    args: MaQDTrainingArguments
    model: PreTrainedModel

    def prepare_loss(self, teacher: PreTrainedModel | str | Path | None) -> None:
        """See what kind of model this is, and take its teacher.

        Raises:
            ValueError: teacher and model do not fit.
        """
        bare = bare_model(self.model)
        self._causal = (
            LOSS_MAPPING.get(str(getattr(bare, "loss_type", ""))) is ForCausalLMLoss
            and not bare.config.is_encoder_decoder
        )
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        self._defers: dict[int, bool] = {}

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
            counted = any_counted(inputs)
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs or not self.model.training:
                return found
            return zero_unless(counted, found)
        with ExitStack() as stack:
            target = self._target(inputs, stack)
            if deferred:
                loss = partial(self._deferred_loss, target=target)
                stack.enter_context(deferred_head(self.model, loss))
            else:
                self.compute_loss_func = partial(self._whole_loss, target=target)
                stack.callback(setattr, self, "compute_loss_func", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer. Gradients are sums over the tokens of all accumulated batches, which
        accelerate divides by the number of batches once more where transformers (5.3) tells it."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.accelerator.gradient_accumulation_steps = 1

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
            shift_labels = shift(labels)
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
            labels = shift(labels)
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
        """As in Trainer, with labels that nothing predicts taken out before they are counted.

        Where no label counts, the count is 1: the sum that is divided by it is 0.
        """
        batches = (drop_unpredicted(batch, self._causal) for batch in epoch_iterator)
        samples, count = super().get_batch_samples(batches, num_batches, device)
        return samples, count.clamp(min=1) if isinstance(count, Tensor) else count

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in Trainer, on the labels that training counts; NaN is the loss of none.

        Raises:
            FloatingPointError: the loss of labels that count is not finite.
        """
        inputs = drop_unpredicted(inputs, self._causal)
        counted = any_counted(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and counted is not None:
            if not counted:
                loss = torch.full_like(loss, math.nan)
            elif not loss.isfinite():
                raise FloatingPointError(f"the evaluation loss of a batch is {float(loss)}")
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with ``perplexity`` = exp(loss) for causal models.

        The loss is the mean over batches with labels that count: with blocks of equal length it is
        that of all tokens.

        Raises:
            ValueError: no label of any batch counts, or activations were never calibrated.
        """
        check_all_calibrated(self.model)
        gather = self.gather_function
        self.gather_function = partial(_gathered, gather)
        try:
            output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        finally:
            self.gather_function = gather
        metrics: dict[str, float] = output.metrics or {}
        for name in [n for n in metrics if n.endswith("_loss")]:
            if math.isnan(metrics[name]):
                raise ValueError(
                    f"nothing to evaluate: none of the {output.num_samples} samples has a label "
                    "that counts. They are padding or -100 alone, or one token long"
                )
            if self._causal:
                perplexity = math.exp(metrics[name]) if metrics[name] < 700 else math.inf
                metrics[name.removesuffix("loss") + "perplexity"] = perplexity
        return output


def _gathered(gather: Callable[[Any], Any], values: Any) -> Any:
    """What ``gather`` collects of all ranks, without the losses (samples,) that are NaN, which is
    only what ``prediction_step`` says of no labels."""
    found = gather(values)
    losses = isinstance(found, Tensor) and found.dim() == 1 and found.is_floating_point()
    return found[~found.isnan()] if losses else found
