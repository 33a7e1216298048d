"""KL divergence of logits and its gradient in one go: compiled, or in torch, the oracle."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import loader


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
    if _serves(student, teacher):
        loss = torch.empty(len(student), dtype=torch.float64)
        sizes = [ctypes.c_int64(n) for n in student.shape]
        cooling, threads = ctypes.c_float(1 / temperature), ctypes.c_int32(torch.get_num_threads())
        tensors = (student, teacher, loss)
        loader.run("maqd_divergence", tensors, *sizes, cooling, cooling, threads)
        return loss.sum(), student
    log_p = (student / temperature).log_softmax(dim=-1)
    log_q = (teacher / temperature).log_softmax(dim=-1)
    q = log_q.exp()
    # a word the teacher excludes counts nothing, however impossible it is to the student
    loss = torch.where(q > 0, log_q - log_p, 0).mul_(q).sum(dtype=torch.float64)
    return loss, log_p.exp_().sub_(q).div_(temperature)


def _serves(student: Tensor, teacher: Tensor) -> bool:
    same = student.shape == teacher.shape and loader.reads(student, teacher)
    return same and all(
        type(t) is Tensor
        and t.dtype == torch.float32
        and t.dim() == 2
        and t.numel() > 0
        and t.is_contiguous()
        and not t.requires_grad
        for t in (student, teacher)
    )
