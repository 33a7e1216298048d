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
from dataclasses import dataclass
from functools import cache, partial
from threading import RLock
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..kernels import loader, ops
from ..kernels.decoder import NativeDecoder
from ..kernels.key_values import FixedKeyValues, KeyValueType
from ..nn import BatchContext
from ..nn.context import CACHE_NAMES, given_cache
from .answer import answer, disagreement, logits_of
from .cache import NativeStaticLayer, was_read
from .call import check_modes, read_call
from .families import FAMILIES, UnsupportedError
from .plan import Plan, make_plan
from .snapshot import Snapshot

logger = logging.get_logger(__name__)

_OF_A_GRAPH = {*CACHE_NAMES, "input_ids", "position_ids", "attention_mask", "cache_position"}
_OF_A_GRAPH |= {"use_cache", "return_dict", "logits_to_keep"}


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
    forward = NativeForward(model, kv_cache)
    if forward.problem is not None:
        raise ValueError(f"no native decode step for {type(model).__name__}: {forward.problem}")
    model.forward = forward


def unsupported(model: nn.Module) -> str | None:
    """Why ``model`` has no native decode step, or None."""
    return NativeForward(model).problem


# ------------------------------------------------------------------------------------ the forward


@dataclass(frozen=True)
class _Known:
    """A model as it was when it was looked at: its plan, or why it has none."""

    snapshot: Snapshot
    plan: Plan | None
    problem: str | None


class NativeForward:
    """In the place of ``model.forward``: the library's answer where it has one, else the model's.

    Any number of threads may call it: what belongs to a call is in a ``Call``, what belongs to the
    model never changes once it is made, and is made anew, under a lock, where the model has changed
    (``snapshot``). Copies and pickles with its model; the copy makes its own plan.
    """

    makes_calls = True  # for the layers, where the model's own forward runs: see BatchContext

    def __init__(self, model: nn.Module, kv_cache: KeyValueType = "float32") -> None:
        self.model, self.kv_cache = model, kv_cache
        self._names = tuple(_signature(type(model).forward).parameters)
        self._start()

    def _start(self) -> None:
        self.number = ops.register(self)
        self._known: _Known | None = None
        self._lock = RLock()

    @property
    def __signature__(self) -> inspect.Signature:  # generate() asks what forward accepts
        return _signature(type(self.model).forward)

    @property
    def __code__(self) -> Any:  # torch.export says by it where forward stands
        return inspect.unwrap(type(self.model).forward).__code__

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("model", "kv_cache", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def decoder(self) -> NativeDecoder | None:
        """The plan for the library, or None where ``problem`` says why there is none."""
        plan = self._look().plan
        return plan.decoder if plan else None

    @property
    def problem(self) -> str | None:
        """Why the library does not run the model as it is now, or None."""
        return self._look().problem

    def _look(self, step: bool = False) -> _Known:
        """The plan of the model as it is now; ``step``: before a single token."""
        known = self._known
        if known is not None and known.snapshot.fits(step):
            return known
        with self._lock:
            known = self._known
            if known is None or not known.snapshot.fits():
                known = self._known = _look_at(self.model)
        return known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or self.model.training or torch.jit.is_tracing():
            return self._own(*args, **kwargs)
        if torch.compiler.is_compiling():
            traced = self._traced({**dict(zip(self._names, args, strict=False)), **kwargs})
            return traced or self._own(*args, **kwargs)
        given = kwargs
        if args:
            bound = self.__signature__.bind_partial(*args, **kwargs).arguments
            given = {**bound.pop("kwargs", {}), **bound}
        try:
            check_modes()
            plan = self._plan(_is_step(given))
            call = read_call(given, plan, self.model.config)
        except UnsupportedError as problem:
            logger.warning_once(f"maqd_hf: the model's own forward runs, not the native: {problem}")
            return self._own(*args, **kwargs)
        return _output(*answer(plan, call, self.model.config, self.kv_cache))

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns."""
        forward: Callable[..., Any] = partial(type(self.model).forward, self.model)
        for context in BatchContext.of(self.model):
            forward = partial(context.call, forward)
        return forward(*args, **kwargs)

    def _plan(self, step: bool) -> Plan:
        known = self._look(step)
        if known.plan is None:
            raise UnsupportedError(known.problem)
        return known.plan

    def _traced(self, given: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """A step as one operator of a graph, or None where a graph needs the model's own forward:
        the cache is not (yet) the library's, or the call wants more than the last logits."""
        cache, ids = given_cache(given), given.get("input_ids")
        known = self._known
        head = known.plan.decoder.head if known and known.plan else None
        if (
            known is None
            or known.plan is None
            or head is None
            or _exporting()
            or not isinstance(cache, StaticCache)
            or not isinstance(cache.layers[0], NativeStaticLayer)
            or was_read(cache)
            or not isinstance(ids, Tensor)
            or given.get("return_dict") is False
            or (ids.shape[1] > 1 and given.get("logits_to_keep") != 1)
            or any(given[name] is not None for name in given if name not in _OF_A_GRAPH)
        ):
            return None
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        store = cache.layers[0].store
        logits = ops.decode(ids, positions, mask, store, self.number, head.weight.rows)
        return _output(logits.to(known.plan.dtype), cache)

    def step(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, store: FixedKeyValues
    ) -> Tensor:
        """What the operator does: logits (batch, 1, vocabulary) of the last of ``ids``."""
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        try:
            plan = self._plan(step=True)
            call = read_call({**given, "logits_to_keep": 1}, plan, self.model.config, store)
        except UnsupportedError as problem:
            raise RuntimeError(
                f"this graph was compiled for the native decode step, which does not fit any more: "
                f"{problem}; compile again"
            ) from problem
        return logits_of(plan, call, store).float()


def _is_step(given: dict[str, Any]) -> bool:
    """Whether a call continues a sequence by one token."""
    ids = given.get("input_ids")
    return isinstance(ids, Tensor) and ids.shape[-1] == 1 and given_cache(given) is not None


def _look_at(model: Any) -> _Known:
    """The plan of ``model``, once both forwards agree on a few tokens."""
    snapshot = Snapshot(model)  # first: what changes meanwhile is to be seen
    try:
        plan = make_plan(model)
        if not model.training:
            problem = disagreement(model, plan)
            return _Known(snapshot, None if problem else plan, problem)
    except UnsupportedError as problem:
        return _Known(snapshot, None, str(problem))
    return _Known(snapshot, plan, None)


CACHE_NAME = next(n for n in CACHE_NAMES if n in CausalLMOutputWithPast.__dataclass_fields__)
"""What the installed transformers calls the cache that a model takes and returns."""


def _output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    fields: dict[str, Any] = {"logits": logits, CACHE_NAME: cache}
    return CausalLMOutputWithPast(**fields)


def _exporting() -> bool:
    """torch.export: its graph leaves this process, where nobody knows our models."""
    return bool(torch.compiler.is_exporting())


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """What a ``forward`` accepts, without self; generate() asks at every token."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
