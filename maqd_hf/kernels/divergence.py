"""KL divergence of logits and its gradient in one go: compiled, or in torch, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from . import loader
from .serving import serves


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``sum KL(teacher || student)`` over the rows, and its gradient in ``student``.

    Args:
        student, teacher: logits (N, vocabulary), divided by ``temperature`` first. Their memory
            may be taken: do not use them afterwards.

    Returns a float64 scalar, and (N, vocabulary).

    >>> loss, grad = kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)
    >>> float(loss), grad.tolist()
    (0.0, [[0.0, 0.0]])
    """
    plain = serves(student, teacher, dtypes=(torch.float32,), contiguous=True)
    traced = student.requires_grad or teacher.requires_grad
    if plain and not traced and student.dim() == 2 and student.shape == teacher.shape:
        loss = torch.empty(len(student), dtype=torch.float64)
        threads = torch.get_num_threads()
        cooling = 1 / temperature
        tensors = (student, teacher, loss)
        loader.call("maqd_divergence", *tensors, *student.shape, cooling, cooling, threads)
        return loss.sum(), student
    log_p = (student / temperature).log_softmax(dim=-1)
    log_q = (teacher / temperature).log_softmax(dim=-1)
    q = log_q.exp()
    # a word the teacher excludes counts nothing, however impossible it is to the student
    loss = torch.where(q > 0, log_q - log_p, 0).mul_(q).sum(dtype=torch.float64)
    return loss, log_p.exp_().sub_(q).div_(temperature)
