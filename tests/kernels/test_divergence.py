"""The loss of distillation: compiled against torch, torch against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maqd_hf.kernels import loader
from maqd_hf.kernels.divergence import kl_divergence

pytestmark = pytest.mark.usefixtures("best")


def by_autograd(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    s = student.double().requires_grad_()
    log_p = (s / temperature).log_softmax(-1)
    log_q = (teacher.double() / temperature).log_softmax(-1)
    loss = torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return loss.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("form", ["compiled", "reference"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 16), (4, 1003)])
def test_loss_and_gradient_equal_autograd(
    monkeypatch: pytest.MonkeyPatch, form: str, temperature: float, rows: int, width: int
) -> None:
    if form == "reference":
        monkeypatch.setenv(loader.KERNEL_VARIABLE, "reference")
    torch.manual_seed(width)
    student, teacher = torch.randn(rows, width) * 4, torch.randn(rows, width) * 4 + 30
    loss, grad = by_autograd(student, teacher, temperature)
    got, got_grad = kl_divergence(student.clone(), teacher.clone(), temperature)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grad, grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["compiled", "reference"])
def test_excluded_words_huge_logits_and_nan(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    if form == "reference":
        monkeypatch.setenv(loader.KERNEL_VARIABLE, "reference")
    excluded = torch.tensor([[0.0, 1.0, -float("inf")]])
    loss, grad = kl_divergence(excluded.clone(), excluded.clone(), 1.0)
    assert abs(float(loss)) < 1e-6 and grad.abs().max() < 1e-6
    far = torch.tensor([[-1e30, 0.0, 1e4]])
    loss, grad = kl_divergence(far.clone(), torch.tensor([[1e4, 0.0, 1e4]]), 1.0)
    assert loss > 1e29 and grad.isfinite().all()
    loss, _ = kl_divergence(torch.tensor([[float("nan"), 0.0]]), torch.zeros(1, 2), 1.0)
    assert loss.isnan()
