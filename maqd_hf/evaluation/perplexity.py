"""Perplexity as the exponential of (sum of negative log-likelihoods) / (number of tokens).

Two perplexities can only be compared when text, windows and counted tokens are the same, so every
result carries a sentence that says what was done (`PerplexityResult.protocol`). The convention:

* The text is one row of tokens, cut into windows of ``window`` positions that start every
  ``stride`` tokens. ``stride == window`` gives disjoint windows (the common protocol of the
  quantization literature); a smaller stride gives every token more context and costs more.
* A window scores only tokens that no window before it has scored, so no token counts twice.
* The first token of a row, and of each disjoint window, has no context: it is not scored. With a
  BOS token every window is BOS + (``window`` - 1) tokens, and then all tokens are scored.
* The last window may be shorter than the others; a text shorter than one window is one window.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ..data.text import bos_token
from ..nn.activation import check_all_calibrated
from ..nn.modes import evaluating

LOGIT_ROWS = 256  # positions whose float32 log-softmax exists at once
CHUNK_CHARACTERS = 2**21  # text tokenized at once; long enough for WikiText-2 to be one piece


@dataclass(frozen=True)
class PerplexityResult:
    """Sums over all scored tokens (natural logarithm), and how they came about.

    Attributes:
        nll_sum: sum of -log p over the scored tokens.
        tokens: how many tokens were scored.
        windows: in how many windows, each one forward pass of the model.
        seconds: time spent in the model.
        protocol: one sentence that says what was measured.
        bits_per_byte: mean bits per scored token times tokens per UTF-8 byte of the text that was
            read, which compares models with different tokenizers; None if only tokens were given.
    """

    nll_sum: float
    tokens: int
    windows: int
    seconds: float
    protocol: str
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        mean = self.nll_sum / self.tokens
        return math.exp(mean) if mean < 700 else math.inf  # exp overflows soon after

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second of model time."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Window:
    """Tokens ``start:end`` of a row; ``scored`` of them, the last ones, count."""

    start: int
    end: int
    scored: int


def plan_windows(
    length: int, window: int, stride: int | None = None, bos: bool = False
) -> list[Window]:
    """The windows over a row of ``length`` tokens; the rules are at the head of this module.

    >>> [(w.start, w.end, w.scored) for w in plan_windows(10, window=4)]
    [(0, 4, 3), (4, 8, 3), (8, 10, 1)]
    >>> [(w.start, w.end, w.scored) for w in plan_windows(10, window=4, stride=2)]
    [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    >>> [(w.start, w.end, w.scored) for w in plan_windows(6, window=4, bos=True)]
    [(0, 3, 3), (3, 6, 3)]
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1..window={window}, got {stride}.")
    if bos:  # the BOS token takes one position of each window
        window, stride = window - 1, min(stride, window - 1)
    windows, done = [], 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        scored = end - max(done, start if bos else start + 1)
        if scored > 0:
            windows.append(Window(start, end, scored))
        done = end
        if end == length:
            break
    return windows


def token_perplexity(
    model: nn.Module,
    input_ids: Tensor,
    window: int = 512,
    stride: int | None = None,
    *,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    max_windows: int | None = None,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of a causal LM on one row of tokens.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``, gives ``.logits`` of shape
            (batch, tokens, vocabulary). Every module is in its own mode afterwards.
        input_ids: (tokens,) integers, on any device.
        window: positions in a window, the model's context; BOS counts as one.
        stride: distance between the starts of windows, 1..window; None means ``window``.
        batch_size: windows per forward pass. The logits of one batch are the largest thing in
            memory; the result does not depend on it.
        bos_token_id: put in front of every window if given.
        max_windows: score only the first so many windows.
        progress: show a bar.

    Raises:
        ValueError: not one row of tokens, nothing to score (padding alone is nothing), a bad
            window or stride, or activations that were never calibrated.
        FloatingPointError: the model's log-likelihoods are NaN.
    """
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids must have shape (tokens,), got {tuple(input_ids.shape)}.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1 or None, got {max_windows}.")
    bos = bos_token_id is not None
    windows = plan_windows(len(input_ids), window, stride, bos)[:max_windows]
    if not windows:
        raise ValueError(
            f"Nothing to score: {len(input_ids)} token(s). The text is empty, or only one token "
            "long without a BOS token."
        )
    check_all_calibrated(model)
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(padding, int) and bool((input_ids == padding).all()):
        raise ValueError(
            f"Nothing to score: all {len(input_ids)} tokens are padding (token {padding}). "
            "Give the text's own tokens."
        )
    nll_sum, began = 0.0, time.perf_counter()
    bar = tqdm(total=len(windows), unit="window", desc="perplexity", disable=not progress)
    with evaluating(model), bar:
        for batch in _batches(windows, batch_size):
            rows = torch.stack([input_ids[w.start : w.end] for w in batch])
            nll_sum += _window_nll(model, rows, batch[0].scored, bos_token_id)
            bar.update(len(batch))
    seconds = time.perf_counter() - began
    if math.isnan(nll_sum):
        raise FloatingPointError(
            "The model's log-likelihoods are NaN: its weights, or what it computes from them in "
            "this dtype, are not finite."
        )
    tokens = sum(w.scored for w in windows)
    protocol = _describe("one row of tokens", tokens, len(windows), window, stride, bos)
    return PerplexityResult(nll_sum, tokens, len(windows), seconds, protocol)


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Neighboring windows of equal shape, so that nothing has to be padded."""
    for _, group in groupby(windows, key=lambda w: (w.end - w.start, w.scored)):
        while batch := list(islice(group, size)):
            yield batch


def _window_nll(model: nn.Module, rows: Tensor, scored: int, bos_token_id: int | None) -> float:
    """Sum of -log p over the last ``scored`` tokens of each window of ``rows`` (batch, tokens)."""
    rows = rows.to(next(model.parameters()).device)
    inputs = rows
    if bos_token_id is not None:
        inputs = nn.functional.pad(rows, (1, 0), value=bos_token_id)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted:  # spares the head the tokens that are only context
        options["logits_to_keep"] = scored + 1
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    logits = output.logits[:, -scored - 1 : -1].flatten(0, 1)
    return _nll(logits, rows[:, -scored:].flatten())


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p(target) over (positions, vocabulary) logits, in float32, summed in float64."""
    total = 0.0
    for part, target in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        dtype = torch.promote_types(part.dtype, torch.float32)
        losses = cross_entropy(part.to(dtype), target.to(part.device), reduction="none")
        total += losses.sum(dtype=torch.float64).item()
    return total


def text_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    window: int = 512,
    stride: int | None = None,
    *,
    join: str | None = "\n\n",
    add_bos: bool | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of a causal LM on texts, with bits per byte.

    Args:
        texts: strings, read one by one and no further than ``max_windows`` needs.
        join: put between the texts, which then are one row of tokens; ``None`` keeps each text a
            row of its own, so that no window crosses from one text into the next.
        add_bos: start every window with the BOS token; ``None`` does what the tokenizer does.
        model, window, stride, batch_size, max_windows, progress: as in `token_perplexity`.

    Raises:
        ValueError: no text, a text too short to score, or no BOS token to add.
    """
    bos = bos_token(tokenizer, add_bos)
    limit = None if max_windows is None else max_windows * window + 1
    pieces = _encode(_chunks(texts, join) if join is not None else texts, tokenizer, limit)
    read = sum(size for _, size in pieces)
    rows = _rows([ids for ids, _ in pieces], join is not None, bos is not None)
    parts: list[PerplexityResult] = []
    left = max_windows
    for ids in tqdm(rows, desc="texts", disable=not progress or len(rows) == 1):
        part = token_perplexity(
            model,
            ids,
            window,
            stride,
            batch_size=batch_size,
            bos_token_id=bos,
            max_windows=left,
            progress=progress and len(rows) == 1,
        )
        parts.append(part)
        left = None if left is None else left - part.windows
        if left == 0:
            break
    nll_sum = sum(part.nll_sum for part in parts)
    tokens = sum(part.tokens for part in parts)
    windows = sum(part.windows for part in parts)
    source = "each text on its own" if join is None else f"texts joined by {join!r}"
    return PerplexityResult(
        nll_sum,
        tokens,
        windows,
        sum(part.seconds for part in parts),
        _describe(source, tokens, windows, window, stride, bos is not None),
        nll_sum / tokens / math.log(2) * sum(len(ids) for ids, _ in pieces) / read,
    )


def _rows(texts: list[Tensor], joined: bool, bos: bool) -> list[Tensor]:
    """The rows of tokens to score: one of all ``texts``, or those of them that can be scored."""
    rows = [torch.cat(texts)] if joined and texts else texts
    least = 1 if bos else 2  # one token alone has no context
    rows = [ids for ids in rows if len(ids) >= least]
    if not rows:
        raise ValueError(
            "No text to score: every text is empty, or one token long and there is no BOS token."
        )
    return rows


def _encode(texts: Iterable[str], tokenizer: Any, limit: int | None) -> list[tuple[Tensor, int]]:
    """Tokens and UTF-8 bytes of each text, until ``limit`` tokens were read."""
    pieces, tokens = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        pieces.append((torch.tensor(ids, dtype=torch.long), len(text.encode())))
        tokens += len(ids)
        if limit is not None and tokens >= limit:
            break
    return pieces


def _chunks(texts: Iterable[str], join: str) -> Iterator[str]:
    """``join.join(texts)`` in pieces of about CHUNK_CHARACTERS, cut only where texts meet."""
    piece, size, between = [], 0, ""
    for text in texts:
        piece += [between, text]
        size += len(between) + len(text)
        between = join
        if size >= CHUNK_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _describe(
    source: str, tokens: int, windows: int, window: int, stride: int | None, bos: bool
) -> str:
    cut = "disjoint" if stride in (None, window) else f"stride {stride}"
    start = (
        "BOS in front of each"
        if bos
        else "no BOS, a token without context (first of the row or of a disjoint window) not scored"
    )
    return (
        f"exp(sum of NLL / tokens), {source}, {windows} window(s) of {window} positions ({cut}), "
        f"{start}, {tokens} tokens scored once each."
    )
