"""Distillation from the float model, with the output head inside the loss.

Not in the paper: forward KL from the float model is the best-known recipe for short budgets.

The logits of 1024 tokens over 49 thousand words are 200 MB, and a KL needs several such tensors.
So they never exist at once here: during training the head's forward is the identity, the model
hands *hidden states* to its ``loss_function``, and ``distillation_loss`` runs head, teacher's head,
softmax and the gradient of all three for a few hundred tokens at a time. The gradient of a KL is
closed form (student minus teacher probabilities), so it is computed together with the loss:
recomputing the chunks in backward (``torch.utils.checkpoint``) would run both heads twice. The loss
stays *inside* the model's forward, where DDP and FSDP2 expect the head's parameters to be used.

A model whose logits are not exactly what its head returns (soft-capping, scaled logits), or that
does not use its ``loss_function``, is found out by a probe (``head_is_deferrable``) and goes
through the same loss with whole logits.

A classifier's logits are a few numbers a text: ``hidden_distance`` adds what the teacher's last
hidden states say, at every token. In a language model they add nothing: 71.9 / 101.8 with them and
72.1 / 101.7 without (docs/notebook.md, "Hidden states in the loss of a language model").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.blocks import float_activations
from ..functional import widen
from ..kernels.divergence import kl_divergence
from ..nn import MaQDLinear
from ..nn.modes import evaluating
from ..nn.precision import product_dtype
from .labels import IGNORE


class Logits(NamedTuple):
    """Logits (N, vocabulary) as ``hidden @ weight.T + bias``, or, without ``weight``, whole."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Logits:
        """The same with the head in ``dtype``, for the products of ``rows``."""
        weight, bias = (None if t is None else t.to(dtype) for t in (self.weight, self.bias))
        return Logits(self.hidden, weight, bias)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of the rows ``start:stop``, at least float32, in memory of their own."""
        chunk = self.hidden[start:stop]
        if self.weight is None:
            return chunk.to(torch.promote_types(chunk.dtype, torch.float32), copy=True)
        return widen(nn.functional.linear(chunk.to(self.weight.dtype), self.weight, self.bias))


@dataclass(frozen=True)
class Objective:
    """What a token costs: ``weight * T^2 * KL(teacher || student) + (1 - weight) * CE(labels)``.

    Args:
        temperature: T, divides both logits in the KL; T^2 keeps its gradient's size.
        weight: share of the KL; without a teacher the loss is the cross entropy alone.
        chunk_tokens: tokens whose logits exist at the same time.
    """

    temperature: float = 1.0
    weight: float = 1.0
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: 1 = only the teacher, 0 = only the labels")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1")


def distillation_loss(
    student: Logits, teacher: Logits | None, labels: Tensor, objective: Objective
) -> Tensor:
    """The objective summed over N tokens: a scalar, differentiable in ``student``.

    Args:
        student: N rows; ``teacher``: N rows over the same vocabulary, or None.
        labels: (N,) token or class ids; rows without one are the caller's to leave out.

    >>> logits = Logits(torch.tensor([[0.0, 1.0]]))
    >>> float(distillation_loss(logits, logits, torch.tensor([0]), Objective()))
    0.0
    """
    loss: Tensor = _DistillationLoss.apply(*student, teacher, labels, objective)
    return loss


class _DistillationLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only hands the gradients out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: Logits | None,
        labels: Tensor,
        objective: Objective,
    ) -> Tensor:
        dtype = product_dtype(hidden)
        student = Logits(hidden, weight, bias).cast(dtype)
        target = None if teacher is None else teacher.cast(dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight and weight is not None else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), objective.chunk_tokens):
                stop = min(start + objective.chunk_tokens, len(hidden))
                expected = None if target is None else target.rows(start, stop)
                loss, grad = _token_losses(
                    student.rows(start, stop), expected, labels[start:stop], objective
                )
                total += loss
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                if grad_hidden is not None:
                    back = grad if student.weight is None else grad.to(dtype) @ student.weight
                    grad_hidden[start:stop] = back
                if grad_weight is not None:
                    _add_outer(grad_weight, grad.to(dtype), hidden[start:stop].to(dtype))
        ctx.grads = grad_hidden, grad_weight, grad_bias
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the distillation loss was already differentiated; run it again")
        scaled = [None if g is None else g.mul_(grad) for g in ctx.grads]
        ctx.grads = None  # scaled in place: a second backward would find them changed
        return *scaled, None, None, None


def _add_outer(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """``total += rows.T @ columns``, without a temporary where the dtypes allow it."""
    if total.dtype == rows.dtype:
        total.addmm_(rows.t(), columns)
    else:
        total += rows.t() @ columns


def _token_losses(
    logits: Tensor, expected: Tensor | None, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The summed loss of some rows and its gradient in ``logits``; takes the memory of both."""
    share = 0.0 if expected is None else objective.weight
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    grad = None
    if expected is not None and share > 0:
        heat = objective.temperature
        kept = logits if share == 1 else logits.clone()
        divergence, grad = kl_divergence(kept, expected, heat)
        loss += divergence * (share * heat**2)
        if share * heat**2 != 1:
            grad.mul_(share * heat**2)
    if share < 1:
        log_p = logits.log_softmax(dim=-1)
        column = labels.unsqueeze(-1)
        loss -= log_p.gather(1, column).sum(dtype=torch.float64) * (1 - share)
        entropy_grad = log_p.exp_()
        entropy_grad.scatter_add_(1, column, -torch.ones_like(entropy_grad[:, :1]))
        entropy_grad.mul_(1 - share)
        grad = entropy_grad if grad is None else grad.add_(entropy_grad)
    assert grad is not None
    return loss, grad


def hidden_distance(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """How far the student's hidden states are from the teacher's: (batch,), differentiable.

    For each sample the mean over its tokens of |student - teacher|^2 / |teacher|^2. Relative to the
    token's own size, so that the massive first tokens of pretrained decoders do not own it.

    Args:
        student, teacher: (batch, tokens, features).
        counted: (batch, tokens), False or 0 on padding; None: every token counts.

    >>> hidden_distance(torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    tensor([1.])
    """
    student, teacher = (t if t.dtype == torch.float64 else t.float() for t in (student, teacher))
    size = teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    relative = (student - teacher).square().sum(-1) / size
    if counted is None:
        return relative.mean(dim=1)
    counted = counted.bool()
    return relative.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)


class HiddenLoss(NamedTuple):
    """``hidden_distance`` summed over a batch: a sample weighs as much as it has labels.

    ``ours`` and ``theirs`` hold the states of student and teacher once their forwards have run
    (``last_hidden_states``).
    """

    ours: list[Tensor]
    theirs: list[Tensor]
    counted: Tensor | None
    weight: float

    def __call__(self, labels: Tensor) -> Tensor:
        """``labels``: (batch, ...), those that count are not ``IGNORE``."""
        if not self.ours or not self.theirs:
            raise ValueError(
                "this model's forward passes its base model by, so hidden_distillation finds no "
                "hidden states: set it to 0"
            )
        distance = hidden_distance(self.ours[0], self.theirs[0], self.counted)
        counts = (labels != IGNORE).reshape(len(labels), -1).sum(1)
        return self.weight * (distance * counts).sum()


class Target(NamedTuple):
    """What the teacher says of a batch; None is what is not wanted."""

    logits: Logits | None = None
    hidden: HiddenLoss | None = None


# --------------------------------------------------------------------- a model with a deferred head

LossFunction = Callable[..., Tensor]


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a compiled or PEFT wrapper."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model  # type: ignore[return-value]


@contextmanager
def last_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within this context every forward of ``model`` puts the output of its base model, (batch,
    tokens, features), in place of what the list holds."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[:] = [output[0]]

    handle = bare_model(model).base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def deferred_head(model: nn.Module, loss_function: LossFunction) -> Iterator[None]:
    """Within this context ``model`` returns hidden states for logits, and hands them to the loss.

    The head's ``forward`` is the identity (its hooks still run: FSDP2 gathers its parameters
    there), and ``loss_function(logits=hidden, labels=..., **kwargs)`` stands for the model's own.
    """
    bare = bare_model(model)
    head = bare.get_output_embeddings()
    own_loss = bare.__dict__.get("_loss_function")
    head.forward = _identity
    bare.loss_function = loss_function
    try:
        yield
    finally:
        del head.forward
        if own_loss is None:
            del bare._loss_function
        else:
            bare.loss_function = own_loss


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def head_of(model: nn.Module, hidden: Tensor) -> Logits:
    """``hidden`` (N, features) with the head that a ``deferred_head`` left out, differentiable.

    A quantized head rounds its input and its weight here, once and not once a chunk.
    """
    head = bare_model(model).get_output_embeddings()
    if isinstance(head, MaQDLinear):
        return Logits(head.activation(hidden), head.quantized_weight(), head.bias)
    return Logits(hidden, head.weight, head.bias)


def head_is_deferrable(model: nn.Module) -> bool:
    """Whether the model's logits are its head's output and nothing else, seen in a tiny forward.

    It runs with unquantized inputs, since a model that is about to load a checkpoint has no
    activation steps yet.
    """
    bare = bare_model(model)
    head: Any = getattr(bare, "get_output_embeddings", lambda: None)()
    if type(head) not in (nn.Linear, MaQDLinear):
        return False
    seen: list[Tensor] = []
    handed: list[Tensor] = []

    def spy(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        handed.append(logits)
        return logits.sum()

    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=bare.device)
    try:
        with evaluating(bare), float_activations(bare), deferred_head(bare, spy):
            output = bare(input_ids=tokens, labels=tokens, use_cache=False)
    except (TypeError, ValueError, RuntimeError):
        return False  # other inputs, or a shape only true logits have: whole logits will do
    finally:
        handle.remove()
    return len(seen) == len(handed) == 1 and seen[0] is handed[0] is output.logits


@torch.no_grad()
def teacher_output(teacher: nn.Module, inputs: dict[str, Any], deferred: bool) -> Logits:
    """The teacher's prediction for every token: hidden states and head if its head is deferrable,
    else logits."""
    if not deferred:
        return Logits(teacher(**inputs).logits)
    with deferred_head(teacher, _no_loss):
        return head_of(teacher, teacher(**inputs).logits)


def _no_loss(**kwargs: Any) -> Tensor:
    raise AssertionError("the teacher is called without labels")
