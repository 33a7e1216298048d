"""What a layer needs to know of the batch it cannot see: which tokens are padding, which are first.

A norm or an activation quantiser receives hidden states alone. ``BatchContext`` is filled by a
forward pre-hook on the base model and read by every converted layer below it. It stays filled until
the next forward, because gradient checkpointing runs layers again during backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

S = TypeVar("S", bound=Hashable)

FirstToken = Literal["own", "shared"]
"""Whether the first token of a sequence keeps statistics and steps of its own. Pretrained models
park a massive activation there, which would own every shared scale; decoding never meets it."""


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a model's ``forward`` calls its cache: transformers 5.24 and newer; before, of keys and
values; before, of a state-space model."""


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's ``forward``, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def past_tokens(kwargs: Mapping[str, Any]) -> Any:
    """Tokens before those of a call, by the arguments of a model's ``forward``.

    A cache of states alone does not count them: any are one.
    """
    cache = given_cache(kwargs)
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):  # Mamba's in transformers 5.0
        position = kwargs.get("cache_position")
        return 0 if position is None else int(position[0])
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


class BatchContext:
    """Token masks of the current forward, each (batch, tokens) bool or None (= unknown).

    ``valid``: False on padding. ``first``: True on the first token of each sequence, which is
    nowhere when the forward continues a key/value cache.
    """

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        self.first: Tensor | None = None
        self._last: dict[Callable[..., Tensor], tuple[weakref.ref[Tensor], Any, Tensor]] = {}

    def once(self, x: Tensor, setting: S, transform: Callable[[Tensor, S], Tensor]) -> Tensor:
        """``transform(x, setting)``, computed once where several layers follow one another on the
        same ``x``, as q, k and v do."""
        # A compiler finds common expressions itself; what changes an inference tensor is not seen.
        if torch.compiler.is_compiling() or x.is_inference():
            return transform(x, setting)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
        key = (x._version, setting, modes)
        last = self._last.get(transform)
        if last is None or last[0]() is not x or last[1] != key:
            last = self._last[transform] = (weakref.ref(x), key, transform(x, setting))
        return last[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}}

    def attach(self, base_model: nn.Module) -> None:
        """Fill this context at every forward of ``base_model`` (the module that gets the mask)."""
        base_model.register_forward_pre_hook(self._capture, with_kwargs=True)

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            self.valid = self.first = None
            return
        batch, length = tokens.shape[:2]
        if not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch):
            mask = None
        self.valid = None if mask is None else mask[:, -length:].bool()
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        self.first = self.first_tokens(mask.bool(), length, kwargs)

    @staticmethod
    def first_tokens(mask: Tensor, length: int, kwargs: dict[str, Any]) -> Tensor:
        """Which of the last ``length`` tokens begin a sequence, (batch, length) bool.

        ``mask`` (batch, columns) bool covers these tokens and maybe those before; ``kwargs`` are
        the model's: its positions and its cache are looked at.
        """
        valid = mask[:, -length:]
        position = kwargs.get("position_ids")
        if isinstance(position, Tensor) and position.dim() == 2 and position.shape[1] == length:
            return (position == 0) & valid
        uncovered = max(past_tokens(kwargs) + length - mask.shape[1], 0)  # cached, taken as text
        return (mask.cumsum(dim=1)[:, -length:] + uncovered == 1) & valid

    def masks_for(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``(valid, first)``, each of shape ``x.shape[:-1]``, where they describe ``x``, else None.

        ``x`` is (B, T, D), or per head (B, T, H, D) or (B, H, T, D); with as many heads as tokens
        the last two cannot be told apart, and nothing is known.
        """
        return self._fit(self.valid, x), self._fit(self.first, x)

    @staticmethod
    def _fit(mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is None or x.dim() not in (3, 4) or x.shape[0] != mask.shape[0]:
            return None
        tokens = mask.shape[1]
        if x.dim() == 3:
            return mask if x.shape[1] == tokens else None
        if (x.shape[1] == tokens) == (x.shape[2] == tokens):
            return None
        spread = mask.unsqueeze(2) if x.shape[1] == tokens else mask.unsqueeze(1)
        return spread.expand(x.shape[:-1])
