"""Which norms a training opens that was not told: those that can be static almost for nothing.

Opened all at once, the norms of a pretrained decoder cost a short training several nats, because
some of them damp tokens a hundred times larger than the others. So ``MaQDTrainer`` asks
``select_static_norms`` before its first step, on the first samples that it would train on. A
resumed training opens the norms that its checkpoint names: a choice made anew could differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..calibration.static_norms import NoLogitsError, select_static_norms
from ..models.finding import gated_norms
from .callbacks import GateSchedule

TOKENS = 512
"""Tokens that the choice is made on, about: as many as in the main job."""

logger = logging.get_logger(__name__)


def first_samples(batches: Iterable[Mapping[str, Any]], tokens: int) -> list[dict[str, Tensor]]:
    """The first samples of ``batches``, at least one, that hold about ``tokens`` tokens together.

    Batches of padding alone are passed over.

    >>> import torch
    >>> batches = [{"input_ids": torch.zeros(4, 10)}] * 3
    >>> [len(batch["input_ids"]) for batch in first_samples(batches, tokens=60)]
    [4, 2]
    """
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2:  # not text: one batch will do
            return [tensors]
        read = tensors.get("attention_mask")
        if not ids.numel() or (read is not None and not bool(read.any())):  # nothing to measure on
            continue
        count = max(1, tokens // max(1, ids.shape[1]))
        kept = {n: v[:count] for n, v in tensors.items() if v.shape[:1] == ids.shape[:1]}
        found.append({**tensors, **kept})
        tokens -= min(count, len(ids)) * ids.shape[1]
        if tokens <= 0:
            break
    return found


def affordable_norms(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, progress: bool = True
) -> list[str]:
    """Names of the gated norms of ``model`` that can be static, the same on every rank.

    All ranks measure on the samples of the first one, so that their running statistics agree too.
    Norms whose gates are open already, and models without logits, which cannot be measured, are not
    asked about: the first are named, of the second none is.
    """
    norms = gated_norms(model)
    if all(float(norm.gate) >= 1 for norm in norms.values()):
        return list(norms)
    samples = broadcast_object_list([first_samples(batches, TOKENS)])[0]
    if not samples:
        return []
    try:
        selection = select_static_norms(model, samples, progress=progress)
    except NoLogitsError as error:
        logger.warning(
            f"All norms stay per token: {error}. lbn_norms=['*'] opens all of them, a list of "
            "names those it names."
        )
        return []
    logger.warning(str(selection))
    return selection.static


def norms_of_checkpoint(checkpoint: str) -> list[str] | None:
    """The norms that the training opened which saved ``checkpoint``; None: all."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text("utf-8"))
    schedule = (state.get("stateful_callbacks") or {}).get(GateSchedule.__name__)
    return None if schedule is None else schedule["args"]["norms"]
