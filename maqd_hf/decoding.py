"""The native decode step: a packed decoder's ``forward`` becomes one call of the compiled library.

``attach_native`` puts a ``NativeForward`` in the place of ``model.forward``. ``generate()`` and its
logits processors, stopping criteria and streamers are unchanged: they call the model, and the
model answers from the library whenever model and call are of the kind it knows; everything else
goes to the model's own ``forward``. Both read the same cache, so that calls may alternate.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .kernels import loader, native
from .kernels.decoder import BlockStep, LinearStep, NativeDecoder, NormStep
from .native_cache import adopt, cache_problem
from .nn import BatchContext, LayerBatchNorm, PackedEmbedding, PackedLinear, Stamp

logger = logging.get_logger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the architectures whose blocks the library runs."""

_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length
_IGNORED = ("cache_position", "use_cache", "return_dict", "logits_to_keep")


def attach_native(model: nn.Module) -> None:
    """Let ``model`` run natively from now on; a model without such a form is left alone."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in FAMILIES and hasattr(model, "lm_head") and loader.chosen_path() is not None:
        model.forward = NativeForward(model)


def use_native(model: nn.Module, enabled: bool = True) -> None:
    """Turn the native decode step of a packed model on or off.

    ``ValueError`` if it is to be turned on for a model the library cannot run; it says why.
    """
    if not enabled:
        model.__dict__.pop("forward", None)
        return
    problem = unsupported(model)
    if problem:
        raise ValueError(f"no native decode step for {type(model).__name__}: {problem}")
    attach_native(model)


def unsupported(model: nn.Module) -> str | None:
    """Why ``model`` has no native decode step, or None."""
    try:
        _check_model(model)
    except _UnsupportedError as problem:
        return str(problem)
    return None


class _UnsupportedError(Exception):
    """The reason is the message."""


# ------------------------------------------------------------------------------------ the forward


class NativeForward:
    """In the place of ``model.forward``: the library's answer where it has one, else the model's.

    Copies and pickles with its model; the copy builds its own plan.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._decoder: NativeDecoder | None = None
        self._made_of: tuple[list[object], Stamp] | None = None
        self._problem: str | None = None

    @property
    def __signature__(self) -> inspect.Signature:  # generate() asks what forward accepts
        return _signature(type(self.model).forward)

    @property
    def __code__(self) -> Any:  # torch.export says by it where forward stands
        return inspect.unwrap(type(self.model).forward).__code__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None, "_made_of": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.model.training:
            return type(self.model).forward(self.model, *args, **kwargs)
        if args:
            bound = self.__signature__.bind_partial(*args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
        call = _Call(self.model, kwargs)
        decoder = self._decoder_for(call)
        problem = self._problem or call.problem(decoder)
        if problem or decoder is None:
            logger.warning_once(f"maqd_hf: the model's own forward runs, not the native: {problem}")
            return type(self.model).forward(self.model, **kwargs)
        return call.answer(decoder)

    def _decoder_for(self, call: _Call) -> NativeDecoder | None:
        """The plan, or None where ``_problem`` says why; checked against the model's tensors and
        hooks at every call but a decode step, where that would take longer than the rest."""
        known = self._decoder is not None or self._problem is not None
        if known and call.tokens == 1 and call.past:
            return self._decoder
        try:
            parts, tensors = _check_model(self.model)
            made_of = self._made_of
            if made_of is None or made_of[0] != parts or not made_of[1].fits(tensors):
                self._decoder, self._made_of = None, None
                self._decoder = _build(self.model)
                self._made_of = parts, Stamp(tensors)
            self._problem = None
        except _UnsupportedError as problem:
            self._decoder, self._made_of, self._problem = None, None, str(problem)
        return self._decoder


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """What a ``forward`` accepts, without self; generate() asks at every token."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Call:
    """The arguments of one forward."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        rest = dict(given)
        self.model = model
        self.ids: Tensor | None = rest.pop("input_ids", None)
        self.embeds: Tensor | None = rest.pop("inputs_embeds", None)
        self.mask: Tensor | None = rest.pop("attention_mask", None)
        self.positions: Tensor | None = rest.pop("position_ids", None)
        self.cache: Any = rest.pop("past_key_values", None)
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
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())

    def problem(self, decoder: NativeDecoder | None) -> str | None:
        """Why this call is not the library's, or None."""
        if self.rest:
            return f"called with {', '.join(sorted(self.rest))}"
        if self.return_dict is False:
            return "return_dict=False"
        if (self.ids is None) == (self.embeds is None) or not self.batch or not self.tokens:
            return "neither input_ids nor inputs_embeds, or both, or an empty batch"
        device = (self.ids if self.ids is not None else cast(Tensor, self.embeds)).device
        if device.type != "cpu":
            return f"inputs on {device}"
        if self.mask is not None and (
            not isinstance(self.mask, Tensor)
            or self.mask.shape != (self.batch, self.past + self.tokens)
        ):
            return "an attention mask that is not (batch, positions)"
        if self.cache is not None and decoder is not None:
            return cache_problem(self.cache, len(decoder.blocks))
        return None

    def answer(self, decoder: NativeDecoder) -> CausalLMOutputWithPast:
        """What the model's own forward would return."""
        if self.cache is None and self.use_cache:
            self.cache = DynamicCache(config=self.model.config)
        if self.cache is None:
            store = decoder.store(self.batch)
        else:
            store = adopt(self.cache, decoder, self.batch)
        embeds = self.embeds
        if embeds is None and decoder.table is None:
            embeds = self.model.get_input_embeddings()(self.ids)
        mask = self.mask
        if mask is not None and bool(mask.all()):
            mask = None
        first = None
        if self.tokens > 1 or not self.past or mask is not None:
            context = {"position_ids": self.positions, "past_key_values": self.cache}
            shape = mask if mask is not None else torch.ones(self.batch, self.past + self.tokens)
            first = BatchContext.first_tokens(shape.bool(), self.tokens, context)
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.past, self.past + self.tokens).unsqueeze(0)
        last = decoder.head is not None and type(self.keep) is int and self.keep == 1
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
            logits = found.to(dtype)
        else:
            part = slice(-self.keep, None) if isinstance(self.keep, int) else self.keep
            logits = self.model.lm_head(found[:, part].to(dtype))
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=self.cache if self.use_cache else None
        )


# ----------------------------------------------------------------------------------- the model


def _check_model(model: Any) -> tuple[list[object], list[Tensor]]:
    """What a plan is made of: path and modules, and their tensors; ``_UnsupportedError`` where the
    library does not run the model."""
    config = model.config
    if loader.chosen_path() is None:
        raise _UnsupportedError("the compiled kernels are missing or switched off")
    if config.model_type not in FAMILIES:
        raise _UnsupportedError(f"model_type {config.model_type!r} is not one of {FAMILIES}")
    if config.hidden_act != "silu":
        raise _UnsupportedError(f"hidden_act={config.hidden_act!r}")
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window and not kinds and config.model_type == "mistral"):
        raise _UnsupportedError("sliding-window attention")
    rotary = model.model.rotary_emb
    if rotary.rope_type not in _ROPE:
        raise _UnsupportedError(f"rotary embedding of type {rotary.rope_type!r}")
    parts: list[object] = [loader.chosen_path()]
    tensors: list[Tensor] = []
    for name, module in model.named_modules():
        patched = "forward" in module.__dict__ and module is not model
        if patched or "_hf_hook" in module.__dict__ or _hooked(module):
            raise _UnsupportedError(f"{name or 'the model'} has hooks or a forward of its own")
        parts.append(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.device.type != "cpu":
                    raise _UnsupportedError(f"{name} is on {tensor.device}")
                tensors.append(tensor)
    return parts, tensors


def _hooked(module: nn.Module) -> bool:
    """Hooks of others, on a module inside the model: the library would pass them by."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not isinstance(getattr(hook, "__self__", None), BatchContext) for hook in hooks)


def _build(model: Any) -> NativeDecoder:
    config, blocks = model.config, []
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        layers = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        layers |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        norms = {"input_norm": block.input_layernorm, "post_norm": block.post_attention_layernorm}
        if hasattr(attention, "q_norm"):
            norms |= {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
        where = f"model.layers.{index}"
        blocks.append(
            BlockStep(
                cast(Any, {name: _norm(norm, where) for name, norm in norms.items()}),
                cast(Any, {name: _linear(layer, where) for name, layer in layers.items()}),
            )
        )
    attention = model.model.layers[0].self_attn
    rotary = model.model.rotary_emb
    if len(rotary.inv_freq) * 2 != attention.head_dim or attention.head_dim % 2:
        raise _UnsupportedError("a rotary embedding of part of a head")
    return NativeDecoder(
        blocks,
        _norm(model.model.norm, "model.norm"),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        attention_scale=attention.scaling,
        frequencies=rotary.inv_freq,
        rope_scale=rotary.attention_scaling,
        table=_table(model.get_input_embeddings()),
        head=_linear(model.lm_head, "lm_head") if _is_packed(model.lm_head) else None,
    )


def _table(embedding: nn.Module) -> native.Table | None:
    """The embedding for the library, where its rows need no rounding to a narrower dtype."""
    if isinstance(embedding, PackedEmbedding) and embedding.output_like.dtype == torch.float32:
        return embedding.native_table()
    return None


def _is_packed(layer: Any) -> bool:
    return isinstance(layer, PackedLinear) and native.fits(
        layer.in_features, layer.weight_scale.shape[1], layer.levels
    )


def _norm(norm: Any, where: str) -> NormStep:
    if not isinstance(norm, LayerBatchNorm):
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            return NormStep(len(norm.weight), norm.variance_epsilon, weight=norm.weight)
        raise _UnsupportedError(f"{where}: a norm of type {type(norm).__name__}")
    spec = norm.spec
    if spec.statistics == "gated":
        raise _UnsupportedError(f"{where}: a norm in training")
    static = spec.statistics == "static"
    log_ms = float(norm.running_log_ms)
    return NormStep(
        norm.features,
        norm.eps,
        token=not static,
        constant=1.0 if spec.absorbed or not static else math.exp(-log_ms / 2),
        first_factor=math.exp(log_ms / 2) if static and spec.absorbed else 1.0,
        own_first=static and spec.first_token == "own",
        centered=spec.centered,
        weight=norm.weight,
        bias=norm.bias,
    )


def _linear(layer: Any, where: str) -> LinearStep:
    if not isinstance(layer, PackedLinear):
        raise _UnsupportedError(f"{where}: a layer of type {type(layer).__name__} is not packed")
    groups = layer.weight_scale.shape[1]
    if not native.fits(layer.in_features, groups, layer.levels):
        raise _UnsupportedError(f"{where}: groups of {layer.in_features // groups} inputs")
    static = layer.activation_step
    own_first = static is not None and layer.spec.first_token == "own"
    return LinearStep(layer.native_weight(), 0.0 if static is None else float(static), own_first)
