"""The plan of a model: what ``kernels.decoder`` wants of it, or why there is none.

The library trusts what it is given, so every number and every shape is compared with every other
here, before it sees one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..kernels import loader, native
from ..kernels.decoder import BlockPlan, LinearPlan, NativeDecoder
from ..kernels.norm import NativeNorm
from ..nn import LayerBatchNorm, PackedEmbedding, PackedLinear
from .families import Anatomy, UnsupportedError, all_equal, family_of
from .identity import check_identity, own_attributes

_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length
_Activation = Literal["swiglu", "relu", "gelu_tanh"]
_ACTIVATIONS: dict[str, _Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Plan:
    """What the library is given of a model, ``decoder``, and where the rest of it is.

    ``dtype`` is that of embeddings and logits. ``positions``: how many there are, where they have
    embeddings that were learned. ``own_first``: whether some part treats the first token of a
    sequence as a case of its own.
    """

    decoder: NativeDecoder
    anatomy: Anatomy
    dtype: torch.dtype
    positions: float
    own_first: bool


def make_plan(model: Any) -> Plan:
    """The plan of ``model``; ``UnsupportedError`` where the library does not run it."""
    if loader.chosen_isa() is None:
        raise UnsupportedError("the compiled kernels are missing or switched off")
    family = family_of(model)
    check_identity(model, family)
    _check_config(model.config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise UnsupportedError(f"{name} is on {tensor.device}")
    try:
        anatomy = family.anatomy(model)
    except (AttributeError, IndexError, KeyError) as error:  # of another version, or changed
        kind = model.config.model_type
        raise UnsupportedError(f"a {kind} of another build ({error})") from error
    if not anatomy.blocks:
        raise UnsupportedError("a decoder without blocks")
    for name, module in model.named_modules():
        if module.training != model.training:
            raise UnsupportedError(f"{name} is not in the mode (training or not) of the model")
    decoder = _decoder(anatomy, model.config)
    learned = decoder.learned
    positions = math.inf if learned is None else len(learned)
    return Plan(decoder, anatomy, _dtype(anatomy.embedding), positions, _own_first(decoder))


def _own_first(decoder: NativeDecoder) -> bool:
    parts: list[NativeNorm | LinearPlan] = [decoder.norm]
    parts += [decoder.head] if decoder.head else []
    for block in decoder.blocks:
        parts += [*block.norms.values(), *block.linears.values()]
    return any(part.own_first for part in parts)


def _check_config(config: Any) -> None:
    """Settings that ask every call for more than logits and a cache."""
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, None) not in (None, False):
            raise UnsupportedError(f"config.{name}={getattr(config, name)!r}")
    if not getattr(config, "return_dict", True):
        raise UnsupportedError("config.return_dict=False")


def _decoder(anatomy: Anatomy, config: Any) -> NativeDecoder:
    steps = []
    for index, block in enumerate(anatomy.blocks):
        where = f"block {index}"
        steps.append(
            BlockPlan(
                cast(Any, {name: _norm(norm, where) for name, norm in block.norms.items()}),
                cast(Any, {name: _linear(layer, where) for name, layer in block.linears.items()}),
                block.window,
                block.rope,
            )
        )
    last = _norm(anatomy.norm, "the last norm")
    heads, kv_heads, head_dim = _heads(anatomy, steps)
    head = _linear(anatomy.head, "the head") if isinstance(anatomy.head, PackedLinear) else None
    table = _table(anatomy.embedding)
    activations = [_activation(block.activation, anatomy.gated) for block in anatomy.blocks]
    decoder = NativeDecoder(
        steps,
        last,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_scale=float(all_equal(anatomy.scales, "the scale of attention")),
        learned=anatomy.learned,
        activation=all_equal(activations, "the activation function"),
        table=table,
        head=head,
        **_rotary(anatomy.rotary, head_dim),
    )
    for name, found, wanted in _shapes(decoder, anatomy, config):
        if found != wanted:
            raise UnsupportedError(f"{name} is {found}, where the rest of the model wants {wanted}")
    return decoder


# ------------------------------------------------------------------------- numbers and their sizes


def _heads(anatomy: Anatomy, steps: Sequence[BlockPlan]) -> tuple[int, int, int]:
    """(heads, key/value heads, width of a head), as the layers' rows give them."""
    attention = cast(Any, anatomy.blocks[0].attention)
    head_dim, linears = attention.head_dim, steps[0].linears
    if type(head_dim) is not int or head_dim < 1:
        raise UnsupportedError(f"head_dim={head_dim!r}: want a whole number from 1")
    rows = linears["q"].weight.rows
    if "k" in linears:
        keys = linears["k"].weight.rows
    else:
        rows = keys = rows // 3
    heads, kv_heads = rows // head_dim, keys // head_dim
    if rows % head_dim or keys % head_dim or not kv_heads or heads % kv_heads:
        raise UnsupportedError(
            f"{rows / head_dim:g} query heads and {keys / head_dim:g} key/value heads of width "
            f"{head_dim}: the first must be a multiple of the second"
        )
    return heads, kv_heads, head_dim


def _shapes(
    decoder: NativeDecoder, anatomy: Anatomy, config: Any
) -> Iterator[tuple[str, object, object]]:
    """Everything that must agree, as (name, value found, value wanted)."""
    heads, kv_heads, head_dim = decoder.heads, decoder.kv_heads, decoder.head_dim
    hidden, inner = decoder.hidden, decoder.blocks[0].linears["up"].weight.rows
    queries, keys = heads * head_dim, kv_heads * head_dim
    yield from anatomy.constants
    yield "config.num_hidden_layers", config.num_hidden_layers, len(decoder.blocks)
    for index, (block, step) in enumerate(zip(anatomy.blocks, decoder.blocks, strict=True)):
        attention = cast(Any, block.attention)
        yield f"layer_idx of block {index}", attention.layer_idx, index
        yield f"is_causal of block {index}", attention.is_causal, True
        yield f"head_dim of block {index}", attention.head_dim, head_dim
        for name, wanted in (("num_heads", heads), ("num_key_value_groups", heads // kv_heads)):
            yield f"{name} of block {index}", getattr(attention, name, wanted), wanted
        first = queries if "k" in step.linears else queries + 2 * keys
        layers = {"q": (first, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        layers |= {"o": (hidden, queries), "gate": (inner, hidden)}
        layers |= {"up": (inner, hidden), "down": (hidden, inner)}
        for layer, linear in step.linears.items():
            shape = (linear.weight.rows, linear.weight.columns)
            yield f"the shape of {layer} in block {index}", shape, layers[layer]
        for name, norm in step.norms.items():
            width = head_dim if name in ("query_norm", "key_norm") else hidden
            yield f"the width of {name} in block {index}", norm.features, width
    embedding = cast(Any, anatomy.embedding)
    yield "the width of the embedding", embedding.embedding_dim, hidden
    if decoder.table is not None:
        yield "the width of the table", decoder.table.columns, hidden
    elif isinstance(embedding, nn.Embedding):
        yield "the width of the embedding", embedding.weight.shape[-1], hidden
    if decoder.head is not None:
        yield "the width of the head", decoder.head.weight.columns, hidden
    if decoder.learned is not None:
        yield "the width of the positions", decoder.learned.shape[-1], hidden


def _rotary(rotary: Any, head_dim: int) -> dict[str, Any]:
    if rotary is None:
        return {}
    if rotary.rope_type not in _ROPE:
        raise UnsupportedError(f"rotary embedding of type {rotary.rope_type!r}")
    if rotary.inv_freq.shape != (head_dim // 2,) or head_dim % 2:
        raise UnsupportedError(
            f"a rotary embedding of {tuple(rotary.inv_freq.shape)} frequencies for heads of "
            f"{head_dim}"
        )
    return {"frequencies": rotary.inv_freq, "rope_scale": float(rotary.attention_scaling)}


# -------------------------------------------------------------------------------- parts of a model


@cache
def _stock_activation(name: str) -> nn.Module:
    found: nn.Module = ACT2FN[name]
    return found


def _activation(module: nn.Module, gated: bool) -> _Activation:
    """The library's name of an activation function, known by its class and settings."""
    for name, native_name in _ACTIVATIONS.items():
        stock = _stock_activation(name)
        same = type(module) is type(stock) and _settings(module) == _settings(stock)
        if same and (native_name == "swiglu") == gated:
            return native_name
    raise UnsupportedError(f"activation function {module}")


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module was given at its making; of partial functions and methods their texts."""
    names = [name for name in own_attributes(module) if not name.startswith("_")]
    return {name: repr(getattr(module, name)) for name in names}


def _table(embedding: nn.Module) -> native.Table | None:
    """The embedding for the library, where its rows need no rounding to a narrower dtype."""
    if isinstance(embedding, PackedEmbedding) and embedding.output_like.dtype == torch.float32:
        return embedding.native_table()
    return None


def _dtype(embedding: nn.Module) -> torch.dtype:
    """The dtype of the embeddings, which is that of the logits too."""
    if not isinstance(embedding, (PackedEmbedding, nn.Embedding)):
        raise UnsupportedError(f"an embedding of type {type(embedding).__name__}")
    packed = isinstance(embedding, PackedEmbedding)
    like: Tensor = embedding.output_like if packed else embedding.weight  # type: ignore[assignment]
    if like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"embeddings of {like.dtype}")
    return like.dtype


def _norm(norm: Any, where: str) -> NativeNorm:
    if not isinstance(norm, LayerBatchNorm):
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            return NativeNorm(len(norm.weight), norm.variance_epsilon, weight=norm.weight)
        raise UnsupportedError(f"{where}: a norm of type {type(norm).__name__}")
    if norm.spec.statistics == "gated":
        raise UnsupportedError(f"{where}: a norm in training")
    return norm.native_norm()


def _linear(layer: Any, where: str) -> LinearPlan:
    if not isinstance(layer, PackedLinear):
        raise UnsupportedError(f"{where}: a layer of type {type(layer).__name__} is not packed")
    groups = layer.weight_scale.shape[1]
    if not native.fits(layer.in_features, groups, layer.levels):
        raise UnsupportedError(
            f"{where}: no storage for {layer.in_features} inputs in groups of "
            f"{layer.in_features // groups} at {layer.levels} levels"
        )
    static = layer.activation_step
    own_first = static is not None and layer.spec.first_token == "own"
    step = 0.0 if static is None else float(static)
    return LinearPlan(layer.native_weight(), step, own_first)
