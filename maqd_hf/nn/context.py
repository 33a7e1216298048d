"""What a layer needs to know of the batch it cannot see: which tokens are padding, which are first.

A norm or an activation quantizer receives hidden states alone. The entrance of the model, where ids
and mask come in, hands their masks to a ``BatchContext``, which every converted layer below reads.
They belong to one call of the model: another thread, another call before the backward of this one
or a call inside it has masks of its own (``calls`` says whose a layer is).

Running statistics of norms belong to the model all the same: evaluate in as many threads as you
like, train in one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .calls import Calls

S = TypeVar("S", bound=Hashable)
T = TypeVar("T")

FirstToken = Literal["own", "shared"]
"""Whether the first token of a sequence keeps statistics and steps of its own. Pretrained models
park a massive activation there, which would own every shared scale; decoding never meets it."""


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names under which a model's ``forward`` takes its cache: that of transformers 5.24 and newer,
and the older ones for keys and values and for the states of a state-space model."""


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's ``forward``, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def past_tokens(kwargs: Mapping[str, Any]) -> Any:
    """How many tokens came before those of a call, by the arguments of a model's ``forward``.

    A cache of states alone does not count its tokens: however many they are, they count as one.
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


class Masks(NamedTuple):
    """What is known of the tokens of a call, each (batch, tokens) bool or None (= unknown).

    ``valid``: False on padding. ``first``: True on the first token of each sequence, which is
    nowhere when the call continues a key/value cache.
    """

    valid: Tensor | None = None
    first: Tensor | None = None

    def fitted(self, x: Tensor) -> Masks:
        """The masks in the shape of ``x``, as ``BatchContext.masks_for`` describes them."""
        return Masks(_fit(self.valid, x), _fit(self.first, x))


class _Made(threading.local):
    """Results of ``BatchContext.once``: transform -> (its input, the circumstances, the result)."""

    def __init__(self) -> None:
        self.last: dict[Callable[..., Tensor], tuple[weakref.ref[Tensor], Any, Tensor]] = {}


class BatchContext:
    """The token masks of the call that a layer runs in; one such object for all layers of a model.

    Outside all calls nothing is known.
    """

    def __init__(self) -> None:
        self._calls: Calls[Masks] = Calls()
        self._made = _Made()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def once(self, x: Tensor, setting: S, transform: Callable[[Tensor, S], Tensor]) -> Tensor:
        """``transform(x, setting)``, computed once where several layers follow one another on the
        same ``x``, as q, k and v do.

        ``transform`` keeps no tensor for its backward: a checkpointed stretch may find the result
        made in its first run and have to make it when it is run again, and must keep as many.
        """
        # A compiler finds common expressions itself; what changes an inference tensor is not seen.
        if torch.compiler.is_compiling() or x.is_inference():
            return transform(x, setting)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
        key = (x._version, setting, modes)
        made = self._made.last
        last = made.get(transform)
        if last is None or last[0]() is not x or last[1] != key:
            last = made[transform] = (weakref.ref(x), key, transform(x, setting))
        return last[2]

    def attach(self, base_model: nn.Module) -> None:
        """Make every forward of ``base_model``, the module that gets the mask, a call.

        A ``forward`` of an instance that says ``makes_calls`` makes them itself (``call``), where a
        layer may ask: masks that nobody reads would cost a small model a tenth of a token.
        """
        base_model.register_forward_pre_hook(self._enter, with_kwargs=True)
        base_model.register_forward_hook(self._leave, always_call=True)

    @staticmethod
    def of(module: nn.Module) -> list[BatchContext]:
        """The contexts that are attached to ``module``."""
        owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
        return [owner for owner in owners if isinstance(owner, BatchContext)]

    def call(self, forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """``forward(*args, **kwargs)``, as a call of the model."""
        self._calls.enter(forward, self._masks_of(args, kwargs))
        output = None
        try:
            output = forward(*args, **kwargs)
        finally:
            self._end(forward, output)
        return output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not getattr(vars(module).get("forward"), "makes_calls", False):
            self._calls.enter(module, self._masks_of(args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._end(module, output)

    def _end(self, entrance: object, output: Any) -> None:
        self._calls.leave(entrance, output)
        if not torch.compiler.is_compiling():
            self._made.last.clear()

    @contextmanager
    def given(self, masks: Masks) -> Iterator[None]:
        """Within this context layers run in a call with these masks.

        >>> context = BatchContext()
        >>> with context.given(Masks(first=torch.tensor([[True, False]]))):
        ...     context.masks.first
        tensor([[ True, False]])
        >>> context.masks
        Masks(valid=None, first=None)
        """
        with self._calls.entered(masks):
            yield

    @classmethod
    def _masks_of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Masks:
        """Masks of a call by the arguments of the model's ``forward``."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return Masks()
        batch, length = tokens.shape[:2]
        if not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch):
            mask = None
        valid = None if mask is None else mask[:, -length:].bool()
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        return Masks(valid, cls.first_tokens(mask.bool(), length, kwargs))

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

    @property
    def masks(self) -> Masks:
        """The masks of the call that this thread is in."""
        found = self._calls.current()
        return found[-1] if found else Masks()

    def masks_for(self, x: Tensor) -> Masks:
        """``(valid, first)``, each of shape ``x.shape[:-1]``, where they describe ``x``, else None.

        ``x`` is (B, T, D), or per head (B, T, H, D) or (B, H, T, D); with as many heads as tokens
        the last two cannot be told apart, and nothing is known.

        ``RuntimeError``: a backward runs a layer again, and forwards of several threads with
        different masks could have asked for it.
        """
        found = self._calls.current()
        if not found:
            return Masks()
        if len(found) > 1:
            return _agreed(found, x)
        return found[0].fitted(x)


def _agreed(calls: list[Masks], x: Tensor) -> Masks:
    """The masks for ``x``, of one of these calls, or of several that say the same."""
    near = [c for c in calls if c.first is not None and c.first.device == x.device]
    masks, *others = (call.fitted(x) for call in near or calls)
    if all(_same(a, b) for other in others for a, b in zip(masks, other, strict=True)):
        return masks
    raise RuntimeError(
        "gradient checkpointing runs a layer again, and forwards in several threads, of which one "
        "has other padding or first tokens than another, could have been its first run: train a "
        "model in one thread, or give every thread a copy of the model"
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _fit(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None or x.dim() not in (3, 4) or x.shape[0] != mask.shape[0]:
        return None
    tokens = mask.shape[1]
    mask = mask.to(x.device)  # a model can be spread over devices
    if x.dim() == 3:
        return mask if x.shape[1] == tokens else None
    if (x.shape[1] == tokens) == (x.shape[2] == tokens):
        return None
    spread = mask.unsqueeze(2) if x.shape[1] == tokens else mask.unsqueeze(1)
    return spread.expand(x.shape[:-1])
