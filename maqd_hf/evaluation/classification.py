"""What a sequence classifier says of texts: predictions for `evaluate`'s accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..nn.activation import check_all_calibrated
from ..nn.modes import evaluating


@dataclass(frozen=True)
class Classified:
    """The class of each text, in the texts' order, and what it took.

    ``tokens`` counts no padding; ``seconds`` is the time of the forwards, tokenizing included.
    """

    classes: list[int]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Classified:
    """The most likely class of every text.

    Texts are batched by length, so that little of a batch is padding; ``max_length`` cuts them, in
    tokens (None: where the tokenizer says). Every module is in its own mode afterwards.

    Raises:
        ValueError: no texts, a text without a token, a model that does not give one prediction a
            text, or activations that were never calibrated.
        FloatingPointError: the model's logits are not finite.
    """
    if not texts:
        raise ValueError("no texts to classify")
    check_all_calibrated(model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    classes, tokens, began = [0] * len(texts), 0, time.perf_counter()
    starts = range(0, len(order), batch_size)
    with evaluating(model), torch.inference_mode():
        for start in tqdm(starts, desc="classifying", disable=not progress):
            rows = order[start : start + batch_size]
            inputs: Any = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            lengths = inputs["attention_mask"].sum(-1).tolist()
            _check_lengths(lengths, rows, texts)
            tokens += int(sum(lengths))
            for row, found in zip(rows, _classes(model, inputs), strict=True):
                classes[row] = found
    return Classified(classes, tokens, time.perf_counter() - began)


def _check_lengths(lengths: list[int], rows: list[int], texts: Sequence[str]) -> None:
    for length, row in zip(lengths, rows, strict=True):
        if not length:
            raise ValueError(
                f"text {row} of {len(texts)}, {texts[row]!r}, has no token: padding alone has no "
                "class. Leave it out"
            )


def _classes(model: PreTrainedModel, inputs: Any) -> list[int]:
    """The most likely class of each row of a batch."""
    logits = model(**inputs).logits
    if logits.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)}, not (texts, classes): "
            "load it with AutoModelForSequenceClassification"
        )
    if not bool(logits.isfinite().all()):
        raise FloatingPointError(
            f"{type(model).__name__} gives logits that are not finite: its weights, or what it "
            "computes from them in this dtype, are not"
        )
    return list(logits.argmax(-1).tolist())
