"""The native decode step: a packed decoder's ``forward`` becomes one call of the compiled library.

``attach_native`` puts a ``NativeForward`` in the place of ``model.forward``. ``generate()`` and its
logits processors, stopping criteria and streamers are unchanged: they call the model, and the
model answers from the library whenever model and call are of the kind it knows; everything else
goes to the model's own ``forward``. Both read the same cache, so that calls may alternate. Under
``torch.compile`` a step on a static cache, once a first call has filled it, is one operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..kernels import loader, ops
from ..kernels.decoder import NativeDecoder
from ..kernels.key_values import FixedKeyValues, KeyValues, KeyValueType
from ..nn import BatchContext, Stamp
from ..nn.context import CACHE_NAMES, given_cache
from .cache import NativeStaticLayer, adopt, cache_problem
from .families import FAMILIES, UnsupportedError, build, check_model

logger = logging.get_logger(__name__)

_IGNORED = ("cache_position", "use_cache", "return_dict", "logits_to_keep")


def attach_native(model: nn.Module, kv_cache: KeyValueType = "float32") -> None:
    """Let ``model`` run natively from now on; a model without such a form is left alone."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in FAMILIES and hasattr(model, "lm_head") and loader.chosen_isa() is not None:
        model.forward = NativeForward(model, kv_cache)


def use_native(
    model: nn.Module, enabled: bool = True, *, kv_cache: KeyValueType = "float32"
) -> None:
    """Turn the native decode step of a packed model on or off.

    Args:
        model: a packed model, as ``from_pretrained`` or ``pack_model`` gives it.
        enabled: False: the model's own forward from now on.
        kv_cache: how new caches keep keys and values: "float32", or "int8" with one scale per
            position and head, in a quarter of the memory. Not in the paper.

    Raises:
        ValueError: it is to be turned on for a model the library cannot run (it says why), or
            ``kv_cache`` is neither.
    """
    if not enabled:
        model.__dict__.pop("forward", None)
        return
    if kv_cache not in get_args(KeyValueType):
        raise ValueError(f"kv_cache={kv_cache!r}: must be one of {get_args(KeyValueType)}")
    problem = unsupported(model)
    if problem:
        raise ValueError(f"no native decode step for {type(model).__name__}: {problem}")
    attach_native(model, kv_cache)


def unsupported(model: nn.Module) -> str | None:
    """Why ``model`` has no native decode step, or None."""
    try:
        check_model(model)
    except UnsupportedError as problem:
        return str(problem)
    return None


# ------------------------------------------------------------------------------------ the forward


class NativeForward:
    """In the place of ``model.forward``: the library's answer where it has one, else the model's.

    Copies and pickles with its model; the copy builds its own plan.
    """

    def __init__(self, model: nn.Module, kv_cache: KeyValueType = "float32") -> None:
        self.model, self.kv_cache = model, kv_cache
        self.number = ops.register(self)
        self._names = tuple(_signature(type(model).forward).parameters)
        self._decoder: NativeDecoder | None = None
        self._made_of: tuple[list[object], Stamp] | None = None
        self._problem: str | None = None
        self._dtype = torch.float32  # of the logits

    @property
    def __signature__(self) -> inspect.Signature:  # generate() asks what forward accepts
        return _signature(type(self.model).forward)

    @property
    def __code__(self) -> Any:  # torch.export says by it where forward stands
        return inspect.unwrap(type(self.model).forward).__code__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None, "_made_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = ops.register(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or self.model.training or torch.jit.is_tracing():
            return type(self.model).forward(self.model, *args, **kwargs)
        if torch.compiler.is_compiling():
            traced = self._traced({**dict(zip(self._names, args, strict=False)), **kwargs})
            return traced or type(self.model).forward(self.model, *args, **kwargs)
        if args:
            bound = self.__signature__.bind_partial(*args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
        call = _Call(self.model, kwargs)
        decoder = self._decoder_for(call)
        problem = self._problem or call.problem(decoder)
        if problem or decoder is None:
            logger.warning_once(f"maqd_hf: the model's own forward runs, not the native: {problem}")
            return type(self.model).forward(self.model, **kwargs)
        return call.answer(decoder, self.kv_cache)

    def _traced(self, given: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """A step as one operator of a graph, or None where a graph needs the model's own forward:
        the cache is not (yet) the library's, or the call wants more than the last logits."""
        cache, ids = given_cache(given), given.get("input_ids")
        others = {*CACHE_NAMES, "input_ids", "position_ids", "attention_mask", *_IGNORED}
        if (
            self._decoder is None
            or self._decoder.head is None
            or _exporting()
            or not isinstance(cache, StaticCache)
            or not isinstance(cache.layers[0], NativeStaticLayer)
            or not isinstance(ids, Tensor)
            or given.get("return_dict") is False
            or (ids.shape[1] > 1 and given.get("logits_to_keep") != 1)
            or any(given[name] is not None for name in given if name not in others)
        ):
            return None
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        vocabulary = self._decoder.head.weight.rows
        store = cache.layers[0].store
        logits = ops.decode(ids, positions, mask, store, self.number, vocabulary)
        return _output(logits.to(self._dtype), cache)

    def step(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, store: FixedKeyValues
    ) -> Tensor:
        """What the operator does: logits (batch, 1, vocabulary) of the last of ``ids``."""
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        call = _Call(self.model, {**given, "logits_to_keep": 1}, store.past)
        decoder = self._decoder_for(call)
        problem = self._problem or call.problem(decoder)
        if problem or decoder is None:
            raise RuntimeError(f"this graph was compiled for the native decode step: {problem}")
        return call.logits(decoder, store).float()

    def _decoder_for(self, call: _Call) -> NativeDecoder | None:
        """The plan, or None where ``_problem`` says why; checked against the model's tensors and
        hooks at every call but a decode step, where that would take longer than the rest."""
        known = self._decoder is not None or self._problem is not None
        if known and call.tokens == 1 and call.past:
            return self._decoder
        try:
            parts, tensors = check_model(self.model)
            made_of = self._made_of
            if made_of is None or made_of[0] != parts or not made_of[1].fits(tensors):
                self._decoder, self._made_of = None, None
                self._decoder = build(self.model)
                self._made_of = parts, Stamp(tensors)
                embedding = self.model.get_input_embeddings()  # type: ignore[operator]
                self._dtype = embedding(torch.zeros(1, 1, dtype=torch.long)).dtype
            self._problem = None
        except UnsupportedError as problem:
            self._decoder, self._made_of, self._problem = None, None, str(problem)
        return self._decoder


CACHE_NAME = next(n for n in CACHE_NAMES if n in CausalLMOutputWithPast.__dataclass_fields__)
"""What the installed transformers calls the cache that a model takes and returns."""


def _output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    fields: dict[str, Any] = {"logits": logits, CACHE_NAME: cache}
    return CausalLMOutputWithPast(**fields)


def _exporting() -> bool:
    """torch.export: its graph leaves this process, where nobody knows our models."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return exporting is not None and bool(exporting())


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """What a ``forward`` accepts, without self; generate() asks at every token."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Call:
    """The arguments of one forward; ``past``: earlier positions, where there is no cache to ask."""

    def __init__(self, model: Any, given: dict[str, Any], past: int = 0) -> None:
        rest = dict(given)
        self.model = model
        self.ids: Tensor | None = rest.pop("input_ids", None)
        self.embeds: Tensor | None = rest.pop("inputs_embeds", None)
        self.mask: Tensor | None = rest.pop("attention_mask", None)
        self.positions: Tensor | None = rest.pop("position_ids", None)
        self.cache: Any = given_cache(rest)
        for name in CACHE_NAMES:
            rest.pop(name, None)
        self.use_cache = rest.get("use_cache")
        self.keep: int | Tensor = rest.get("logits_to_keep", 0)
        self.return_dict = rest.get("return_dict")
        self.rest = [
            name
            for name, value in rest.items()
            if name not in _IGNORED and value is not None and value is not False
        ]
        if self.use_cache is None:
            self.use_cache = bool(self.model.config.use_cache)
        source = self.ids if self.ids is not None else self.embeds
        shape: tuple[int, ...] = (0, 0) if source is None else tuple(source.shape)
        self.batch, self.tokens = shape[:2]
        self.past = past if self.cache is None else int(self.cache.get_seq_length())

    def problem(self, decoder: NativeDecoder | None) -> str | None:
        """Why this call is not the library's, or None; a mask of all queries becomes one of
        positions."""
        if self.rest:
            return f"called with {', '.join(sorted(self.rest))}"
        if self.return_dict is False:
            return "return_dict=False"
        if (self.ids is None) == (self.embeds is None) or not self.batch or not self.tokens:
            return "neither input_ids nor inputs_embeds, or both, or an empty batch"
        device = (self.ids if self.ids is not None else cast(Tensor, self.embeds)).device
        if device.type != "cpu":
            return f"inputs on {device}"
        positions = self.past + self.tokens
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            self.mask = _mask_of_positions(self.mask, self.past, self.tokens)
            if self.mask is None:
                return "an attention mask that is not causal"
        if self.mask is not None and (
            not isinstance(self.mask, Tensor) or self.mask.shape != (self.batch, positions)
        ):
            return "an attention mask that is not (batch, positions)"
        counts = self.model.config.model_type == "opt" and self.positions is None
        if counts and self.mask is not None and not bool(self.mask.all()):
            return "padding without position_ids"  # OPT counts its own
        if self.cache is not None and decoder is not None:
            return cache_problem(self.cache, len(decoder.blocks), self.batch, positions)
        return None

    def answer(self, decoder: NativeDecoder, kv_cache: KeyValueType) -> CausalLMOutputWithPast:
        """What the model's own forward would return."""
        if self.cache is None and self.use_cache:
            self.cache = DynamicCache(config=self.model.config)
        if self.cache is None:
            store = decoder.store(self.batch, kv_cache)
        else:
            store = adopt(self.cache, decoder, self.batch, kv_cache)
        return _output(self.logits(decoder, store), self.cache if self.use_cache else None)

    def logits(self, decoder: NativeDecoder, store: KeyValues) -> Tensor:
        """Of the tokens asked for, (batch, tokens, vocabulary); ``store`` holds theirs after it."""
        embeds = self.embeds
        if embeds is None and decoder.table is None:
            embeds = self.model.get_input_embeddings()(self.ids)
        mask = self.mask
        if mask is not None and bool(mask.all()):
            mask = None
        first = None
        if self.tokens > 1 or not self.past or mask is not None:
            shape = mask if mask is not None else torch.ones(self.batch, self.past + self.tokens)
            context = {"position_ids": self.positions}
            first = BatchContext.first_tokens(shape.bool(), self.tokens, context)
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.past, self.past + self.tokens).unsqueeze(0)
        keep = self.keep if isinstance(self.keep, int) else -1
        last = decoder.head is not None and (keep == 1 or (self.tokens == 1 and keep == 0))
        found = decoder(
            cast(Tensor, self.ids) if embeds is None else embeds,
            positions.expand(self.batch, -1),
            store,
            first,
            mask,
            logits=last,
        )
        dtype = torch.float32 if embeds is None else embeds.dtype
        if last:
            return found.to(dtype)
        part = self.keep if isinstance(self.keep, Tensor) else slice(-keep, None)
        logits: Tensor = self.model.lm_head(found[:, part].to(dtype))
        return logits


def _mask_of_positions(mask: Tensor, past: int, tokens: int) -> Tensor | None:
    """(batch, past + tokens) bool from a mask (batch, 1, tokens, any number of positions) of every
    query, bool or to be added to the scores; None unless each sees what the last sees up to it."""
    if mask.shape[1:3] != (1, tokens) or mask.shape[3] < past + tokens:
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    found = seen[:, -1, : past + tokens]
    if tokens > 1:
        position = torch.arange(mask.shape[3])
        causal = position <= torch.arange(past, past + tokens).unsqueeze(1)
        wanted = causal & seen[:, -1:]
        queries = found[:, past:, None]  # what padding sees is nobody's concern
        if not torch.equal(seen & queries, wanted & queries):
            return None
    return found
