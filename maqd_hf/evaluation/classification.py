"""What a sequence classifier says of texts: predictions for `evaluate`'s accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classified:
    """The class of each text, in the texts' order, and what it took.

    ``tokens`` counts no padding; ``seconds`` is the time of the forwards, tokenising included.
    """

    classes: list[int]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@torch.inference_mode()
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
    tokens (None: where the tokenizer says). The model's mode is as before afterwards.

    Raises:
        ValueError: no texts, or a model that does not give one prediction a text.
    """
    if not texts:
        raise ValueError("no texts to classify")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    classes, tokens, began = [0] * len(texts), 0, time.perf_counter()
    training = model.training
    model.eval()
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="classifying", disable=not progress):
        rows = order[start : start + batch_size]
        inputs: Any = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        tokens += int(inputs["attention_mask"].sum())
        logits = model(**inputs).logits
        if logits.dim() != 2:
            raise ValueError(
                f"{type(model).__name__} gives logits {tuple(logits.shape)}, not (texts, classes): "
                "load it with AutoModelForSequenceClassification"
            )
        for row, found in zip(rows, logits.argmax(-1).tolist(), strict=True):
            classes[row] = found
    model.train(training)
    return Classified(classes, tokens, time.perf_counter() - began)
