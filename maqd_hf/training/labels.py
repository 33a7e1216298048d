"""Which labels count: those of real tokens that something before them predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
"""The label of a token that does not count."""


def shift(labels: Tensor) -> Tensor:
    """Labels (batch, tokens) moved to the position that predicts them; ``IGNORE`` for the last.

    >>> shift(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """
    return nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]


def drop_unpredicted(batch: dict[str, Any], causal: bool) -> dict[str, Any]:
    """``batch`` with ``IGNORE`` for labels of padding and, where the model is ``causal``, of what
    follows no real token. Labels that are not (batch, tokens) stay as they are.

    >>> ids = torch.tensor([[0, 5, 6]])
    >>> drop_unpredicted({"labels": ids, "attention_mask": ids != 0}, causal=True)["labels"]
    tensor([[-100, -100,    6]])
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or "shift_labels" in batch:
        return batch
    mask = batch.get("attention_mask")
    counted = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counted = mask.bool()
    if causal:
        counted = counted & nn.functional.pad(counted[:, :-1], (1, 0), value=False)
    return {**batch, "labels": labels.masked_fill(~counted, IGNORE)}


def any_counted(batch: dict[str, Any]) -> Tensor | None:
    """Whether a label of ``batch`` counts: a bool (), or None where there are no labels to ask."""
    labels = batch.get("shift_labels", batch.get("labels"))
    return (labels != IGNORE).any() if isinstance(labels, Tensor) else None


def zero_unless(counted: Tensor | None, loss: Tensor) -> Tensor:
    """``loss``, or 0 where nothing was ``counted``: a mean over no labels would be 0 / 0.

    >>> zero_unless(torch.tensor(False), torch.tensor(float("nan")))
    tensor(0.)
    """
    return loss if counted is None else torch.where(counted, loss, torch.zeros_like(loss))
